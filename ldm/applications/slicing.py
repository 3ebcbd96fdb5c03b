"""Volumes for a model of slices: the slices that ``slices`` names, and which of them are of one volume."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.draft import Record, is_safe_name
from ldm.data.slices import complete_slices, sliced
from ldm.data.stacks import Cut, count_slices, is_volume, told_slices
from ldm.data.stored import NIFTI_SUFFIXES, split_reference
from ldm.errors import LdmError

FOLDER = "stacked"  # below the output folder: results of slices, put back into volumes
REMEDY = "Set slices={plane: axial, range: [80, 128]}, without a range for all its slices"


def cut_slices(records: Sequence[Record], slices: Mapping[str, Any], spatial_dims: int) -> list[Record]:
    """The slices of records of volumes that ``slices`` names, a record each, as ``data.slices`` has them.

    Where it gives no range, all slices but those in which an image is the same all over, which show nothing.

    Args:
        records: of volumes.
        slices: the setting: ``plane``, ``range``, ``step``.
        spatial_dims: of the model.

    Raises:
        LdmError: a model of volumes; an unknown key or plane, or a range that is none; files that are no NIfTI volumes,
            select something already, have fewer slices, or none that shows something.
    """
    if spatial_dims != 2:
        raise LdmError("slices is for models of 2-D images, and this one is of volumes; leave it out.")
    slices = complete_slices(slices, "slices")
    found = []
    for record in records:
        for ref in record.references:
            if not split_reference(ref)[0].name.lower().endswith(NIFTI_SUFFIXES):
                raise LdmError(f"'{record.id}': {ref} is no NIfTI volume; slices is for {', '.join(NIFTI_SUFFIXES)}.")
        parts = sliced(record, slices["plane"], _slice_numbers(record, slices))
        if not parts:
            raise LdmError(f"'{record.id}': no slice of its volumes shows something; leave it out.")
        found += parts
    return found


def _slice_numbers(record: Record, slices: Mapping[str, Any]) -> Sequence[int]:
    paths = [split_reference(ref)[0] for ref in record.images.values()]
    if slices["range"] is None:
        told = [set(told_slices(path, slices["plane"])) for path in paths]
        return sorted(set.intersection(*told))[:: slices["step"]]
    numbers = range(*slices["range"], slices["step"])
    for path in paths:
        count = count_slices(path, slices["plane"])
        if numbers[-1] >= count:
            raise LdmError(
                f"slices.range is {slices['range']}, but {path} has {count} {slices['plane']} slices: legal are 0 to "
                f"{count}, first and one past the last."
            )
    return numbers


def expect_no_volume(record: Record) -> None:
    """Refuse volumes as images of a 2-D model.

    Raises:
        LdmError: naming the file, and the setting that takes its slices.
    """
    for ref in record.images.values():
        if is_volume(ref):
            raise LdmError(
                f"{ref} is a volume, and this model is of 2-D images. {REMEDY}, or name a slice, '{ref}::axial[80]'."
            )


def named_stacks(records: Sequence[Record]) -> dict[str, tuple[Cut, dict[int, Record]]]:
    """Name of a volume -> one of its cuts, and its records by number of the slice.

    A record that is called ``NAME_axial040``, as ``data.slices`` does, is of ``NAME``, any other of its subject, or of
    its own name where that of the subject is not safe as a file name; further volumes of one name are numbered. The
    first image of a record says where it was cut.
    """
    stacks: dict[tuple[Path, str], dict[int, Record]] = {}
    for record in records:
        cut = Cut.of(next(iter(record.images.values())))
        if cut is not None:
            stacks.setdefault((cut.path, cut.plane), {})[cut.index] = record
    named: dict[str, tuple[Cut, dict[int, Record]]] = {}
    for (path, plane), stack in stacks.items():
        index, record = next(iter(stack.items()))
        end = f"_{plane}{index:03}"
        subject = record.subject if is_safe_name(record.subject) else record.id
        name = record.id.removesuffix(end) if record.id.endswith(end) else subject
        numbered = (f"{name}_volume{number}" for number in itertools.count(2))
        free = next(one for one in itertools.chain([name], numbered) if one not in named)
        named[free] = Cut(path, plane, index), stack
    return named
