"""Check a cohort before anything is trained on it: every file is read, and every fault told in one report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from ldm.data import images
from ldm.data.cohort import SPLITS, Cohort, Draft, Record, assemble, draft_cohort
from ldm.data.faults import Fault, render
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import GRID_TOLERANCE
from ldm.errors import LdmError

__all__ = ["CheckReport", "Fault", "check_cohort"]

logger = logging.getLogger(__name__)

CACHE_FILE = "checks.json"
CACHE_VERSION = 1
MAX_WORKERS = 8
MAX_CHANNELS = 4
"""More volumes than this in one NIfTI file are a time series, not channels."""
SPACING_TOLERANCE = 0.01
"""Relative difference from the cohort's spacing that needs resampling."""
FORM_TOLERANCE = 0.5
"""Voxels by which sform and qform may place a corner differently."""

_RESTORE = "restore the file from its source, or take its row out of the table"


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
    """

    kind: str | None = None
    reason: str = ""
    note: str | None = None
    shape: tuple[int, ...] = ()
    affine: tuple[tuple[float, ...], ...] | None = None
    digest: str = ""

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size in mm along the axes nearest to R, A and S; ``None`` without an affine."""
        if self.affine is None:
            return None
        affine = np.array(self.affine)
        axes = nib.io_orientation(affine)[:, 0]
        sizes = nib.affines.voxel_sizes(affine)
        return tuple(round(float(sizes[list(axes).index(axis)]), 4) for axis in range(3))


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        name: the cohort's name.
        policy: ``stop`` or ``leave_out``.
        faults: everything that is wrong.
        warnings: what deserves a look and stops nothing.
        cohort: the cohort after the policy; ``None`` when the faults stop it.
        facts: counts, shapes, spacing, split hash, files read and taken from the cache, seconds.
    """

    name: str
    policy: str
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    cohort: Cohort | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def stopping(self) -> tuple[Fault, ...]:
        """The faults that forbid to go on: all under ``stop``, else those of the whole cohort."""
        return tuple(fault for fault in self.faults if self.policy == "stop" or fault.record is None)

    def raise_for_policy(self) -> None:
        """Raise the rendered report as an LdmError if any fault stops."""
        if self.stopping:
            raise LdmError(self.render())

    def render(self) -> str:
        """Return the report as text: facts, faults and warnings grouped by kind, and the verdict."""
        facts = "\n".join(f"  {key:<12}{_plain(self.facts[key])}" for key in self.facts if key != "left_out")
        parts = [
            f"cohort {self.name}\n{facts}",
            render(self.faults, "faults"),
            render(self.warnings, "warnings"),
            self._verdict(),
        ]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "name": self.name,
            "policy": self.policy,
            "verdict": self._verdict(),
            "facts": self.facts,
            "faults": [fault.to_dict() for fault in self.faults],
            "warnings": [warning.to_dict() for warning in self.warnings],
        }

    def _verdict(self) -> str:
        if not self.faults:
            return "No faults."
        if not self.stopping:
            return f"Left out {len(self.facts['left_out'])} records, as data.faults=leave_out asks."
        if self.policy == "stop" and all(fault.record is not None for fault in self.faults):
            return "Stopped. Mend the faults, or set data.faults=leave_out to go on without these records."
        return "Stopped. Faults of the whole cohort have to be mended."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "-" if value is None else str(value)


def check_cohort(
    data_cfg: Mapping[str, Any] | DictConfig, cache_dir: Path | None = None, progress: bool = True
) -> CheckReport:
    """Read the table and every file of a cohort and report all that is wrong.

    Args:
        data_cfg: the ``data`` configuration (``conf/data/base.yaml`` explains every key).
        cache_dir: where results are kept, so that unchanged files are not read again; ``None``: nowhere.
        progress: show a progress bar on a terminal.

    Raises:
        LdmError: only when the configuration or the table itself cannot be read; faults are in the report,
            and :meth:`CheckReport.raise_for_policy` turns them into an error.
    """
    start = time.monotonic()
    draft = draft_cohort(data_cfg)
    reader = _FileReader(draft, cache_dir)
    files = reader.read_all(progress)
    faults = [*draft.faults, *_file_faults(draft, files)]
    affected = {fault.record for fault in faults if fault.record} if draft.leave_out else set()
    cohort, late, notes = assemble(draft, affected) if draft.readable else (None, [], [])
    faults += late
    warnings = [*draft.warnings, *notes, *_file_warnings(draft, files), *_files_without_row(draft)]
    left_out = sorted({fault.record for fault in faults if fault.record}) if draft.leave_out else []
    stops = any(not draft.leave_out or fault.record is None for fault in faults)
    facts = {
        **_summary(draft, cohort, files),
        "files": len(files),
        "from_cache": reader.cached,
        "seconds": round(time.monotonic() - start, 2),
        "left_out": left_out,
    }
    if left_out:
        logger.warning("%s: left out %d records at fault: %s", draft.name, len(left_out), ", ".join(left_out))
    return CheckReport(
        draft.name, draft.config["faults"], tuple(faults), tuple(warnings), None if stops else cohort, facts
    )


# Reading files ----------------------------------------------------------------------------------------


class _FileReader:
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
            fresh = {keys[ref]: asdict(found[ref]) for ref in pending if found[ref].kind != "missing-file"}
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
            stat = images.split_reference(ref)[0].stat()
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
    path, _ = images.split_reference(ref)
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
    affine = None if image.affine is None else tuple(tuple(map(float, row)) for row in image.affine)
    if wrong:
        return FileFacts("wrong-dimensions", wrong, shape=shape, affine=affine)
    kind, reason = _inspect_pixels(image.array, path, role, recipe)
    return FileFacts(kind, reason, header.note, shape, affine, _digest(image.array))


def _inspect_header(path: Path) -> FileFacts:
    """Compare the two affines of a NIfTI header, and find one without an inverse."""
    if not path.name.lower().endswith(images.NIFTI_SUFFIXES):
        return FileFacts()
    try:
        nifti = nib.load(path)
        sform, qform = nifti.get_sform(coded=True), nifti.get_qform(coded=True)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        return FileFacts("unreadable", f"cannot be read as NIfTI ({_first_line(error)})")
    determinant = float(np.linalg.det(nifti.affine[:3, :3])) if np.isfinite(nifti.affine).all() else float("nan")
    if not abs(determinant) > 1e-9:
        return FileFacts("singular-affine", f"the affine has determinant {determinant:g}: voxels have no size")
    if sform[0] is None or qform[0] is None:
        return FileFacts()
    shift = _corner_shift(nifti.shape, sform[0], qform[0])
    if shift <= FORM_TOLERANCE:
        return FileFacts()
    reason = f"sform (code {sform[1]}) and qform (code {qform[1]}) place a corner {shift:.1f} voxels apart"
    # Different codes name different spaces (scanner, aligned, MNI): these may differ, but not by a flip.
    if sform[1] == qform[1] or nib.aff2axcodes(sform[0]) != nib.aff2axcodes(qform[0]):
        return FileFacts("sform-qform", reason)
    return FileFacts(note=reason)


def _corner_shift(shape: Sequence[int], first: np.ndarray, second: np.ndarray) -> float:
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Judging what was read --------------------------------------------------------------------------------

_REMEDIES = {
    "missing-file": "correct the row or data.image / data.labels, or take the row out of the table",
    "unreadable": _RESTORE,
    "singular-affine": "write a valid sform and qform (e.g. convert the scan again), or take its row out",
    "sform-qform": "find out which one is right and write it to both (e.g. nibabel set_sform, set_qform)",
    "wrong-dimensions": "store one volume (3-D) or one slice (2-D) a file; for a slice of a volume write "
    "'...::axial[40]', for a row of an array '...npz::key[row]'; or change data.spatial_dims",
    "not-finite": "export the image again, or take its row out of the table",
    "constant-image": _RESTORE,
    "intensity": "make data.intensity fit the data (data.intensity.kind, lower, upper), or take the row out",
    "labels-values": "store labels as whole numbers from 0 to 255, resampled with nearest neighbour",
}


def _file_faults(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    faults = []
    for record in draft.kept:
        for ref in dict.fromkeys(record.references):
            if files[ref].kind:
                kind = files[ref].kind
                faults.append(Fault(_shown(draft, ref), kind, files[ref].reason, _REMEDIES[kind], record.id))
        faults += _disagreements(draft, record, files)
    faults += _unlike_cohort(draft, files)
    faults += _identical(draft, files)
    return faults


def _disagreements(draft: Draft, record: Record, files: Mapping[str, FileFacts]) -> list[Fault]:
    """Channels and labels of one record that do not lie on the grid of its first channel."""
    first, *others = list(record.images.values())
    pairs = [("channels", ref) for ref in others] + ([("labels", record.labels)] if record.labels else [])
    faults = []
    for role, ref in pairs:
        image, other = files[first], files[ref]
        comparable = image.shape and other.shape and "wrong-dimensions" not in (image.kind, other.kind)
        found = _off_grid(image, other) if comparable else None
        if found:
            remedy = f"resample the {role} onto the grid of the image"
            faults.append(Fault(_shown(draft, ref), f"{role}-{found[0]}", found[1], remedy, record.id))
    return faults


def _off_grid(image: FileFacts, other: FileFacts) -> tuple[str, str] | None:
    """``("shape" or "affine", reason)`` when ``other`` lies on another grid than ``image``."""
    if other.shape[1:] != image.shape[1:]:
        return "shape", f"has shape {list(other.shape[1:])}, the image {list(image.shape[1:])}"
    if image.affine is None or other.affine is None:
        return None
    shift = _corner_shift(image.shape[1:], np.array(image.affine), np.array(other.affine))
    if shift <= GRID_TOLERANCE:
        return None
    return "affine", f"its affine places a corner {shift:.2f} voxels from the image's"


def _unlike_cohort(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    """Spacing (when nothing is resampled) and number of channels that differ from most of the cohort's."""
    faults = []
    for channel in draft.templates:
        refs = [(record, record.images[channel]) for record in draft.kept if channel in record.images]
        good = [(record, ref) for record, ref in refs if files[ref].kind is None]
        faults += _unlike_channels(draft, good, files)
        if draft.config["spacing_mm"] is None:
            faults += _unlike_spacing(draft, good, files)
    return faults


def _unlike_channels(draft: Draft, refs: Sequence[tuple[Record, str]], files: Mapping[str, FileFacts]) -> list[Fault]:
    counts = Counter(files[ref].shape[0] for _, ref in refs)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    remedy = "give every image the same channels; for one volume of a 4-D file, extract it"
    return [
        Fault(
            _shown(draft, ref),
            "wrong-dimensions",
            f"has {files[ref].shape[0]} channels or volumes, most of the cohort {usual}",
            remedy,
            record.id,
        )
        for record, ref in refs
        if files[ref].shape[0] != usual
    ]


def _unlike_spacing(draft: Draft, refs: Sequence[tuple[Record, str]], files: Mapping[str, FileFacts]) -> list[Fault]:
    counts = Counter(files[ref].spacing for _, ref in refs if files[ref].spacing is not None)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    text = _sizes(usual)
    example = text.replace(" x ", ", ")
    remedy = f"set data.spacing_mm, e.g. [{example}], to resample every image, or mend the header"
    faults = []
    for record, ref in refs:
        spacing = files[ref].spacing
        if spacing is not None and not np.allclose(spacing, usual, rtol=SPACING_TOLERANCE, atol=0):
            reason = f"voxels of {_sizes(spacing)} mm, most of the cohort {text} mm"
            faults.append(Fault(_shown(draft, ref), "spacing", reason, remedy, record.id))
    return faults


def _sizes(spacing: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in spacing)


def _identical(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    """The same pixels under several ids.

    Where the copies agree in their covariates the first may stay; otherwise nobody can tell whose image it
    is, and every copy is at fault.
    """
    groups: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for record in draft.kept:
        for channel, ref in record.images.items():
            if files[ref].digest and files[ref].kind != "constant-image":
                groups[channel, files[ref].digest].setdefault(record.id, record)
    remedy = "keep the row that is right and take the others out of the table"
    faults = []
    for (channel, _), members in groups.items():
        records = list(members.values())
        alike = all(record.covariates == records[0].covariates for record in records)
        for record in records[1:] if alike else records if len(records) > 1 else ():
            other = next(other for other in records if other is not record)
            reason = f"the same pixels as '{other.id}' ({_shown(draft, other.images[channel])})"
            faults.append(Fault(_shown(draft, record.images[channel]), "identical-image", reason, remedy, record.id))
    return faults


def _file_warnings(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    remedy = "nothing, if the two are meant to name different spaces: the sform is used"
    return [
        Fault(_shown(draft, ref), "sform-qform", files[ref].note, remedy, record.id)
        for record in draft.kept
        for ref in dict.fromkeys(record.references)
        if files[ref].note
    ]


def _files_without_row(draft: Draft) -> list[Fault]:
    """Files that a template could name and no row does."""
    if not draft.readable:
        return []
    named = {images.split_reference(ref)[0] for record in draft.records for ref in record.references}
    remedy = "add a row to the table, or nothing if the file is left out on purpose"
    return [
        Fault(name, "file-without-row", f"matches data.{key} and no row names it", remedy)
        for key, template in _keyed_templates(draft)
        for name in template.files(draft.root)
        if draft.root / name not in named
    ]


def _keyed_templates(draft: Draft) -> Iterable[tuple[str, Any]]:
    return ((template.where.removeprefix("data."), template) for template in draft.templates.values())


def _shown(draft: Draft, ref: str) -> str:
    """A reference as the report shows it: below the root."""
    return ref.removeprefix(f"{draft.root}/")


def _summary(draft: Draft, cohort: Cohort | None, files: Mapping[str, FileFacts]) -> dict[str, Any]:
    records = draft.kept if cohort is None else cohort.records
    good = [files[ref] for record in records for ref in record.images.values() if files[ref].kind is None]
    shapes = np.array([facts.shape for facts in good if len(facts.shape) == draft.config["spatial_dims"] + 1])
    spacings = Counter(facts.spacing for facts in good if facts.spacing is not None)
    return {
        "root": str(draft.root),
        "records": len(records),
        "subjects": len({record.subject for record in records}),
        "splits": {split: sum(record.split == split for record in records) for split in SPLITS},
        "split_hash": None if cohort is None else cohort.split_hash,
        "shape_min": shapes.min(axis=0).tolist() if len(shapes) else None,
        "shape_max": shapes.max(axis=0).tolist() if len(shapes) else None,
        "spacing_mm": list(spacings.most_common(1)[0][0]) if spacings else None,
        "spacings": len(spacings),
    }


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as handle:
        json.dump({"version": CACHE_VERSION, "files": files}, handle)
    os.replace(handle.name, path)


def _from_json(entry: Mapping[str, Any]) -> FileFacts:
    affine = entry["affine"]
    return FileFacts(
        entry["kind"],
        entry["reason"],
        entry["note"],
        tuple(entry["shape"]),
        None if affine is None else tuple(tuple(row) for row in affine),
        entry["digest"],
    )
