"""Slices of volumes as images of a 2-D cohort: a row of the table becomes one a slice, its subject stays who it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ldm.data.nifti import PLANES
from ldm.data.stored import SEPARATOR
from ldm.data.table import Table
from ldm.data.templates import Template
from ldm.errors import LdmError, nearest

COLUMN = "slice"
DEFAULTS = {"plane": "axial", "range": None, "step": 1}


def checked_slices(settings: Mapping[str, Any] | None, spatial_dims: int) -> dict[str, Any] | None:
    """``data.slices``, complete; None without.

    Raises:
        LdmError: an unknown key or plane, a range that is none, or a cohort that is not 2-D.
    """
    if not settings:
        return None
    for key in settings:
        if key not in DEFAULTS:
            raise LdmError(f"data.slices has no key '{key}'.{nearest(key, DEFAULTS)} Legal keys: {', '.join(DEFAULTS)}")
    slices = {**DEFAULTS, **settings}
    if spatial_dims != 2:
        raise LdmError("data.slices makes 2-D images of volumes: set data.spatial_dims=2, or data.slices=null.")
    if slices["plane"] not in PLANES:
        plane = str(slices["plane"])
        raise LdmError(f"data.slices.plane is '{plane}'.{nearest(plane, PLANES)} Legal: {', '.join(PLANES)}")
    limits, step = slices["range"], slices["step"]
    if not isinstance(limits, list | tuple) or len(limits) != 2 or not 0 <= limits[0] < limits[1] <= 999 or step < 1:
        raise LdmError(f"data.slices.range is {limits}, step {step}; legal: two numbers, first and one past the last.")
    return slices


def slice_rows(table: Table, slices: Mapping[str, Any]) -> Table:
    """A row for every slice, with its number in the column ``slice``.

    Raises:
        LdmError: the table has such a column.
    """
    if COLUMN in table.columns:
        raise LdmError(f"{table.name}: has a column '{COLUMN}', which data.slices makes; rename it.")
    numbers = [f"{index:03}" for index in range(*slices["range"], slices["step"])]
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
    return Template.parse(f"{template.text}{SEPARATOR}{slices['plane']}[{{{COLUMN}}}]", template.where)


def slice_id(text: str, slices: Mapping[str, Any]) -> str:
    """``data.id``, a template or a column, as that of slices."""
    return f"{text if '{' in text else f'{{{text}}}'}_{slices['plane']}{{{COLUMN}}}"
