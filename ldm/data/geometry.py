"""Where voxels are: from the grid of a file to the model's grid and back.

On the way in a volume is reoriented, resampled to the model's spacing and centre-cropped or padded to the
model's shape. A `Geometry` records the three steps, tells the affine after them, and undoes them, so that
what a model produces lies on the original grid again: same shape, affine, orientation and spacing.

Pictures and slices (2-D) have no affine: their pixels have side 1, and only resampling and the crop/pad box apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from ldm.errors import LdmError

# A spacing that differs by less is the same spacing written with fewer digits; resampling would only blur.
SPACING_TOLERANCE = 1e-3
# NIfTI's "aligned to something": the code for files that do not say which world they are in.
ALIGNED = 2
_WORLD_AXIS = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}

Affine = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Geometry:
    """One file's grid and how it maps onto the model's grid.

    original_shape:  spatial shape of the file, (I, J, K) or (H, W).
    shape:           spatial shape of the model's grid.
    original_affine: (4, 4) voxel index to world (RAS+) in mm; None for 2-D.
    orientation:     axis codes of the model's grid, e.g. ``RAS``; None keeps the file's axes.
    spacing:         voxel size of the model's grid in mm along its axes (2-D: in file pixels); None keeps the file's.
    space_code:      NIfTI code of the world the affine leads to (1 scanner, 2 aligned, 3 Talairach, 4 MNI).
    """

    original_shape: tuple[int, ...]
    shape: tuple[int, ...]
    original_affine: Affine | None = None
    orientation: str | None = None
    spacing: tuple[float, ...] | None = None
    space_code: int = ALIGNED

    @classmethod
    def plan(
        cls,
        original_shape: Sequence[int],
        original_affine: np.ndarray | Sequence[Sequence[float]] | None = None,
        orientation: str | None = None,
        spacing: float | Sequence[float] | None = None,
        shape: Sequence[int] | None = None,
        space_code: int | None = None,
    ) -> Geometry:
        """Describe the way in for one file; ``shape=None`` neither crops nor pads.

        Raises LdmError for axis codes, spacing or shape that do not fit the number of axes.
        """
        ndim = len(original_shape)
        if original_affine is None and (orientation is not None or (spacing is not None and ndim == 3)):
            raise LdmError("orientation and spacing_mm need an affine; set both to null for images without one.")
        if shape is not None and len(shape) != ndim:
            raise LdmError(f"shape {list(shape)} has {len(shape)} axes, but the images have {ndim}.")
        planned = cls(
            original_shape=tuple(int(size) for size in original_shape),
            shape=tuple(int(size) for size in (shape if shape is not None else original_shape)),
            original_affine=None if original_affine is None else _as_tuples(original_affine),
            orientation=None if orientation is None else checked_axcodes(orientation),
            spacing=None if spacing is None else checked_spacing(spacing, ndim),
            space_code=space_code or ALIGNED,
        )
        return planned if shape is not None else planned.with_shape(planned.resampled_shape)

    def with_shape(self, shape: Sequence[int]) -> Geometry:
        """The same way in, cropped or padded to another model shape."""
        return replace(self, shape=tuple(int(size) for size in shape))

    # the three steps ----------------------------------------------------------------------------------

    @cached_property
    def _orientation_change(self) -> np.ndarray | None:
        """nibabel orientation array, (3, 2): where each file axis goes, and whether it is flipped."""
        if self.original_affine is None or self.orientation is None:
            return None
        stored = nib.io_orientation(np.array(self.original_affine))
        return nib.orientations.ornt_transform(stored, nib.orientations.axcodes2ornt(self.orientation))

    @cached_property
    def _oriented_shape(self) -> tuple[int, ...]:
        change = self._orientation_change
        if change is None:
            return self.original_shape
        shape = [0] * len(self.original_shape)
        for axis, (target, _) in enumerate(change):
            shape[int(target)] = self.original_shape[axis]
        return tuple(shape)

    @cached_property
    def _oriented_affine(self) -> np.ndarray | None:
        if self.original_affine is None:
            return None
        affine = np.array(self.original_affine)
        change = self._orientation_change
        return affine if change is None else affine @ nib.orientations.inv_ornt_aff(change, self.original_shape)

    @cached_property
    def _ratio(self) -> tuple[float, ...]:
        """New voxel size over old one, per axis of the model's grid; 1 where nothing is resampled."""
        if self.spacing is None:
            return (1.0,) * len(self.original_shape)
        known = self._oriented_affine is not None
        ratios = np.array(self.spacing) / (nib.affines.voxel_sizes(self._oriented_affine) if known else 1.0)
        return tuple(1.0 if abs(ratio - 1.0) < SPACING_TOLERANCE else float(ratio) for ratio in ratios)

    @cached_property
    def resampled_shape(self) -> tuple[int, ...]:
        """Shape after reorientation and resampling: the field of view in new voxels, rounded."""
        pairs = zip(self._oriented_shape, self._ratio, strict=True)
        return tuple(max(1, round(size / ratio)) for size, ratio in pairs)

    @cached_property
    def _box_start(self) -> tuple[int, ...]:
        """Index, on the resampled grid, of the model grid's first voxel; negative where it is padded."""
        pairs = zip(self.resampled_shape, self.shape, strict=True)
        return tuple((size - target) // 2 for size, target in pairs)

    @cached_property
    def affine(self) -> np.ndarray | None:
        """(4, 4) model voxel index to world (RAS+) in mm; None for 2-D."""
        if self._oriented_affine is None:
            return None
        resample = np.eye(4)
        for axis, (old, new, ratio) in enumerate(
            zip(self._oriented_shape, self.resampled_shape, self._ratio, strict=True)
        ):
            resample[axis, axis] = ratio
            resample[axis, 3] = _first_centre(old, new, ratio)
        return self._oriented_affine @ resample @ nib.affines.from_matvec(np.eye(3), self._box_start)

    @property
    def crops(self) -> bool:
        """Whether any voxel of the file falls outside the model's grid."""
        return any(size > target for size, target in zip(self.resampled_shape, self.shape, strict=True))

    def forward(self, array: np.ndarray, labels: bool = False, fill: float = 0.0) -> np.ndarray:
        """Bring ``array`` (C, *original_shape) onto the model's grid: (C, *shape), same dtype.

        Images are interpolated linearly after an anti-aliasing filter. Labels take the nearest voxel; where voxels
        become larger, each label is resampled like an image and the largest share wins. ``fill`` is the value of
        padding.
        """
        self._expect(array, self.original_shape)
        if self._orientation_change is not None:
            array = _reoriented(array, self._orientation_change)
        array = _resampled(array, self.resampled_shape, self._ratio, labels)
        return _boxed(array, self._box_start, self.shape, fill)

    def undo(self, array: np.ndarray, labels: bool = False, fill: float = 0.0) -> np.ndarray:
        """Bring ``array`` (C, *shape) from the model's grid back onto the file's: (C, *original_shape).

        Voxels of the file that the model's grid does not hold become ``fill``.
        """
        self._expect(array, self.shape)
        array = _boxed(array, tuple(-start for start in self._box_start), self.resampled_shape, fill)
        array = _resampled(array, self._oriented_shape, tuple(1 / ratio for ratio in self._ratio), labels)
        if self._orientation_change is not None:
            back = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt(self.orientation),
                nib.io_orientation(np.array(self.original_affine)),
            )
            array = _reoriented(array, back)
        return array

    @staticmethod
    def _expect(array: np.ndarray, shape: tuple[int, ...]) -> None:
        if array.shape[1:] != shape:
            raise LdmError(f"an array of shape {array.shape} does not lie on the grid (C, {_text(shape, ', ')}).")

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe description; `from_dict` restores it exactly."""
        affine = self.original_affine
        return {
            "original_shape": list(self.original_shape),
            "shape": list(self.shape),
            "original_affine": affine and [list(row) for row in affine],
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "space_code": self.space_code,
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Geometry:
        """Inverse of `to_dict`."""
        return cls.plan(**description)


# shapes -----------------------------------------------------------------------------------------------


def per_axis(multiple: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """One factor per axis from an int or a sequence of ``ndim`` ints."""
    factors = (multiple,) * ndim if isinstance(multiple, int) else tuple(int(factor) for factor in multiple)
    if len(factors) != ndim or min(factors) < 1:
        raise LdmError(f"multiple {multiple} must be a positive integer, or {ndim} of them, one per axis.")
    return factors


def smallest_shape(shapes: Iterable[Sequence[int]], multiple: int | Sequence[int]) -> tuple[int, ...]:
    """The smallest legal shape (each axis a multiple) that holds every one of ``shapes``."""
    largest = np.max(list(shapes), axis=0)
    factors = per_axis(multiple, len(largest))
    return tuple(math.ceil(int(size) / factor) * factor for size, factor in zip(largest, factors, strict=True))


def check_shape(shape: Sequence[int], multiple: int | Sequence[int], name: str = "data.shape") -> tuple[int, ...]:
    """Return ``shape`` if each axis is a positive multiple, else raise LdmError with the nearest sizes."""
    factors = per_axis(multiple, len(shape))
    hints = []
    for axis, (size, factor) in enumerate(zip(shape, factors, strict=True)):
        if size < 1 or size % factor:
            below, above = size // factor * factor, -(-size // factor) * factor
            legal = [str(legal) for legal in dict.fromkeys((below, above)) if legal > 0] or [str(factor)]
            hints.append(f"axis {axis}: {size} is not a multiple of {factor}, nearest legal: {' or '.join(legal)}")
    if hints:
        raise LdmError(f"{name}: {_text(shape)} does not suit the networks. {'; '.join(hints)}.")
    return tuple(int(size) for size in shape)


def checked_axcodes(orientation: str) -> str:
    """Return three axis codes such as ``RAS`` in capitals, or raise LdmError."""
    codes = str(orientation).upper()
    if sorted(_WORLD_AXIS.get(code, -1) for code in codes) != [0, 1, 2]:
        raise LdmError(
            f"data.orientation: '{orientation}' is no orientation. Write three letters in the order of the "
            "array axes, one of L/R, one of P/A, one of I/S, e.g. RAS."
        )
    return codes


def checked_spacing(spacing: float | Sequence[float], ndim: int = 3) -> tuple[float, ...]:
    """Voxel size in mm per axis from one number or ``ndim`` of them."""
    sizes = (spacing,) * ndim if isinstance(spacing, int | float) else tuple(spacing)
    if len(sizes) != ndim or not all(isinstance(size, int | float) and 0 < size < math.inf for size in sizes):
        raise LdmError(f"data.spacing_mm: {spacing} must be a positive number of mm, or {ndim} of them.")
    return tuple(float(size) for size in sizes)


# array steps ------------------------------------------------------------------------------------------


def _reoriented(array: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Permute and flip the spatial axes of (C, I, J, K)."""
    return np.stack([nib.apply_orientation(channel, change) for channel in array])


def _first_centre(old: int, new: int, ratio: float) -> float:
    """Old-grid coordinate of the new grid's first voxel centre; both fields of view share their centre."""
    return (old - 1) / 2 - ratio * (new - 1) / 2


def _resampled(array: np.ndarray, shape: tuple[int, ...], ratio: Sequence[float], labels: bool) -> np.ndarray:
    """Resample (C, *S) to (C, *shape); ``ratio`` is new voxel size over old one."""
    if all(factor == 1.0 for factor in ratio):
        return array
    offset = [_first_centre(old, new, r) for old, new, r in zip(array.shape[1:], shape, ratio, strict=True)]
    output = np.zeros((len(array), *shape), dtype=array.dtype)
    for channel, result in zip(array, output, strict=True):
        if labels and max(ratio) > 1:
            _resample_labels(channel, result, ratio, offset)
        elif labels:
            ndimage.affine_transform(channel, np.array(ratio), offset, shape, output=result, order=0, mode="nearest")
        else:
            smooth = _antialiased(channel, ratio)
            ndimage.affine_transform(smooth, np.array(ratio), offset, shape, output=result, order=1, mode="nearest")
    return output


def _resample_labels(labels: np.ndarray, output: np.ndarray, ratio: Sequence[float], offset: Sequence[float]) -> None:
    """Fill ``output``, zeros, with the label of the largest share in each new voxel, and any rather than 0 at a tie.

    The nearest label does for voxels that are no larger. Of two that are as near, as where the size doubles, it is
    always the one on the same side: the map would move by half an old voxel.
    """
    best, total = np.zeros(output.shape, np.float32), np.zeros(output.shape, np.float32)
    reach = [2 + math.ceil(4 * sigma) for sigma in _sigmas(ratio)]  # beyond it a label has no share
    for label, found in enumerate(ndimage.find_objects(labels.astype(np.int32)), 1):
        if found is None:
            continue
        spans = [
            _span(one, *rest)
            for one, *rest in zip(found, reach, labels.shape, output.shape, ratio, offset, strict=True)
        ]
        box, target, start = (tuple(span[k] for span in spans) for k in range(3))
        mask = _antialiased((labels[box] == label).astype(np.float32), ratio)
        share = np.empty([one.stop - one.start for one in target], np.float32)
        ndimage.affine_transform(mask, np.array(ratio), start, share.shape, output=share, order=1, mode="nearest")
        total[target] += share
        wins = share > best[target]
        best[target][wins] = share[wins]
        output[target][wins] = label
    output[best < 1 - total - 1e-4] = 0


def _span(found: slice, reach: int, old: int, new: int, ratio: float, offset: float) -> tuple[slice, slice, float]:
    """Along an axis: the part of the old grid that a label has shares in, that of the new one, and its first centre."""
    box = slice(max(found.start - reach, 0), min(found.stop + reach, old))
    low = math.ceil((box.start - offset) / ratio) if box.start else 0
    high = math.floor((box.stop - 1 - offset) / ratio) + 1 if box.stop < old else new
    target = slice(max(low, 0), min(high, new))
    return box, target, offset + ratio * target.start - box.start


def _antialiased(volume: np.ndarray, ratio: Sequence[float]) -> np.ndarray:
    """Smooth along axes that lose resolution, so that detail finer than the new voxels does not alias.

    The Gaussian turns the old voxel's point spread into the new one's: variance (r^2 - 1) / (8 ln 2) in old
    voxels (Cardoso et al., "Scale factor point spread function matching", MICCAI 2015, equation 5).
    """
    sigma = _sigmas(ratio)
    return ndimage.gaussian_filter(volume, sigma, mode="nearest") if any(sigma) else volume


def _sigmas(ratio: Sequence[float]) -> list[float]:
    return [math.sqrt(max(factor**2 - 1.0, 0.0) / (8 * math.log(2))) for factor in ratio]


def _boxed(array: np.ndarray, start: Sequence[int], shape: tuple[int, ...], fill: float) -> np.ndarray:
    """Cut the box [start, start + shape) out of (C, *S); what lies outside becomes ``fill``."""
    box = np.full((len(array), *shape), fill, dtype=array.dtype)
    source, target = [slice(None)], [slice(None)]
    for first, size, available in zip(start, shape, array.shape[1:], strict=True):
        low, high = max(first, 0), min(first + size, available)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    box[tuple(target)] = array[tuple(source)]
    return box


def _as_tuples(affine: np.ndarray | Sequence[Sequence[float]]) -> Affine:
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise LdmError(f"an affine has 4 x 4 finite numbers, this one is\n{matrix}")
    if np.isnan(nib.io_orientation(matrix)).any():
        raise LdmError(f"the affine drops an axis, so that voxels have no place in space:\n{matrix}")
    return tuple(tuple(row) for row in matrix.tolist())


def _text(shape: Sequence[int], separator: str = " x ") -> str:
    return separator.join(str(size) for size in shape)
