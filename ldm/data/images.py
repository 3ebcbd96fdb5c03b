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
import os
import re
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image

from ldm.data import nifti
from ldm.data.stored import (
    NIFTI_SUFFIXES,
    PICTURE_SUFFIXES,
    SEPARATOR,
    SUFFIXES,
    Header,
    Image,
    attempt,
    split_reference,
    suffix_of,
)
from ldm.errors import LdmError, nearest

_GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B")


def read(ref: str | Path, root: str | Path | None = None, spatial_dims: int | None = None) -> Image:
    """Read the image that ``ref`` names (see the table at the top of this module).

    spatial_dims: 2 or 3. It settles what a 3-axis NumPy array is, (C, H, W) or (D, H, W), and lets a
        NIfTI file of one slice count as 2-D. Without it a 3-axis NumPy array whose first axis is at
        most 4 long is taken as channels.

    Raises LdmError when the file is missing, damaged, of another kind, or the selector does not fit.
    """
    path, selector = _existing(ref, root)
    suffix = suffix_of(path)
    if suffix in NIFTI_SUFFIXES:
        return nifti.read(path, selector, spatial_dims)
    if suffix in PICTURE_SUFFIXES:
        return _read_picture(path, selector)
    return _read_numpy(path, selector, spatial_dims)


def read_header(ref: str | Path, root: str | Path | None = None, spatial_dims: int | None = None) -> Header:
    """Shape and affine of ``ref``; cheap for whole NIfTI volumes, whose voxels are not read.

    Raises LdmError like `read`.
    """
    path, selector = _existing(ref, root)
    if suffix_of(path) not in NIFTI_SUFFIXES or selector is not None or spatial_dims == 2:
        image = read(ref, root, spatial_dims)
        return Header(image.array.shape, image.affine, image.facts)
    return nifti.read_header(path)


def write(path: str | Path, image: nib.Nifti1Image | np.ndarray) -> Path:
    """Write a NIfTI image (``.nii``, ``.nii.gz``), a uint8 picture (``.png``) or any array (``.npy``).

    The file appears whole or not at all: a temporary file in the same folder is moved into place.
    """
    path = Path(path)
    suffix = suffix_of(path)
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


def _existing(ref: str | Path, root: str | Path | None) -> tuple[Path, str | None]:
    path, selector = split_reference(ref, root)
    if suffix_of(path) not in SUFFIXES:
        raise LdmError(f"{path}: unknown image format '{suffix_of(path)}'. Legal: {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise LdmError(f"{path}: is a folder, not an image file.")
    if not path.is_file():
        raise LdmError(f"{path}: no such file.{_similar_name(path)} Check data.root and data.image.")
    return path, selector


def _similar_name(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    return nearest(path.name, (entry.name for entry in path.parent.iterdir()))


# pictures ---------------------------------------------------------------------------------------------


def _read_picture(path: Path, selector: str | None) -> Image:
    if selector is not None:
        raise LdmError(f"{path}{SEPARATOR}{selector}: a picture has no selector; remove '{SEPARATOR}{selector}'.")
    pixels, mode = attempt(path, "a PNG, JPEG or TIFF picture", lambda: _picture_pixels(path))
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
    stored = attempt(path, "a NumPy array", lambda: _load_numpy(str(path), stat.st_mtime_ns, stat.st_size, key or None))
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
    is_npz = suffix_of(path) == ".npz"
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
