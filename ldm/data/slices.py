"""Slices of volumes as images of a 2-D cohort: a row of the table becomes one a slice, its subject stays who it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ldm.data.nifti import PLANES
from ldm.data.stored import SEPARATOR
from ldm.data.table import Table
from ldm.data.templates import Template
from ldm.errors import LdmError, nearest

if TYPE_CHECKING:
    from ldm.data.draft import Record

COLUMN = "slice"
DEFAULTS = {"plane": "axial", "range": None, "step": 1}


def checked_slices(settings: Mapping[str, Any] | None, spatial_dims: int) -> dict[str, Any] | None:
    """``data.slices``, complete; None without.

    Raises:
        LdmError: an unknown key or plane, a range that is none, or a cohort that is not 2-D.
    """
    if not settings:
        return None
    slices = complete_slices(settings, "data.slices")
    if spatial_dims != 2:
        raise LdmError("data.slices makes 2-D images of volumes: set data.spatial_dims=2, or data.slices=null.")
    _check_range(slices, "data.slices")
    return slices


def complete_slices(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Which slices, complete; a range may be None.

    Args:
        settings: of them.
        name: what the setting is called.

    Raises:
        LdmError: an unknown key or plane, or a range that is none.
    """
    for key in settings:
        if key not in DEFAULTS:
            raise LdmError(f"{name} has no key '{key}'.{nearest(key, DEFAULTS)} Legal keys: {', '.join(DEFAULTS)}")
    slices = {**DEFAULTS, **settings}
    if slices["plane"] not in PLANES:
        plane = str(slices["plane"])
        raise LdmError(f"{name}.plane is '{plane}'.{nearest(plane, PLANES)} Legal: {', '.join(PLANES)}")
    if slices["range"] is not None:
        _check_range(slices, name)
    return slices


def _check_range(slices: Mapping[str, Any], name: str) -> None:
    limits, step = slices["range"], slices["step"]
    if not isinstance(limits, list | tuple) or len(limits) != 2 or not 0 <= limits[0] < limits[1] <= 999 or step < 1:
        raise LdmError(f"{name}.range is {limits}, step {step}; legal: two numbers, first and one past the last.")


def slice_rows(table: Table, slices: Mapping[str, Any]) -> Table:
    """A row for every slice, with its number in the column ``slice``.

    Raises:
        LdmError: the table has such a column.
    """
    if COLUMN in table.columns:
        raise LdmError(f"{table.name}: has a column '{COLUMN}', which data.slices makes; rename it.")
    numbers = [_number(index) for index in range(*slices["range"], slices["step"])]
    rows = tuple({**row, COLUMN: number} for row in table.rows for number in numbers)
    places = tuple(place for place in table.places for _ in numbers)
    return replace(table, columns=(*table.columns, COLUMN), rows=rows, places=places)


def slice_template(template: Template, slices: Mapping[str, Any]) -> Template:
    """The template of a volume as that of its slices.

    Raises:
        LdmError: it selects something already.
    """
    if SEPARATOR in template.text:
        raise LdmError(f"{template.where}: '{template.text}' has a selector already; leave out data.slices.")
    return Template.parse(_reference(template.text, slices["plane"], f"{{{COLUMN}}}"), template.where)


def slice_id(text: str, slices: Mapping[str, Any]) -> str:
    """``data.id``, a template or a column, as that of slices."""
    return _id(text if "{" in text else f"{{{text}}}", slices["plane"], f"{{{COLUMN}}}")


def sliced(record: Record, plane: str, indices: Iterable[int]) -> list[Record]:
    """A record of volumes as one for each of its slices, named as those of a cohort; the subject stays who it is.

    Raises:
        LdmError: one of its files selects something already.
    """
    for ref in record.references:
        if SEPARATOR in ref:
            raise LdmError(f"'{record.id}': '{ref}' has a selector already; leave out slices.")
    return [
        replace(
            record,
            id=_id(record.id, plane, _number(index)),
            images={name: _reference(ref, plane, _number(index)) for name, ref in record.images.items()},
            labels=None if record.labels is None else _reference(record.labels, plane, _number(index)),
        )
        for index in indices
    ]


def _number(index: int) -> str:
    return f"{index:03}"


def _reference(text: str, plane: str, number: str) -> str:
    return f"{text}{SEPARATOR}{plane}[{number}]"


def _id(text: str, plane: str, number: str) -> str:
    return f"{text}_{plane}{number}"
