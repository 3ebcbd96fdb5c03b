"""Read NIfTI files and slices of them, and make NIfTI images of arrays."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

import ldm
from ldm.data.stored import SEPARATOR, Header, Image, attempt, suffix_of
from ldm.errors import LdmError, nearest

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}

_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
# Deflate puts 258 bytes into 2 bits at best, so that no file holds more than this many times its size.
_GZIP_EXPANSION = 1032


def read(path: Path, selector: str | None, spatial_dims: int | None) -> Image:
    """A volume, or the slice of it that ``selector`` names; see :func:`ldm.data.images.read`."""
    if selector is not None:
        stat = path.stat()
        ras, facts = _ras_volume(path, stat.st_mtime_ns, stat.st_size)
        return Image(_slice(path, ras, selector), None, facts)
    image = _volume(path)
    if spatial_dims == 2 and 1 in image.array.shape[1:]:
        ras = _to_ras(image.array, image.affine)
        facts = image.facts | {"volume": _ras_grid(image.array.shape[1:], image.affine)}
        return Image(_upright(np.take(ras, 0, axis=ras.shape.index(1, 1))), None, facts)
    return image


def read_header(path: Path) -> Header:
    """What the header tells; no voxel is read."""
    nifti = _open(path)
    shape, channels = _shape(path, nifti.shape)
    return Header((channels, *shape), _affine(path, nifti), _facts(path, nifti))


def _open(path: Path) -> nib.Nifti1Image:
    nifti = attempt(path, "NIfTI", lambda: nib.load(path, mmap=False))
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
    held = size * _GZIP_EXPANSION if suffix_of(path) == ".nii.gz" else size - int(nifti.dataobj.offset)
    if claimed > held:
        shape = " x ".join(map(str, nifti.shape))
        raise LdmError(
            f"{path}: the header claims {shape} voxels ({claimed} bytes), but the file holds at most {max(held, 0)}. "
            "The file is damaged or incomplete; copy or export it again."
        )


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
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


def _affine(path: Path, nifti: nib.Nifti1Image) -> np.ndarray:
    """Voxel index to world (RAS+) in mm: sform, else qform, else voxel sizes (as nibabel decides)."""
    affine = attempt(path, "NIfTI", lambda: affine_mm(nifti))
    if not spans_space(affine):
        raise LdmError(
            f"{path}: the affine has no inverse (zero or non-finite voxel size):\n{affine}\n"
            "Mend the header's sform/qform or convert the scan again."
        )
    return affine


def _facts(path: Path, nifti: nib.Nifti1Image) -> dict[str, Any]:
    affine = _affine(path, nifti)
    return {
        "path": str(path),
        "format": "nifti",
        "dtype": str(nifti.get_data_dtype()),
        "axcodes": "".join(code or "?" for code in nib.aff2axcodes(affine)),
        "spacing": tuple(float(size) for size in nib.affines.voxel_sizes(affine)),
        "sform_code": int(nifti.header["sform_code"]),
        "qform_code": int(nifti.header["qform_code"]),
    }


def _volume(path: Path) -> Image:
    nifti = _open(path)
    shape, channels = _shape(path, nifti.shape)
    affine, facts = _affine(path, nifti), _facts(path, nifti)
    # nibabel applies slope and intercept in float64 and leaves unscaled integers as they are, so that
    # integer labels and large intensities are rounded once at most, to float32.
    array = attempt(path, "NIfTI", lambda: _channels_first(np.asanyarray(nifti.dataobj), shape, channels))
    return Image(array, affine, facts)


def _channels_first(stored: np.ndarray, shape: tuple[int, int, int], channels: int) -> np.ndarray:
    """(I, J, K[, 1][, C]) -> (C, I, J, K), float32."""
    return np.ascontiguousarray(np.moveaxis(stored.reshape(*shape, channels), -1, 0).astype(np.float32))


# A compressed volume can only be read whole: the last ones are kept, so that reading slice after slice of the channels
# of a subject does not read each volume once a slice. The stat values make an overwritten file a new entry.
@functools.lru_cache(maxsize=8)
def _ras_volume(path: Path, mtime_ns: int, size: int) -> tuple[np.ndarray, dict[str, Any]]:
    image = _volume(path)
    ras = _to_ras(image.array, image.affine)
    ras.flags.writeable = False
    return ras, image.facts | {"volume": _ras_grid(image.array.shape[1:], image.affine)}


def _slice(path: Path, ras: np.ndarray, selector: str) -> np.ndarray:
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


def in_space(array: np.ndarray, affine: np.ndarray | None, code: int, labels: bool = False) -> nib.Nifti1Image:
    """An array as a NIfTI image in mm.

    Args:
        array: (C, I, J, K) along the axes of the file.
        affine: (4, 4) voxel index to world (RAS+); None where it is not known.
        code: what that world is, for sform and qform alike.
        labels: whether the values are classes.

    Returns:
        (I, J, K) of one channel, (I, J, K, C) of several.
    """
    image = nib.Nifti1Image(channels_last(array), np.eye(4) if affine is None else np.array(affine))
    # Code 0 says that the place in space is unknown, which is the truth about an array without an affine.
    code = 0 if affine is None else code
    image.set_sform(image.affine, code=code)
    image.set_qform(image.affine, code=code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"ldm {ldm.__version__} {'labels' if labels else 'image'}".encode()
    if labels:
        image.header.set_intent("label")
    return image


def channels_last(array: np.ndarray) -> np.ndarray:
    """(C, *S) -> (*S) for one channel, (*S, C) for several."""
    return array[0] if len(array) == 1 else np.ascontiguousarray(np.moveaxis(array, 0, -1))
