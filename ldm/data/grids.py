"""The grids of a cohort's files beside one another, and the model's grid that comes of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from ldm.data.draft import DEFAULT_CHANNEL, Draft, Record, shown
from ldm.data.faults import Fault
from ldm.data.geometry import Geometry, smallest_shape
from ldm.data.inspection import FileFacts
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError

SIZE_FACTOR = 3.0
"""A voxel size or field of view stands out when it is more than so many times the cohort's median, or vice versa."""
MIN_FILES = 5
"""A median of fewer files says nothing about what is usual."""
MAX_SHARE = 0.1
"""Where more of the files are far from the median, the cohort has several protocols: warnings, no faults."""

_HEADER = "mend the voxel size in the header (mm?), or take the row out of the table"
_LARGE = "crop the image or take its row out of the table; if such images are meant, set data.shape to the model's grid"
_SMALL = "nothing, if it is meant: it is padded; otherwise take the row out of the table"
_CROPPED = "nothing, if it is meant: data.shape says where it is cropped or padded"
_COARSE = "nothing, if it was scanned so: it is resampled and has less detail; otherwise mend the header"
_PIXELS = "nothing, if the sizes are meant: the model's grid holds the largest unless data.shape says otherwise"


def unlike_sizes(draft: Draft, files: Mapping[str, FileFacts]) -> tuple[list[Fault], list[Fault]]:
    """Files whose voxel size or field of view is far from the cohort's median: faults and warnings.

    A large field of view decides the model's grid, and one that is far off because the voxels are is a header that is
    wrong: both are faults. Only warnings are large images that ``data.shape`` crops or that are many, small ones, which
    are padded, thick slices that ``data.spacing_mm`` resamples, and pictures, whose pixels have no known size.
    """
    faults: list[Fault] = []
    warnings: list[Fault] = []
    for channel in draft.templates:
        refs = [(record, record.images[channel]) for record in draft.kept if channel in record.images]
        good = [(record, ref) for record, ref in refs if files[ref].kind is None]
        _volumes(draft, [pair for pair in good if files[pair[1]].affine is not None], files, faults, warnings)
        _pictures(draft, [pair for pair in good if files[pair[1]].affine is None], files, warnings)
    return faults, warnings


def volumes_as_channels(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    """Channels of ``data.image`` whose NIfTI files hold several volumes each, which all become channels."""
    remedy = (
        "nothing, if they are the channels of one image; otherwise split the files into one volume each and name "
        "the one to use in data.image, or all of them as a mapping {channel: template}, e.g. "
        "{T1: 'T1/{participant_id}.nii.gz', T2: 'T2/{participant_id}.nii.gz'}"
    )
    warnings = []
    for channel in draft.templates:
        good = [files[record.images[channel]] for record in draft.kept if channel in record.images]
        counts = Counter(one.shape[0] for one in good if one.kind is None and one.affine is not None)
        volumes, number = counts.most_common(1)[0] if counts else (1, 0)
        if volumes > 1:
            key = "data.image" if channel == DEFAULT_CHANNEL else f"data.image.{channel}"
            reason = f"{number} files are 4-D and hold {volumes} volumes each: '{channel}' becomes {volumes} channels"
            warnings.append(Fault(key, "volumes-as-channels", reason, remedy))
    return warnings


def _volumes(
    draft: Draft,
    refs: Sequence[tuple[Record, str]],
    files: Mapping[str, FileFacts],
    faults: list[Fault],
    warnings: list[Fault],
) -> None:
    if len(refs) < MIN_FILES:
        return
    extents, spacings = ([getattr(files[ref], name) for _, ref in refs] for name in ("extent", "spacing"))
    usual = f"{_sizes(np.median(extents, axis=0))} mm (voxels of {_sizes(np.median(spacings, axis=0))} mm)"
    large, small, others = _above(extents), _below(extents), _far(spacings)
    bounded = draft.config["shape"] is not None
    several = large.sum() > max(1, MAX_SHARE * len(refs))
    for k, (record, ref) in enumerate(refs):
        if others[k] and draft.config["spacing_mm"] is None:
            continue  # a fault of the spacing already
        reason = f"{_sizes(extents[k])} mm (voxels of {_sizes(spacings[k])} mm), the cohort's median {usual}"
        told = functools.partial(Fault, shown(draft, ref), reason=reason, record=record.id)
        if others[k] and (large[k] or small[k]):
            faults.append(told("field-of-view", remedy=_HEADER))
        elif others[k]:
            warnings.append(told("voxel-size", remedy=_COARSE))
        elif large[k] and not bounded and not several:
            faults.append(told("field-of-view", remedy=_LARGE))
        elif large[k] or small[k]:
            remedy = _SMALL if not large[k] else _CROPPED if bounded else _LARGE
            warnings.append(told("field-of-view", remedy=remedy))


def _pictures(
    draft: Draft, refs: Sequence[tuple[Record, str]], files: Mapping[str, FileFacts], warnings: list[Fault]
) -> None:
    by_axes = Counter(len(files[ref].extent) for _, ref in refs)
    if not by_axes or by_axes.most_common(1)[0][1] < MIN_FILES:
        return
    axes = by_axes.most_common(1)[0][0]
    refs = [(record, ref) for record, ref in refs if len(files[ref].extent) == axes]
    extents = [files[ref].extent for _, ref in refs]
    usual = _sizes(np.median(extents, axis=0))
    for (record, ref), extent, far in zip(refs, extents, _far(extents), strict=True):
        if far:
            reason = f"{_sizes(extent)} pixels, the cohort's median {usual}"
            warnings.append(Fault(shown(draft, ref), "field-of-view", reason, _PIXELS, record.id))


def _far(sizes: Sequence[Sequence[float]]) -> np.ndarray:
    """Which rows of (N, axes) sizes have an axis that is `SIZE_FACTOR` times off the median of that axis: (N,)."""
    return _above(sizes) | _below(sizes)


def _above(sizes: Sequence[Sequence[float]]) -> np.ndarray:
    return (np.asarray(sizes) > SIZE_FACTOR * np.median(sizes, axis=0)).any(axis=1)


def _below(sizes: Sequence[Sequence[float]]) -> np.ndarray:
    return (np.asarray(sizes) < np.median(sizes, axis=0) / SIZE_FACTOR).any(axis=1)


def _sizes(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def model_grid(
    config: Mapping[str, Any], records: Sequence[Record], files: Mapping[str, FileFacts], multiple: int | Sequence[int]
) -> dict[str, Any] | None:
    """What the files become: ``channels``, ``shape`` and, for volumes, ``spacing_mm`` along the model's axes.

    Args:
        config: the complete ``data`` configuration.
        records: those that take part.
        files: reference -> facts.
        multiple: what each axis of the shape must be a multiple of.

    Returns:
        ``None`` when no file can be used, or files do not fit ``data.orientation`` or ``data.spacing_mm``.
    """
    recipe = Preprocessing.from_config(config, multiple)
    usable = [record for record in records if all(files[ref].kind is None for ref in record.images.values())]
    first = [files[next(iter(record.images.values()))] for record in usable]
    kinds = [(one.shape[1:], None if one.affine is None else one.axes) for one in first]
    one_of = dict(zip(kinds, first, strict=True))  # a shift of the affine changes neither shape nor spacing
    try:
        ways = {
            kind: Geometry.plan(one.shape[1:], one.affine, recipe.orientation, recipe.spacing)
            for kind, one in one_of.items()
        }
    except LdmError:
        return None
    if not ways:
        return None
    counts = Counter(sum(files[ref].shape[0] for ref in record.images.values()) for record in usable)
    grid = {
        "channels": counts.most_common(1)[0][0],
        "shape": list(recipe.shape or smallest_shape((way.resampled_shape for way in ways.values()), recipe.multiple)),
    }
    sizes = {kind: _voxel_size(way) for kind, way in ways.items() if way.affine is not None}
    spacings = Counter(sizes[kind] for kind in kinds if kind in sizes)
    return grid | ({"spacing_mm": list(spacings.most_common(1)[0][0])} if spacings else {})


def _voxel_size(way: Geometry) -> tuple[float, ...]:
    return tuple(round(float(size), 4) for size in nib.affines.voxel_sizes(way.affine))
