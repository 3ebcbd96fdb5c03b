"""What is wrong with the files of a cohort: alone, beside their record's others, and all together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm.data.draft import Draft, Record, shown
from ldm.data.faults import Fault
from ldm.data.inspection import FileFacts, corner_shift
from ldm.data.preprocessing import GRID_TOLERANCE
from ldm.data.stored import split_reference

SPACING_TOLERANCE = 0.01
"""Relative difference from the cohort's spacing that needs resampling."""

_RESTORE = "restore the file from its source, or take its row out of the table"
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
    "labels-unknown": "name them in data.label_names, or set data.other_labels=background",
}


def file_faults(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    faults = []
    for record in draft.kept:
        for ref in dict.fromkeys(record.references):
            if files[ref].kind:
                kind = files[ref].kind
                faults.append(Fault(shown(draft, ref), kind, files[ref].reason, _REMEDIES[kind], record.id))
        faults += _disagreements(draft, record, files) + _unknown_labels(draft, record, files)
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
            faults.append(Fault(shown(draft, ref), f"{role}-{found[0]}", found[1], remedy, record.id))
    return faults


def _off_grid(image: FileFacts, other: FileFacts) -> tuple[str, str] | None:
    """``("shape" or "affine", reason)`` when ``other``, or the volume that it is a slice of, lies on another grid."""
    grids = [(image.shape[1:], image.affine, other.shape[1:], other.affine)]
    if image.volume_affine is not None and other.volume_affine is not None:
        grids.append((image.volume_shape, image.volume_affine, other.volume_shape, other.volume_affine))
    for shape, affine, other_shape, other_affine in grids:
        if other_shape != shape:
            return "shape", f"has shape {list(other_shape)}, the image {list(shape)}"
        if affine is None or other_affine is None:
            continue
        shift = corner_shift(shape, np.array(affine), np.array(other_affine))
        if shift > GRID_TOLERANCE:
            return "affine", f"its affine places a corner {shift:.2f} voxels from the image's"
    return None


def _unknown_labels(draft: Draft, record: Record, files: Mapping[str, FileFacts]) -> list[Fault]:
    """Values that ``data.label_names`` does not name, where these are not background."""
    if record.labels is None or draft.config["other_labels"] == "background":
        return []
    named = draft.config["label_names"]
    known = {0} | {v for entry in named.values() for v in (entry if isinstance(entry, list | tuple) else [entry])}
    unknown = sorted(set(files[record.labels].values) - known)
    if not unknown:
        return []
    legal = ", ".join(f"{value} {name}" for name, value in named.items())
    reason = f"has label value(s) {', '.join(map(str, unknown))}; data.label_names names 0 background, {legal}"
    return [Fault(shown(draft, record.labels), "labels-unknown", reason, _REMEDIES["labels-unknown"], record.id)]


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
            shown(draft, ref),
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
            faults.append(Fault(shown(draft, ref), "spacing", reason, remedy, record.id))
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
            reason = f"the same pixels as '{other.id}' ({shown(draft, other.images[channel])})"
            faults.append(Fault(shown(draft, record.images[channel]), "identical-image", reason, remedy, record.id))
    return faults


def file_warnings(draft: Draft, files: Mapping[str, FileFacts]) -> list[Fault]:
    remedy = "nothing, if the two are meant to name different spaces: the sform is used"
    return [
        Fault(shown(draft, ref), "sform-qform", files[ref].note, remedy, record.id)
        for record in draft.kept
        for ref in dict.fromkeys(record.references)
        if files[ref].note
    ]


def files_without_row(draft: Draft) -> list[Fault]:
    """Files that a template could name and no row does."""
    if not draft.readable:
        return []
    named = {split_reference(ref)[0] for record in draft.records for ref in record.references}
    remedy = "add a row to the table, or nothing if the file is left out on purpose"
    return [
        Fault(name, "file-without-row", f"matches data.{key} and no row names it", remedy)
        for key, template in _keyed_templates(draft)
        for name in template.files(draft.root)
        if draft.root / name not in named
    ]


def _keyed_templates(draft: Draft) -> Iterable[tuple[str, Any]]:
    return ((template.where.removeprefix("data."), template) for template in draft.templates.values())
