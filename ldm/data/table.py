"""The cohort table: one row an image, read as text, so that nothing is guessed from what it looks like."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ldm.data.templates import Template
from ldm.errors import LdmError

MISSING = frozenset({"", "n/a", "na", "nan"})
"""Texts, in lower case, that mean that a value was not recorded."""
SEPARATORS = {".tsv": "\t", ".csv": ","}
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")

Row = dict[str, str | None]


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        name: file name, or the template that stands in for a table.
        columns: column names, in order.
        rows: column -> text, or ``None`` for a missing value. ``row``, the row's number from 0, is added
            unless the table has such a column itself.
        places: where each row stands, e.g. ``participants.tsv:17``.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    places: tuple[str, ...]


def read_table(path: Path) -> Table:
    """Read a ``.tsv`` or ``.csv`` file with a header line.

    Raises:
        LdmError: if it is missing, of another kind, not UTF-8, ragged, without rows, or has a column twice.
    """
    if path.suffix.lower() not in SEPARATORS:
        export = "; export the sheet as .tsv or .csv" if path.suffix.lower() in SPREADSHEETS else ""
        raise LdmError(f"{path}: a table is a .tsv or .csv file, not '{path.suffix}'{export}")
    separator = SEPARATORS[path.suffix.lower()]
    try:
        frame = pd.read_csv(
            path,
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            encoding="utf-8-sig",
        ).fillna("")
    except FileNotFoundError as error:
        raise LdmError(
            f"{path}: no such table; set data.table, or null to take the rows from the file names"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise LdmError(f"{path}: cannot be read as a table ({str(error).strip()}); {_remedy(error)}") from error
    lines = [tuple(text.strip() for text in line) for line in frame.itertuples(index=False, name=None)]
    columns = lines[0]
    _check_columns(path, columns, separator)
    rows, places = [], []
    for number, line in enumerate(lines[1:], start=2):
        if any(line):
            rows.append({"row": str(len(rows)), **_row(columns, line)})
            places.append(f"{path.name}:{number}")
    if not rows:
        raise LdmError(f"{path}: holds a header and no rows")
    return Table(path.name, columns, tuple(rows), tuple(places))


def table_from_files(root: Path, images: Sequence[Template], labels: Template | None = None) -> Table:
    """Make a table from the files that templates name: a row for each that the first names, a column a field.

    Where only files of the other templates speak for an image there is a row too, so that one that lacks its first
    channel is missed rather than overlooked.

    Args:
        root: folder of the files.
        images: a template a channel.
        labels: whose files make no rows.

    Raises:
        LdmError: if no file matches the first, or its selector holds a field, which no file name can tell.
    """
    first = images[0]
    names = first.files(root)
    if not names:
        raise LdmError(f"{first.where}: no file below {root} matches '{first.text}'")
    unknown = [column for column in first.columns if column not in first.row_of(names[0])]
    if unknown:
        raise LdmError(
            f"{first.where}: without a table, {{{unknown[0]}}} can only come from a file's path, not from a selector"
        )
    templates = [one for one in (*images, labels) if one is not None and _named(one) == _named(first)]
    places = {_key(first, name): name for name in names}
    for template in templates:
        for name in template.files(root) if template is not labels else ():
            if all(_key(one, name) not in places for one in templates):  # no other file of an image that is known
                places[_key(template, name)] = name
    rows = tuple({**dict(key), "row": str(index)} for index, key in enumerate(places))
    return Table(first.text, first.columns, rows, tuple(places.values()))


def _named(template: Template) -> set[str]:
    """The columns that a file's path tells; others are in a selector."""
    return {template.columns[int(group[1:])] for group in template.pattern().groupindex}


def _key(template: Template, name: str) -> tuple[tuple[str, str | None], ...] | None:
    """What a file's name says by a template, comparable; None if it is no name of it."""
    return tuple(sorted(template.row_of(name).items())) if template.pattern().fullmatch(name) else None


def expect_no_misspelt_column(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a column that is almost one of ``names`` which the table lacks.

    Raises:
        LdmError: naming both.
    """
    absent = {name.casefold(): name for name in names if name not in columns}
    for column in columns:
        # Closer than for other hints: a table may well have a column 'site' that is not meant to be 'sex'.
        match = [] if column in names else difflib.get_close_matches(column.casefold(), absent, n=1, cutoff=0.8)
        if match:
            raise LdmError(
                f"{path}: column '{column}' is no covariate of the model. Did you mean '{absent[match[0]]}'? "
                "Rename or remove it."
            )


def _remedy(error: Exception) -> str:
    """What to do about a file that pandas cannot read as a table."""
    if isinstance(error, UnicodeDecodeError):
        return "save it as UTF-8 text"
    if isinstance(error, pd.errors.EmptyDataError):
        return "it needs a header line and a line an image"
    if "inside string" in str(error):
        return "close the quotation mark that is open from that row on, or remove it"
    if isinstance(error, pd.errors.ParserError):
        return "give every line as many cells as the header, and quote a cell that holds the separator"
    return "see that the file can be read"


def _check_columns(path: Path, columns: tuple[str, ...], separator: str) -> None:
    for column in columns:
        if not column:
            raise LdmError(f"{path}: column {columns.index(column) + 1} has no name in the header line")
        if columns.count(column) > 1:
            raise LdmError(f"{path}: column '{column}' stands twice in the header line")
    other = next((text for text in ("\t", ";", ",") if text != separator and text in columns[0]), None)
    if len(columns) == 1 and other:
        raise LdmError(f"{path}: the header is one column, '{columns[0]}'; separate columns with {separator!r}")


def _row(columns: tuple[str, ...], line: tuple[str, ...]) -> Row:
    return {column: None if text.casefold() in MISSING else text for column, text in zip(columns, line, strict=True)}
