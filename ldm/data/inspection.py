"""Read every file of a cohort once and note what it is or what is wrong; unchanged files are not read again."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from ldm.data import images
from ldm.data.draft import Draft
from ldm.data.intensity import IntensityRecipe
from ldm.data.nifti import affine_mm, spans_space
from ldm.data.stored import NIFTI_SUFFIXES, READ_ERRORS, cause, split_reference
from ldm.errors import LdmError
from ldm.files import write_json

logger = logging.getLogger(__name__)

CACHE_FILE = "checks.json"
CACHE_VERSION = 3
NOT_KEPT = ("missing-file", "unreadable")
"""Faults that may be gone without a change of the file: a disk that was away, memory that was short."""
MAX_WORKERS = 8
MAX_CHANNELS = 4
"""More volumes than this in one NIfTI file are a time series, not channels."""
FORM_TOLERANCE = 0.5
"""Voxels by which sform and qform may place a corner differently."""


@dataclass(frozen=True)
class FileFacts:
    """What one reading of one reference found out; kept in the cache.

    Attributes:
        kind: slug of the fault that made further checks pointless, or ``None``.
        reason: what is wrong with it.
        note: a difference between sform and qform that may be meant, or ``None``.
        shape: channels first, (C, *S).
        affine: 4 x 4 rows, voxel index to world in mm; ``None`` for pictures and arrays.
        digest: SHA-256 of shape and pixels.
        volume_shape, volume_affine: of a slice, those of its volume in RAS.
        values: of a label map, those in it.
    """

    kind: str | None = None
    reason: str = ""
    note: str | None = None
    shape: tuple[int, ...] = ()
    affine: tuple[tuple[float, ...], ...] | None = None
    digest: str = ""
    volume_shape: tuple[int, ...] = ()
    volume_affine: tuple[tuple[float, ...], ...] | None = None
    values: tuple[int, ...] = ()

    @property
    def content(self) -> str:
        """Hash of all that preprocessing sees of a file: values, shape, and where its voxels lie."""
        return hashlib.sha256(repr((self.digest, self.affine, self.volume_affine)).encode()).hexdigest()

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size in mm along the axes nearest to R, A and S; ``None`` without an affine."""
        if self.affine is None:
            return None
        return _along_world(self.axes, (1, 1, 1))

    @property
    def axes(self) -> tuple[tuple[float, ...], ...]:
        """The affine without its shift, which many files of a cohort have in common: three rows of three."""
        return tuple(tuple(row[:3]) for row in self.affine[:3])

    @property
    def extent(self) -> tuple[float, ...]:
        """Field of view in mm along the axes nearest to R, A and S; without an affine in pixels as stored."""
        if self.affine is None:
            return tuple(float(size) for size in self.shape[1:])
        return _along_world(self.axes, tuple(self.shape[1:]))


@functools.lru_cache(maxsize=4096)
def _along_world(axes: tuple[tuple[float, ...], ...], counts: tuple[int, ...]) -> tuple[float, ...]:
    """So many voxels along each stored axis in mm, in the order of the axes nearest to R, A and S."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    sizes, order = nib.affines.voxel_sizes(affine) * counts, list(nib.io_orientation(affine)[:, 0])
    return tuple(round(float(sizes[order.index(axis)]), 4) for axis in range(3))


class FileReader:
    """Reads every reference of a draft once, in threads, unless the cache knows the unchanged file."""

    def __init__(self, draft: Draft, cache_dir: Path | None) -> None:
        self.draft = draft
        self.dims = draft.config["spatial_dims"]
        self.recipe = IntensityRecipe.from_config(draft.config["intensity"])
        self.path = None if cache_dir is None else Path(cache_dir) / CACHE_FILE
        self.cached = 0

    def read_all(self, progress: bool) -> dict[str, FileFacts]:
        """Return reference -> facts."""
        roles = {ref: "image" for record in self.draft.kept for ref in record.images.values()}
        roles |= {record.labels: "labels" for record in self.draft.kept if record.labels}
        known = _load_cache(self.path)
        keys = {ref: self._key(ref, role) for ref, role in roles.items()}
        found = {ref: _from_json(known[key]) for ref, key in keys.items() if key in known}
        self.cached = len(found)
        pending = [ref for ref in roles if ref not in found]
        found |= self._read(pending, roles, progress)
        if self.path is not None and pending:
            kept = [ref for ref in pending if found[ref].kind not in NOT_KEPT]
            fresh = {keys[ref]: asdict(found[ref]) for ref in kept}
            _save_cache(self.path, known | fresh)
        return {ref: found[ref] for ref in roles}

    def _read(self, refs: Sequence[str], roles: Mapping[str, str], progress: bool) -> dict[str, FileFacts]:
        console = Console(stderr=True)
        hidden = not (progress and console.is_terminal)
        title = f"checking {self.draft.name}"
        with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
            results = pool.map(lambda ref: inspect(ref, roles[ref], self.dims, self.recipe), refs)
            bar = track(results, title, len(refs), console=console, transient=True, disable=hidden)
            return dict(zip(refs, bar, strict=True))

    def _key(self, ref: str, role: str) -> str:
        """Everything that the facts depend on."""
        try:
            stat = split_reference(ref)[0].stat()
            state = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            state = []
        return json.dumps([ref, role, self.dims, self.recipe.to_dict() if role == "image" else None, *state])


def inspect(ref: str, role: str, spatial_dims: int, recipe: IntensityRecipe) -> FileFacts:
    """Read one reference and say what it is, or what is wrong with it.

    Args:
        ref: absolute reference.
        role: ``image`` or ``labels``.
        spatial_dims: 2 or 3, as the cohort says.
        recipe: intensity recipe that images have to fit.
    """
    path, _ = split_reference(ref)
    if not path.is_file():
        return FileFacts("missing-file", "there is no such file")
    header = _inspect_header(path)
    if header.kind:
        return header
    try:
        image = images.read(ref, spatial_dims=spatial_dims)
    except LdmError as error:
        return _unreadable(ref, path, error)
    shape = tuple(int(size) for size in image.array.shape)
    wrong = _wrong_dimensions(shape, spatial_dims, role)
    affine = None if image.affine is None else _rows(image.affine)
    if wrong:
        return FileFacts("wrong-dimensions", wrong, shape=shape, affine=affine)
    kind, reason = _inspect_pixels(image.array, path, role, recipe)
    volume_shape, volume_affine = image.facts.get("volume", ((), None))
    return FileFacts(
        kind,
        reason,
        header.note,
        shape,
        affine,
        _digest(image.array),
        volume_shape,
        None if volume_affine is None else _rows(volume_affine),
        tuple(int(value) for value in np.unique(image.array)) if role == "labels" and kind is None else (),
    )


def _rows(affine: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in affine)


def _inspect_header(path: Path) -> FileFacts:
    """Compare the two affines of a NIfTI header, and find one without an inverse."""
    if not path.name.lower().endswith(NIFTI_SUFFIXES):
        return FileFacts()
    try:
        nifti = nib.load(path)
        # What else may have such a name, e.g. CIFTI, is refused in words when it is read.
        return _inspect_forms(nifti) if isinstance(nifti, nib.Nifti1Pair) else FileFacts()
    except READ_ERRORS as error:
        return FileFacts("unreadable", f"cannot be read as NIfTI ({cause(error)})")


def _inspect_forms(nifti: nib.Nifti1Image) -> FileFacts:
    sform, qform = nifti.get_sform(coded=True), nifti.get_qform(coded=True)
    affine = affine_mm(nifti)
    determinant = float(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else float("nan")
    if not spans_space(affine):
        return FileFacts("singular-affine", f"the affine has determinant {determinant:g}: voxels have no size")
    if sform[0] is None or qform[0] is None:
        return FileFacts()
    shift = corner_shift(nifti.shape, sform[0], qform[0])
    if shift <= FORM_TOLERANCE:
        return FileFacts()
    reason = f"sform (code {sform[1]}) and qform (code {qform[1]}) place a corner {shift:.1f} voxels apart"
    # Different codes name different spaces (scanner, aligned, MNI): these may differ, but not by a flip.
    if sform[1] == qform[1] or nib.aff2axcodes(sform[0]) != nib.aff2axcodes(qform[0]):
        return FileFacts("sform-qform", reason)
    return FileFacts(note=reason)


def corner_shift(shape: Sequence[int], first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance between one grid's corners under two affines, in smallest voxels of the first."""
    ends = [(0, size - 1) for size in (*shape, 1, 1)[:3]]
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1).T
    distance = nib.affines.apply_affine(first, corners) - nib.affines.apply_affine(second, corners)
    return float(np.linalg.norm(distance, axis=1).max() / nib.affines.voxel_sizes(first).min())


def _unreadable(ref: str, path: Path, error: LdmError) -> FileFacts:
    """Tell an image of other dimensions, which can be read without asking for a number, from damage."""
    reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{ref}: ")
    try:
        shape = images.read(ref).array.shape
    except LdmError:
        return FileFacts("unreadable", reason)
    return FileFacts("wrong-dimensions", reason, shape=tuple(int(size) for size in shape))


def _wrong_dimensions(shape: tuple[int, ...], spatial_dims: int, role: str) -> str | None:
    channels, *size = shape
    grid = " x ".join(map(str, size))
    if len(size) != spatial_dims:
        return f"is {len(size)}-D ({grid}), where data.spatial_dims is {spatial_dims}"
    if 1 in size:
        return f"is {len(size) - size.count(1)}-D ({grid}), where data.spatial_dims is {spatial_dims}"
    if role == "labels" and channels > 1:
        return f"has {channels} channels or volumes, where one label map is expected"
    if spatial_dims == 3 and channels > MAX_CHANNELS:
        return f"is 4-D ({channels} volumes of {grid}), where a 3-D volume is expected"
    return None


def _inspect_pixels(array: np.ndarray, path: Path, role: str, recipe: IntensityRecipe) -> tuple[str | None, str]:
    finite = np.isfinite(array)
    if not finite.all():
        return "not-finite", f"{array.size - int(finite.sum())} of {array.size} pixels are NaN or infinite"
    low, high = float(array.min()), float(array.max())
    if role == "labels":
        if low < 0 or high > 255 or not np.array_equal(array, np.rint(array)):
            return "labels-values", f"values {low:g}..{high:g} are not all whole numbers from 0 to 255"
        return None, ""
    if low == high:
        return "constant-image", f"every pixel is {low:g}"
    try:
        for channel in array:
            recipe.apply(channel, path.name)
    except LdmError as error:
        return "intensity", str(error).removeprefix(f"{path.name}: ")
    return None, ""


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# Cache ------------------------------------------------------------------------------------------------


def _load_cache(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read the cache; an unusable one is as good as none, since it can always be made again."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("%s: the check's cache cannot be read (%s); every file is read again", path, error)
        return {}
    usable = isinstance(content, dict) and content.get("version") == CACHE_VERSION
    return content["files"] if usable else {}


def _save_cache(path: Path, files: Mapping[str, dict[str, Any]]) -> None:
    write_json(path, {"version": CACHE_VERSION, "files": files}, indent=None)


def _from_json(entry: Mapping[str, Any]) -> FileFacts:
    affine, volume_affine = (None if one is None else _rows(one) for one in (entry["affine"], entry["volume_affine"]))
    tuples = {name: tuple(entry[name]) for name in ("shape", "volume_shape", "values")}
    return FileFacts(**{**entry, **tuples, "affine": affine, "volume_affine": volume_affine})
