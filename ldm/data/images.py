"""Read one image, whatever it is stored as, into a channel-first float32 array; write results atomically.

A *reference* names an image: a path, optionally followed by ``::`` and a selector.

==============================  ==========================================================================
``T1/sub-01.nii.gz``            NIfTI volume; a fourth axis becomes channels
``T1/sub-01.nii.gz::axial[40]`` one slice of a NIfTI volume, counted along the RAS axis
``xray/0001.png``               PNG, JPEG or TIFF, grey (1 channel) or RGB (3 channels)
``slices.npz::images[3]``       row 3 of the array ``images``; ``slices.npz::images`` is the whole array
``slices.npz::images[3,1]``     channel 1 of row 3
``slices.npy::[3]``             row 3 of an ``.npy`` array
``x.npz::unpackbits(masks[3])`` the same for masks stored with ``np.packbits(mask, axis=-1)``
==============================  ==========================================================================

Every failure is an `LdmError` that names the file, the cause and the remedy. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import lzma
import math
import os
import re
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import PIL.Image
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ldm.errors import LdmError, nearest

SEPARATOR = "::"
NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NUMPY_SUFFIXES = (".npy", ".npz")
SUFFIXES = NIFTI_SUFFIXES + PICTURE_SUFFIXES + NUMPY_SUFFIXES
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}

T = TypeVar("T")

_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B")
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
# Deflate puts 258 bytes into 2 bits at best, so that no file holds more than this many times its size.
_GZIP_EXPANSION = 1032
_DAMAGED = "damaged, incomplete or of another kind"
# What nibabel, Pillow, gzip, zipfile and NumPy raise on damaged files.
READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,  # sizes beyond 64 bits
    MemoryError,  # sizes beyond the machine
    LookupError,  # codes that stand for nothing
    TypeError,  # NumPy: entries of another type than a header has
    RuntimeError,  # zipfile: encrypted, or an unknown compression
    SyntaxError,  # Pillow: PNG chunks; NumPy: headers, which are Python literals
    tokenize.TokenError,  # NumPy: likewise
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    ImageFileError,
    HeaderDataError,
)


@dataclass(frozen=True)
class Image:
    """One image as stored, before any preprocessing.

    array:  float32 (C, D, H, W) along the NIfTI axes i, j, k, or (C, H, W) with row 0 on top.
    affine: (4, 4) voxel index to world (RAS+) in mm, or None for pictures, arrays and slices.
    facts:  ``path``, ``format``, ``dtype`` as stored; NIfTI also ``axcodes``, ``spacing`` (mm),
            ``sform_code``, ``qform_code``; a slice of a volume ``volume``, the shape and affine of that in RAS.
    """

    array: np.ndarray
    affine: np.ndarray | None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """What can be told without reading voxels: shape (C, *S), affine (mm) and the facts of `Image`."""

    shape: tuple[int, ...]
    affine: np.ndarray | None
    facts: dict[str, Any] = field(default_factory=dict)


def split_reference(ref: str | Path, root: str | Path | None = None) -> tuple[Path, str | None]:
    """Split ``path::selector``; a relative path is taken from ``root``."""
    text, separator, selector = str(ref).partition(SEPARATOR)
    path = Path(text).expanduser()
    if root is not None and not path.is_absolute():
        path = Path(root).expanduser() / path
    return path, selector if separator else None


def read(ref: str | Path, root: str | Path | None = None, spatial_dims: int | None = None) -> Image:
    """Read the image that ``ref`` names (see the table at the top of this module).

    spatial_dims: 2 or 3. It settles what a 3-axis NumPy array is, (C, H, W) or (D, H, W), and lets a
        NIfTI file of one slice count as 2-D. Without it a 3-axis NumPy array whose first axis is at
        most 4 long is taken as channels.

    Raises LdmError when the file is missing, damaged, of another kind, or the selector does not fit.
    """
    path, selector = _existing(ref, root)
    suffix = _suffix(path)
    if suffix in NIFTI_SUFFIXES:
        return _read_nifti(path, selector, spatial_dims)
    if suffix in PICTURE_SUFFIXES:
        return _read_picture(path, selector)
    return _read_numpy(path, selector, spatial_dims)


def read_header(ref: str | Path, root: str | Path | None = None, spatial_dims: int | None = None) -> Header:
    """Shape and affine of ``ref``; cheap for whole NIfTI volumes, whose voxels are not read.

    Raises LdmError like `read`.
    """
    path, selector = _existing(ref, root)
    if _suffix(path) not in NIFTI_SUFFIXES or selector is not None or spatial_dims == 2:
        image = read(ref, root, spatial_dims)
        return Header(image.array.shape, image.affine, image.facts)
    nifti = _open_nifti(path)
    shape, channels = _nifti_shape(path, nifti.shape)
    return Header((channels, *shape), _nifti_affine(path, nifti), _nifti_facts(path, nifti))


def write(path: str | Path, image: nib.Nifti1Image | np.ndarray) -> Path:
    """Write a NIfTI image (``.nii``, ``.nii.gz``), a uint8 picture (``.png``) or any array (``.npy``).

    The file appears whole or not at all: a temporary file in the same folder is moved into place.
    """
    path = Path(path)
    suffix = _suffix(path)
    if isinstance(image, nib.Nifti1Image) != (suffix in NIFTI_SUFFIXES) or suffix not in (
        *NIFTI_SUFFIXES,
        ".png",
        ".npy",
    ):
        raise LdmError(f"{path}: cannot hold this image. Volumes go to .nii or .nii.gz, pictures to .png or .npy.")
    if suffix == ".png" and not (image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,))):
        raise LdmError(f"{path}: PNG holds uint8 (H, W) or (H, W, 3), not {image.dtype} {image.shape}. Write .npy.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".writing-", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        if suffix in NIFTI_SUFFIXES:
            nib.save(image, temporary)
        elif suffix == ".png":
            PIL.Image.fromarray(image).save(temporary)
        else:
            np.save(temporary, image, allow_pickle=False)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _existing(ref: str | Path, root: str | Path | None) -> tuple[Path, str | None]:
    path, selector = split_reference(ref, root)
    if _suffix(path) not in SUFFIXES:
        raise LdmError(f"{path}: unknown image format '{_suffix(path)}'. Legal: {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise LdmError(f"{path}: is a folder, not an image file.")
    if not path.is_file():
        raise LdmError(f"{path}: no such file.{_similar_name(path)} Check data.root and data.image.")
    return path, selector


def _similar_name(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    return nearest(path.name, (entry.name for entry in path.parent.iterdir()))


def _attempt(path: Path, what: str, action: Callable[[], T]) -> T:
    """Run ``action`` and turn every way in which a damaged file can fail into one LdmError."""
    try:
        return action()
    except LdmError:
        raise
    except READ_ERRORS as error:
        state = "larger than the memory, or damaged" if isinstance(error, MemoryError) else _DAMAGED
        raise LdmError(
            f"{path}: cannot be read as {what} ({cause(error)}). The file is {state}; copy or export it again."
        ) from error


def cause(error: Exception) -> str:
    """First line of what an exception says; its type where that alone tells something."""
    text = next(iter(str(error).strip().splitlines()), "")
    if text and not isinstance(error, LookupError):
        return text
    return f"{type(error).__name__} {text}".strip()


# NIfTI ------------------------------------------------------------------------------------------------


def _open_nifti(path: Path) -> nib.Nifti1Image:
    nifti = _attempt(path, "NIfTI", lambda: nib.load(path, mmap=False))
    if not isinstance(nifti, nib.Nifti1Image | nib.Nifti1Pair):
        raise LdmError(f"{path}: holds {type(nifti).__name__}, not NIfTI. Convert it to .nii.gz.")
    dtype = nifti.get_data_dtype()
    if dtype.kind not in "iufb":
        raise LdmError(f"{path}: stores {dtype} voxels. Only integers and floats are read; convert it first.")
    _expect_to_fit(path, nifti)
    return nifti


def _expect_to_fit(path: Path, nifti: nib.Nifti1Image) -> None:
    """Refuse a header that claims more voxels than the file can hold, before memory is set aside for them."""
    claimed = math.prod(nifti.shape) * nifti.get_data_dtype().itemsize
    size = path.stat().st_size
    held = size * _GZIP_EXPANSION if _suffix(path) == ".nii.gz" else size - int(nifti.dataobj.offset)
    if claimed > held:
        shape = " x ".join(map(str, nifti.shape))
        raise LdmError(
            f"{path}: the header claims {shape} voxels ({claimed} bytes), but the file holds at most {max(held, 0)}. "
            "The file is damaged or incomplete; copy or export it again."
        )


def _nifti_shape(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    """Spatial shape (i, j, k) and number of channels of a NIfTI file with 2 to 5 axes."""
    spatial = (*shape[:3], 1, 1)[:3]
    rest = [size for size in shape[3:] if size != 1]
    if len(rest) > 1 or len(shape) < 2 or min(shape) < 1:
        raise LdmError(f"{path}: has shape {tuple(shape)}; expected (i, j, k) or (i, j, k, channels).")
    return tuple(int(size) for size in spatial), int(rest[0]) if rest else 1


def affine_mm(nifti: nib.Nifti1Image) -> np.ndarray:
    """The affine that nibabel decides on, in mm whatever unit the header has.

    Raises HeaderDataError for a code of units that NIfTI does not have.
    """
    try:
        unit = nifti.header.get_xyzt_units()[0]
    except KeyError as error:
        code = int(nifti.header["xyzt_units"])
        raise HeaderDataError(f"xyzt_units is {code}, which stands for no units") from error
    affine = np.array(nifti.affine, dtype=np.float64)
    affine[:3] *= _MM_PER_UNIT.get(unit, 1.0)
    return affine


def spans_space(affine: np.ndarray) -> bool:
    """Whether a (4, 4) affine in mm gives voxels a size along three directions that can be told apart."""
    if not np.isfinite(affine).all():
        return False
    # 1e-9 mm3 is far below any voxel, so only a truly flat grid is refused. Axes that almost coincide have no codes.
    sized = 1e-9 <= abs(np.linalg.det(affine[:3, :3])) < np.inf
    return bool(sized and not np.isnan(nib.io_orientation(affine)).any())


def _nifti_affine(path: Path, nifti: nib.Nifti1Image) -> np.ndarray:
    """Voxel index to world (RAS+) in mm: sform, else qform, else voxel sizes (as nibabel decides)."""
    affine = _attempt(path, "NIfTI", lambda: affine_mm(nifti))
    if not spans_space(affine):
        raise LdmError(
            f"{path}: the affine has no inverse (zero or non-finite voxel size):\n{affine}\n"
            "Mend the header's sform/qform or convert the scan again."
        )
    return affine


def _nifti_facts(path: Path, nifti: nib.Nifti1Image) -> dict[str, Any]:
    affine = _nifti_affine(path, nifti)
    return {
        "path": str(path),
        "format": "nifti",
        "dtype": str(nifti.get_data_dtype()),
        "axcodes": "".join(code or "?" for code in nib.aff2axcodes(affine)),
        "spacing": tuple(float(size) for size in nib.affines.voxel_sizes(affine)),
        "sform_code": int(nifti.header["sform_code"]),
        "qform_code": int(nifti.header["qform_code"]),
    }


def _read_nifti(path: Path, selector: str | None, spatial_dims: int | None) -> Image:
    if selector is not None:
        stat = path.stat()
        ras, facts = _ras_volume(path, stat.st_mtime_ns, stat.st_size)
        return Image(_nifti_slice(path, ras, selector), None, facts)
    image = _nifti_volume(path)
    if spatial_dims == 2 and 1 in image.array.shape[1:]:
        ras = _to_ras(image.array, image.affine)
        facts = image.facts | {"volume": _ras_grid(image.array.shape[1:], image.affine)}
        return Image(_upright(np.take(ras, 0, axis=ras.shape.index(1, 1))), None, facts)
    return image


def _nifti_volume(path: Path) -> Image:
    nifti = _open_nifti(path)
    shape, channels = _nifti_shape(path, nifti.shape)
    affine, facts = _nifti_affine(path, nifti), _nifti_facts(path, nifti)
    # nibabel applies slope and intercept in float64 and leaves unscaled integers as they are, so that
    # integer labels and large intensities are rounded once at most, to float32.
    array = _attempt(path, "NIfTI", lambda: _channels_first(np.asanyarray(nifti.dataobj), shape, channels))
    return Image(array, affine, facts)


def _channels_first(stored: np.ndarray, shape: tuple[int, int, int], channels: int) -> np.ndarray:
    """(I, J, K[, 1][, C]) -> (C, I, J, K), float32."""
    return np.ascontiguousarray(np.moveaxis(stored.reshape(*shape, channels), -1, 0).astype(np.float32))


# A compressed volume can only be read whole: the last ones are kept, so that reading slice after slice of the channels
# of a subject does not read each volume once a slice. The stat values make an overwritten file a new entry.
@functools.lru_cache(maxsize=8)
def _ras_volume(path: Path, mtime_ns: int, size: int) -> tuple[np.ndarray, dict[str, Any]]:
    image = _nifti_volume(path)
    ras = _to_ras(image.array, image.affine)
    ras.flags.writeable = False
    return ras, image.facts | {"volume": _ras_grid(image.array.shape[1:], image.affine)}


def _nifti_slice(path: Path, ras: np.ndarray, selector: str) -> np.ndarray:
    """One slice (C, H, W): top is superior (axial: anterior), left is patient left (sagittal: posterior)."""
    match = re.fullmatch(r"(\w+)\[(\d+)\]", selector)
    if not match or match[1] not in PLANES:
        hint = nearest(match[1], PLANES) if match else ""
        raise LdmError(
            f"{path}{SEPARATOR}{selector}: not a slice of a volume.{hint} "
            "Legal: sagittal[i], coronal[j], axial[k], counted from left, posterior, inferior."
        )
    axis, index = PLANES[match[1]], int(match[2])
    if index >= ras.shape[axis + 1]:
        raise LdmError(
            f"{path}{SEPARATOR}{selector}: there is no such slice; {match[1]} runs from 0 to {ras.shape[axis + 1] - 1}."
        )
    return _upright(np.take(ras, index, axis=axis + 1))


def _to_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    orientation = nib.io_orientation(affine)
    return np.stack([nib.apply_orientation(channel, orientation) for channel in array])


def _ras_grid(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], list[list[float]]]:
    """Shape and affine of a volume whose axes are flipped and permuted as `_to_ras` does."""
    orientation = nib.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    ras = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    return tuple(shape[axis] for axis in order), ras.tolist()


def _upright(plane: np.ndarray) -> np.ndarray:
    """(C, first axis, second axis) of a RAS slice -> (C, H, W) with the second axis pointing up."""
    return np.ascontiguousarray(np.rot90(plane, axes=(1, 2)))


# pictures ---------------------------------------------------------------------------------------------


def _read_picture(path: Path, selector: str | None) -> Image:
    if selector is not None:
        raise LdmError(f"{path}{SEPARATOR}{selector}: a picture has no selector; remove '{SEPARATOR}{selector}'.")
    pixels, mode = _attempt(path, "a PNG, JPEG or TIFF picture", lambda: _picture_pixels(path))
    array = pixels[None] if mode in _GREY_MODES else np.moveaxis(pixels, -1, 0)
    facts = {"path": str(path), "format": "picture", "dtype": str(pixels.dtype), "mode": mode}
    return Image(np.ascontiguousarray(array, dtype=np.float32), None, facts)


def _picture_pixels(path: Path) -> tuple[np.ndarray, str]:
    try:
        with PIL.Image.open(path, formats=("PNG", "JPEG", "TIFF")) as picture:
            if getattr(picture, "n_frames", 1) != 1:
                raise LdmError(f"{path}: has {picture.n_frames} frames; store one picture a file, or a NIfTI volume.")
            if picture.mode not in (*_GREY_MODES, "RGB"):
                raise LdmError(
                    f"{path}: has colour mode '{picture.mode}'. Only grey and RGB are read, and nothing is "
                    "converted silently; save it as grey ('L') or 'RGB'."
                )
            return np.asarray(picture), picture.mode
    except PIL.Image.DecompressionBombError as error:
        raise LdmError(
            f"{path}: is larger than Pillow's safety limit ({error}). Cut it into smaller pictures."
        ) from error


# NumPy arrays -----------------------------------------------------------------------------------------


def _read_numpy(path: Path, selector: str | None, spatial_dims: int | None) -> Image:
    key, indices, packed = _numpy_selector(path, selector)
    stat = path.stat()
    stored = _attempt(
        path, "a NumPy array", lambda: _load_numpy(str(path), stat.st_mtime_ns, stat.st_size, key or None)
    )
    if len(indices) > stored.ndim or any(index >= size for index, size in zip(indices, stored.shape, strict=False)):
        row = ",".join(map(str, indices))
        raise LdmError(f"{path}{SEPARATOR}{selector}: there is no row {row}; the array has shape {stored.shape}.")
    stored = stored[indices]
    if packed:
        if stored.dtype != np.uint8:
            raise LdmError(f"{path}{SEPARATOR}{selector}: unpackbits needs uint8, not {stored.dtype}.")
        stored = np.unpackbits(np.ascontiguousarray(stored), axis=-1)
    array = _channel_first(f"{path}{SEPARATOR}{selector}" if selector else str(path), stored, spatial_dims)
    facts = {"path": str(path), "format": "numpy", "dtype": str(stored.dtype)}
    return Image(np.ascontiguousarray(array, dtype=np.float32), None, facts)


def _numpy_selector(path: Path, selector: str | None) -> tuple[str, tuple[int, ...], bool]:
    """``unpackbits(key[row,channel])`` -> key, what is written of row and channel, whether the bits are packed."""
    packed = re.fullmatch(r"unpackbits\((.*)\)", selector or "")
    match = re.fullmatch(r"([^\[\]()]*?)(?:\[(\d+(?:,\d+)?)\])?", packed[1] if packed else selector or "")
    is_npz = _suffix(path) == ".npz"
    if match is None or bool(match[1]) != is_npz:
        form = "'file.npz::key[row]' or 'file.npz::key'" if is_npz else "'file.npy::[row]' or 'file.npy'"
        raise LdmError(f"{path}: selector '{selector or ''}' does not fit. Write {form}.")
    indices = () if match[2] is None else tuple(int(index) for index in match[2].split(","))
    return match[1], indices, packed is not None


# An .npz member can only be decompressed whole: the last ones are kept, so that reading row after row
# does not decompress the file once a row. The stat values make an overwritten file a new entry.
@functools.lru_cache(maxsize=2)
def _load_numpy(path: str, mtime_ns: int, size: int, key: str | None) -> np.ndarray:
    """The array of an ``.npy`` (memory-mapped) or one member of an ``.npz``; never unpickles."""
    if key is None:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise LdmError(f"{path}: is an .npz archive with the name of an .npy file; rename it.")
        return _numeric(path, array)
    archive = np.load(path, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise LdmError(f"{path}: is an .npy array with the name of an .npz archive; rename it.")
    with archive:
        if key not in archive.files:
            raise LdmError(
                f"{path}: has no array '{key}'.{nearest(key, archive.files)} It holds: {', '.join(archive.files)}."
            )
        return _numeric(path, archive[key])


def _numeric(path: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iufb":
        raise LdmError(f"{path}: holds {array.dtype} values. Only integers, floats and booleans are read.")
    array.flags.writeable = False
    return array


def _channel_first(name: str, array: np.ndarray, spatial_dims: int | None) -> np.ndarray:
    if spatial_dims is None:
        channels = array.ndim == 4 or (array.ndim == 3 and array.shape[0] <= 4)
        spatial_dims = array.ndim - 1 if channels else array.ndim
    if spatial_dims not in (2, 3) or array.ndim not in (spatial_dims, spatial_dims + 1) or 0 in array.shape:
        raise LdmError(
            f"{name}: has shape {array.shape}; a {spatial_dims}-D image has {spatial_dims} axes, "
            "with channels first if there are several. Select one row with '::key[row]'."
        )
    if array.ndim == spatial_dims:
        return array[None]
    if array.shape[0] > 4 >= array.shape[-1]:
        raise LdmError(f"{name}: has shape {array.shape}, which looks channel-last. Store it channel-first, (C, H, W).")
    return array
