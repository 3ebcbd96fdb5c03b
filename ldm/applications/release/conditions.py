"""What every volume of a release is asked to show: drawn, from a table, or from a grid; and what is refused."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.applications.release.files import sha256
from ldm.data.schema import Covariate, CovariateSchema
from ldm.data.table import SEPARATORS, expect_no_misspelt_column, read_table
from ldm.errors import LdmError
from ldm.model.generative import Generative
from ldm.model.latent_diffusion import LatentDiffusionModel

logger = logging.getLogger(__name__)

DRAWN, TABLE, GRID, NONE = "training distribution", "table", "grid", "none"
DIGITS = 6  # significant digits of a drawn value: what the table of the release says is what the network was told
CELL = 256  # characters of a table's cell
TABLE_BYTES = 256 << 20
FORMULA = "=+-@"  # what a spreadsheet executes when a cell starts with it
ABSURD = 100.0  # ranges of a covariate that a value may lie beyond it
ID = "participant_id"
SHOWN = 5  # warnings of extrapolation


@dataclass(frozen=True)
class Conditions:
    """Rows of covariates in physical units; volume ``i`` is asked for row ``i``, the rows in turn.

    Attributes:
        source: where they come from.
        rows: canonical rows: floats and levels, names that are not given are left out.
    """

    source: str
    rows: Sequence[Mapping[str, Any]]

    def at(self, index: int) -> Mapping[str, Any]:
        """The row of volume ``index``."""
        return self.rows[index % len(self.rows)]

    def sha256(self, n: int) -> str:
        """Hash of what the first ``n`` volumes are asked for."""
        return rows_sha256([self.at(i) for i in range(n)])


def rows_sha256(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of what images are asked for, in their order; of canonical rows."""
    return sha256(json.dumps(list(rows), sort_keys=True, allow_nan=False).encode())


def asked_of(images: Mapping[str, Any], model: Generative | None) -> dict[str, Any] | None:
    """What the images of a folder were asked for, in the words of a release.

    Args:
        images: what the folder says of itself, see :func:`ldm.model.provenance.read_provenance`.
        model: that drew them; None if it is not at hand.

    Returns:
        ``source`` (see :class:`Conditions`), ``n`` images, ``sha256`` of their rows, and the names of ``inputs`` that
        they were given beside covariates. None where the folder does not say, or no model tells what its rows mean.
    """
    if "conditions" in images:  # a release
        return {**images["conditions"], "n": images.get("n"), "inputs": []}
    rows = images.get("rows")
    if model is None or not rows:
        return None
    inputs = sorted(images.get("inputs", {}))
    source = TABLE
    if not inputs and rows == json.loads(json.dumps(model.covariate_rows(None, len(rows), images.get("seed", 0)))):
        source = DRAWN if len(model.schema) and model.distribution is not None else NONE
    digest = rows_sha256([_told(model.schema, row) for row in rows])
    return {"source": source, "n": len(rows), "sha256": digest, "inputs": inputs}


def asked_otherwise(measured: Any, conditions: Conditions) -> str | None:
    """In words how images that were measured were asked for other things than those of a release; None if not.

    Draws from the training distribution are alike whatever the seed. Rows of a table or a grid have to be the first
    ones of the release, as many as there are images.

    Args:
        measured: as :func:`asked_of` gives it; None where nobody knows.
        conditions: of the release.
    """
    if not isinstance(measured, Mapping):
        return "it does not say what they were asked for"
    if measured.get("inputs"):
        return f"they were given {', '.join(map(str, measured['inputs']))}, which a release gives none"
    drawn = measured.get("source") in (DRAWN, NONE) or conditions.source in (DRAWN, NONE)
    n = measured.get("n")
    if drawn and measured.get("source") != conditions.source:
        return f"asked for {_words(measured.get('source'))} there, {_words(conditions.source)} here"
    if not drawn and (not isinstance(n, int) or measured.get("sha256") != conditions.sha256(n)):
        return f"the {n} images were not asked for what the first {n} of the release are"
    return None


def _words(source: Any) -> str:
    return {DRAWN: "draws from the training distribution", NONE: "nothing"}.get(source, "covariates that were given")


def conditions_from(asked: Any, model: LatentDiffusionModel, n: int | None, batch_size: int, seed: int) -> Conditions:
    """Conditions as the ``covariates`` of a configuration ask for them.

    Args:
        asked: None to draw from the model's stored training distribution; the path of a table; a mapping
            {name: value or list of values}, whose combinations are a grid; or a list of mappings.
        model: whose schema and distribution they follow.
        n: volumes; a draw needs it.
        batch_size: volumes of a micro-batch, by which a draw is longer than ``n`` to fill the last one.
        seed: of the draw.

    Raises:
        LdmError: an unknown covariate or level, an illegal number, a hostile table, or nothing to ask for.
    """
    if asked is None:
        return _drawn(model, n, batch_size, seed)
    if isinstance(asked, str | Path):
        source, rows = TABLE, _table_rows(Path(asked), model.schema)
    else:
        source, rows = GRID, _grid_rows(asked)
    rows = [canonical(model.schema, row) for row in rows]
    if not rows:
        raise LdmError("covariates holds no row: give at least one, or leave it out to draw.")
    _warn_of_extrapolation(model.schema, rows)
    return Conditions(source, rows)


def _drawn(model: LatentDiffusionModel, n: int | None, batch_size: int, seed: int) -> Conditions:
    if not len(model.schema):
        return Conditions(NONE, [{}])
    if model.distribution is None:
        raise LdmError("The model holds no distribution of its training covariates: set covariates=TABLE or a grid.")
    if n is None:
        raise LdmError("n is missing: how many volumes are to be drawn?")
    rows = model.distribution.sample(n + max(batch_size, 1), seed)
    return Conditions(DRAWN, [canonical(model.schema, _rounded(row)) for row in rows])


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for name, v in row.items()}


def _grid_rows(asked: Any) -> list[dict[str, Any]]:
    """All combinations of a mapping's lists, the last name changing fastest; a list of mappings one after the other."""
    mappings = [asked] if isinstance(asked, Mapping) else list(asked)
    rows: list[dict[str, Any]] = []
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            raise LdmError(f"covariates: {mapping!r} is no mapping; write {{age: [50, 60], sex: [F, M]}}.")
        lists = [value if isinstance(value, list | tuple) else [value] for value in mapping.values()]
        rows += [dict(zip(mapping, values, strict=True)) for values in itertools.product(*lists)]
    return rows


def canonical(schema: CovariateSchema, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in schema order: finite floats and the schema's own levels; what is None is left out.

    Raises:
        LdmError: an unknown name or level, or no finite number, or one far from anything the model knows.
    """
    for name in row:
        schema[name]
    told = _told(schema, row)
    for name, value in told.items():
        covariate = schema[name]
        if covariate.kind != "categorical" and abs(covariate.encode(value)) > ABSURD:
            low, high = covariate.range
            raise LdmError(f"covariate '{name}': {value:g} is absurd; the model knows {low:g} to {high:g}.")
    return told


def _told(schema: CovariateSchema, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is told by a row: finite floats and the schema's own levels, in schema order."""
    given = [covariate for covariate in schema if row.get(covariate.name) is not None]
    return {covariate.name: _value(covariate, row[covariate.name]) for covariate in given}


def _value(covariate: Covariate, value: Any) -> float | str:
    if covariate.kind == "categorical":
        return covariate.levels[covariate.level_index(value)]
    return covariate.number(value)


def _warn_of_extrapolation(schema: CovariateSchema, rows: Sequence[Mapping[str, Any]]) -> None:
    warnings = sorted({warning for row in rows for warning in schema.out_of_range(row)})
    for warning in warnings[:SHOWN]:
        logger.warning("Extrapolation: %s", warning)
    if len(warnings) > SHOWN:
        logger.warning("Extrapolation: %d more values are out of range.", len(warnings) - SHOWN)


# tables of others ------------------------------------------------------------------------------------


def _table_rows(path: Path, schema: CovariateSchema) -> list[dict[str, Any]]:
    check_table(path)
    table = read_table(path)
    known = [name for name in table.columns if name in schema.names]
    if not known:
        raise LdmError(f"{path} has no column of the model's covariates: {', '.join(schema.names)}.")
    expect_no_misspelt_column(path, table.columns, schema.names)
    return [{name: row[name] for name in known} for row in table.rows]


def check_table(path: Path) -> None:
    """Refuse a table that could do harm where it, or what is made of it, is opened.

    Raises:
        LdmError: a formula, a control character, an absurdly long cell, NaN or infinity, an id that is a path or stands
            twice; the message names the line.
    """
    if not path.is_file():
        raise LdmError(f"covariates={path}: there is no such table.")
    if path.suffix.lower() not in SEPARATORS:
        raise LdmError(f"covariates={path}: a table is a .tsv or .csv file, not '{path.suffix}'.")
    if path.stat().st_size > TABLE_BYTES:
        raise LdmError(f"covariates={path} is larger than {TABLE_BYTES >> 20} MiB.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file, delimiter=SEPARATORS[path.suffix.lower()], strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise LdmError(f"covariates={path} cannot be read as a table ({error}); save it as UTF-8 text.") from error
    columns = [text.strip() for text in lines[0]] if lines else []
    for number, line in enumerate(lines, start=1):
        for place, text in enumerate(line):
            column = columns[place] if place < len(columns) else str(place + 1)
            _check_cell(text, f"{path.name}:{number}, column {column!r:.40}")
    if ID in columns:
        _check_ids([line[columns.index(ID)] for line in lines[1:] if len(line) == len(columns)], path.name)


def _check_cell(text: str, where: str) -> None:
    check_text(text, where, CELL, empty=True)
    value = text.strip().casefold()
    if value.lstrip("+-") in ("nan", "inf", "infinity"):
        raise LdmError(f"{where}: '{value}' is no value; a missing one is n/a.")


def _check_ids(ids: Sequence[str], name: str) -> None:
    seen: set[str] = set()
    for number, text in enumerate(ids, start=2):
        text = text.strip()
        if "/" in text or "\\" in text or text in (".", ".."):
            raise LdmError(f"{name}:{number}: {ID} '{text}' is a path, not an id.")
        if text in seen:
            raise LdmError(f"{name}:{number}: {ID} '{text}' stands twice.")
        seen.add(text)


def check_text(text: str, where: str, limit: int = CELL, empty: bool = False) -> str:
    """``text`` if it may stand in a table, a JSON file and a page.

    Raises:
        LdmError: it is empty or too long, holds a control character, or would be a formula in a spreadsheet.
    """
    if not text.strip() and not empty:
        raise LdmError(f"{where} is empty.")
    if len(text) > limit:
        raise LdmError(f"{where}: {len(text)} characters are too many; legal: up to {limit}.")
    # Cc: control; Cf: unseen, such as those that turn the direction of writing; Cs, Co, Cn: no character at all
    hidden = next((c for c in text if unicodedata.category(c).startswith("C") or c in "\u2028\u2029"), None)
    if hidden is not None:
        raise LdmError(f"{where}: holds the control character U+{ord(hidden):04X}.")
    if text.strip()[:1] in tuple(FORMULA) and not _is_number(text):
        raise LdmError(f"{where}: '{text[:40]}' starts like a formula ({FORMULA[0]}, +, -, @).")
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
