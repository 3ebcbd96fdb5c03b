"""What image files have in common: how they are named, what is read of them, and how reading them fails."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from ldm.errors import LdmError

SEPARATOR = "::"
NIFTI_SUFFIXES = (".nii", ".nii.gz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
NUMPY_SUFFIXES = (".npy", ".npz")
SUFFIXES = NIFTI_SUFFIXES + PICTURE_SUFFIXES + NUMPY_SUFFIXES

T = TypeVar("T")

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


def suffix_of(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def attempt(path: Path, what: str, action: Callable[[], T]) -> T:
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
