"""Slices of a NIfTI volume put back where they were cut out: the way back from ``FILE.nii.gz::axial[40]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ldm.data.images import read, read_header
from ldm.data.nifti import PLANES, in_space
from ldm.data.stored import NIFTI_SUFFIXES, split_reference


@dataclass(frozen=True)
class Cut:
    """Where a slice was cut out: a NIfTI file, a plane of :data:`ldm.data.nifti.PLANES`, and its number across it."""

    path: Path
    plane: str
    index: int

    @classmethod
    def of(cls, ref: str) -> Cut | None:
        """Of a reference to an image; None where it is no slice of a NIfTI file."""
        path, selector = split_reference(ref)
        match = re.fullmatch(r"(\w+)\[(\d+)\]", selector or "")
        if match is None or match[1] not in PLANES or not path.name.lower().endswith(NIFTI_SUFFIXES):
            return None
        return cls(path, match[1], int(match[2]))

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the slice's rows and columns, from row to row first, and across it.

        Raises:
            LdmError: the file cannot be read.
        """
        header, axis = read_header(self.path), PLANES[self.plane]
        sizes = np.array(header.facts["spacing"])[_ras_order(header.affine)]  # of left-right, back-front, feet-head
        first, second = (sizes[other] for other in range(3) if other != axis)
        return float(second), float(first), float(sizes[axis])  # images.read turns the second axis upright


def put_back(
    path: Path, plane: str, slices: Mapping[int, np.ndarray], fill: float | np.ndarray = 0.0, labels: bool = False
) -> nib.Nifti1Image:
    """A volume on the grid of the file that slices were cut from, with the slices in their places.

    Args:
        path: the file.
        plane: which way they were cut.
        slices: number -> ``(C, H, W)`` as :func:`ldm.data.images.read` gives slices, at full resolution.
        fill: what stands where none of them is: a value, or those of a volume ``(C, I, J, K)`` along the axes of the
            file.
        labels: whether the values are classes.

    Returns:
        ``(I, J, K)``, or ``(I, J, K, C)`` of several channels, along the axes of the file and with its affine.
    """
    header, first = read_header(path), next(iter(slices.values()))
    orientation, axis = nib.io_orientation(header.affine), PLANES[plane]
    shape = tuple(header.shape[1:][stored] for stored in _ras_order(header.affine))  # along left, back, feet first
    if isinstance(fill, np.ndarray):
        fill = np.stack([nib.apply_orientation(channel, orientation) for channel in fill])  # (C, *RAS)
    ras = np.full((len(first), *shape), fill, first.dtype)  # (C, *RAS)
    for index, one in slices.items():
        ras[(slice(None), *(index if i == axis else slice(None) for i in range(3)))] = np.rot90(one, -1, axes=(1, 2))
    back = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), orientation)
    stored = np.stack([nib.apply_orientation(channel, back) for channel in ras])  # (C, I, J, K)
    code = int(header.facts["sform_code"] or header.facts["qform_code"])
    return in_space(stored, header.affine, code, labels)


def is_volume(ref: str) -> bool:
    """Whether a reference is to a whole NIfTI file of several slices, of which each could be a 2-D image.

    Raises:
        LdmError: the file cannot be read.
    """
    path, selector = split_reference(ref)
    whole = selector is None and path.name.lower().endswith(NIFTI_SUFFIXES)
    return whole and 1 not in read_header(path).shape[1:]


def count_slices(path: Path, plane: str) -> int:
    """How many slices a volume has across a plane.

    Raises:
        LdmError: the file cannot be read.
    """
    header = read_header(path)
    return header.shape[1:][_ras_order(header.affine)[PLANES[plane]]]


def told_slices(path: Path, plane: str) -> list[int]:
    """Numbers of the slices of a volume that show something: in the others every voxel is the same.

    Raises:
        LdmError: the file cannot be read.
    """
    volume = read(path)
    orientation = nib.io_orientation(volume.affine)
    ras = np.stack([nib.apply_orientation(channel, orientation) for channel in volume.array])  # (C, *RAS)
    across = tuple(axis for axis in range(4) if axis != PLANES[plane] + 1)
    return np.flatnonzero(ras.max(across) > ras.min(across)).tolist()


def _ras_order(affine: np.ndarray) -> np.ndarray:
    """Which stored axis runs from left to right, from back to front, from feet to head."""
    return np.argsort(nib.io_orientation(affine)[:, 0])
