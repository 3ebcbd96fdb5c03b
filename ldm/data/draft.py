"""What the table says: a record a row, before any image is read, and the faults of rows and columns."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.data import prepare
from ldm.data.cohort_config import SPLITS, complete_config
from ldm.data.expressions import Expression, parse
from ldm.data.faults import Fault
from ldm.data.schema import Covariate, CovariateSchema, Value
from ldm.data.slices import slice_id, slice_rows, slice_template
from ldm.data.table import Row, Table, read_table, table_from_files
from ldm.data.templates import EscapeError, MissingValueError, Template
from ldm.errors import LdmError, nearest

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
DEFAULT_CHANNEL = "image"
SAFE_NAMES = "letters, digits and _ . + = @ - only, at most 200, beginning with a letter or digit"
_SAFE_NAME = re.compile(r"\w[\w.+=@-]{0,199}")


@dataclass(frozen=True)
class Record:
    """One image of the cohort.

    Attributes:
        id: unique, safe as a file name.
        subject: whose image it is; a subject's records are always in one split.
        images: channel name -> reference (path, optionally ``::selector``).
        labels: reference of the label image, or ``None``.
        covariates: name -> number (physical units), level, or ``None`` when missing.
        split: ``train``, ``valid`` or ``test``.
        place: where the row stands, for messages, e.g. ``participants.tsv:17``.
    """

    id: str
    subject: str
    images: dict[str, str]
    labels: str | None
    covariates: dict[str, Value]
    split: str
    place: str = ""

    @property
    def references(self) -> tuple[str, ...]:
        """References of all images, and of the labels if there are any."""
        return (*self.images.values(), *([self.labels] if self.labels else []))


@dataclass
class Draft:
    """What the table says, before images are read and the policy is applied.

    Attributes:
        config: the complete, validated ``data`` configuration.
        root: folder that holds the files.
        schema: covariates as configured.
        records: a record a row that could be understood.
        faults: what is wrong so far.
        warnings: what deserves a look.
        dropped: ids that ``missing_covariate=drop`` leaves out.
        templates: the image templates by channel, and the labels' under ``labels``.
    """

    config: dict[str, Any]
    root: Path
    schema: CovariateSchema
    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    templates: dict[str, Template] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The cohort's name; without one, the root folder's."""
        return self.config["name"] or self.root.name

    @property
    def readable(self) -> bool:
        """Whether rows could be read; with unknown columns there are neither splits nor files to judge."""
        return bool(self.records) or all(fault.record is not None for fault in self.faults)

    @property
    def kept(self) -> list[Record]:
        """The records without those that ``missing_covariate=drop`` leaves out."""
        return [record for record in self.records if record.id not in self.dropped]

    @property
    def leave_out(self) -> bool:
        """Whether affected records are left out rather than stopping everything."""
        return self.config["faults"] == "leave_out"


def is_safe_name(text: str) -> bool:
    """Whether a name of an image can begin the names of files, which then stay in their folder: see `SAFE_NAMES`."""
    return _SAFE_NAME.fullmatch(text) is not None and not text.endswith(".")


def shown(draft: Draft, ref: str) -> str:
    """A reference as the report shows it: below the root."""
    return ref.removeprefix(f"{draft.root}/")


def draft_cohort(data_cfg: Mapping[str, Any] | DictConfig) -> Draft:
    """Read the table, build a record a row, and collect every fault that can be found without the images.

    Raises:
        LdmError: when the configuration or the table itself cannot be read.
    """
    config = complete_config(data_cfg)
    root = Path(config["root"]).expanduser().absolute()
    table_path = None if config["table"] is None else root / Path(config["table"]).expanduser()
    if not (root.is_dir() and (table_path is None or table_path.is_file())):
        _make(config, root)
    if not root.is_dir():
        raise LdmError(f"data.root: there is no folder {root}.{prepare.hint(config['name'])}")

    draft = Draft(config, root, CovariateSchema.from_config(config["covariates"]))
    draft.templates = _file_templates(config)
    table = read_table(table_path) if table_path else _table_of_files(root, draft.templates)
    if config["slices"]:
        table, config["id"] = slice_rows(table, config["slices"]), slice_id(str(config["id"]), config["slices"])
        draft.templates = {name: slice_template(one, config["slices"]) for name, one in draft.templates.items()}
    _Reader(draft, table).read()
    return draft


def _table_of_files(root: Path, templates: Mapping[str, Template]) -> Table:
    images = [template for name, template in templates.items() if name != "labels"]
    return table_from_files(root, images, templates.get("labels"))


def _make(config: Mapping[str, Any], root: Path) -> None:
    """Simulate or fetch data that are not there, if the configuration asks for it."""
    if config["simulate"]:
        # Imported here: the simulation needs a template that nobody else does.
        from ldm.data.simulated import generate

        generate(root, **config["simulate"])
    elif config["download"]:
        prepare.prepare(config["name"], root, config["table"])


class _Reader:
    """Turns a table's rows into a draft's records, noting what is wrong with each."""

    def __init__(self, draft: Draft, table: Table) -> None:
        self.draft, self.table, self.config = draft, table, draft.config
        self.expressions: dict[str, Expression] = {}

    def read(self) -> None:
        id_ = self._try_column(lambda: self._template("id"))
        subject = self._try_column(lambda: self._template("subject"))
        for template in self.draft.templates.values():
            self._try_column(lambda template=template: template.require(self.table.columns))
        for name in self.draft.schema.names:
            self._try_column(lambda name=name: self._add_expression(name))
        column = self.config["split"]["column"]
        if column is not None:
            self._try_column(lambda: _require_column(column, self.table, "data.split.column"))
        if self.draft.faults:
            return

        ids = [self._text(id_, row, place) for row, place in zip(self.table.rows, self.table.places, strict=True)]
        subjects = [
            None if key is None else self._text(subject, row, place, key)
            for row, place, key in zip(self.table.rows, self.table.places, ids, strict=True)
        ]
        splits = self._splits(ids, subjects)
        for row, place, key, who in zip(self.table.rows, self.table.places, ids, subjects, strict=True):
            if key is not None and who is not None:
                self._add_record(row, place, key, who, splits)
        self._check_ids()

    def _try_column(self, action: Callable[[], Any]) -> Any:
        """Run something that names columns; an unknown one is a fault of the whole cohort."""
        try:
            return action()
        except LdmError as error:
            remedy = "name a column of the table, or a legal template or expression of columns"
            self.draft.faults.append(Fault(self.table.name, "unknown-column", str(error), remedy))
            return None

    def _template(self, key: str) -> Template:
        """``data.id`` or ``data.subject``: a template, or the bare name of a column."""
        text = str(self.config[key])
        template = Template.parse(text if "{" in text else f"{{{text}}}", f"data.{key}")
        template.require(self.table.columns)
        return template

    def _add_expression(self, name: str) -> None:
        text = self.config["covariates"][name].get("column") or name
        self.expressions[name] = parse(str(text), self.table.columns, f"data.covariates.{name}.column")

    def _fault(self, place: str, kind: str, reason: str, remedy: str, record: str | None) -> None:
        # A row whose id cannot be told is identified by its place, so that it can still be left out.
        self.draft.faults.append(Fault(place, kind, reason, remedy, record or place))

    def _text(self, template: Template, row: Row, place: str, record: str | None = None) -> str | None:
        """Fill in a template; on failure note the fault and return ``None``."""
        try:
            return template.format(row)
        except MissingValueError as error:
            self._fault(place, "missing-value", f"{template.where}: {error}", "fill in the cell", record)
        except EscapeError as error:
            remedy = "give plain names; for a column of relative paths write {column:path} in the template"
            self._fault(place, "path-escape", f"{template.where}: {error}", remedy, record)
        return None

    def _splits(self, ids: Sequence[str | None], subjects: Sequence[str | None]) -> dict[str, str]:
        settings = self.config["split"]
        if settings["column"] is None:
            return split_subjects({who for who in subjects if who is not None}, settings["seed"], settings["fractions"])
        found: dict[str, set[str]] = defaultdict(set)
        for row, place, key, who in zip(self.table.rows, self.table.places, ids, subjects, strict=True):
            word = row[settings["column"]]
            split = SPLIT_WORDS.get((word or "").casefold())
            if split is None:
                reason = f"column '{settings['column']}' is {word!r}"
                self._fault(place, "unknown-split", reason, f"use one of {', '.join(SPLIT_WORDS)}", key)
            elif who is not None:
                found[who].add(split)
        for place, key, who in zip(self.table.places, ids, subjects, strict=True):
            if len(found.get(who, ())) > 1:
                reason = f"subject '{who}' is in several splits: {', '.join(sorted(found[who]))}"
                self._fault(place, "subject-in-two-splits", reason, "put all rows of a subject into one split", key)
        return carved({who: min(splits) for who, splits in found.items()}, settings)

    def _add_record(self, row: Row, place: str, key: str, who: str, splits: Mapping[str, str]) -> None:
        paths = {name: self._text(template, row, place, key) for name, template in self.draft.templates.items()}
        covariates = {name: self._covariate(name, row, place, key) for name in self.draft.schema.names}
        if who not in splits or any(path is None for path in paths.values()):
            return
        references = {name: f"{self.draft.root}/{path}" for name, path in paths.items()}
        labels = references.pop("labels", None)
        self.draft.records.append(Record(key, who, references, labels, covariates, splits[who], place))

    def _covariate(self, name: str, row: Row, place: str, record: str) -> Value:
        """Read one covariate; a fault is noted and read as missing."""
        covariate = self.draft.schema[name]
        try:
            value = _value(covariate, self.expressions[name], row)
            if value is not None and covariate.kind == "categorical" and covariate.levels is not None:
                value = covariate.levels[covariate.level_index(value)]
        except LdmError as error:
            kind = "covariate-not-numeric" if covariate.kind == "continuous" else "covariate-unknown-level"
            self._fault(place, kind, str(error), "correct the cell, or write n/a when it is not known", record)
            return None
        if value is None:
            self._missing_covariate(name, place, record)
        elif warning := covariate.warning(value):
            remedy = f"correct the cell, or widen data.covariates.{name}.range"
            self._fault(place, "covariate-out-of-range", warning, remedy, record)
        return value

    def _missing_covariate(self, name: str, place: str, record: str) -> None:
        policy = self.config["missing_covariate"]
        reason = f"'{record}' has no {name}"
        if policy == "error":
            remedy = "fill in the cell, or set data.missing_covariate to null (learned null) or drop"
            self._fault(place, "missing-covariate", reason, remedy, record)
        elif policy == "drop":
            remedy = "nothing, if that is meant: data.missing_covariate is drop"
            self.draft.warnings.append(Fault(place, "dropped-missing-covariate", reason, remedy, record))
            self.draft.dropped.add(record)

    def _check_ids(self) -> None:
        groups = defaultdict(list)
        for record in self.draft.records:
            groups[record.id.casefold()].append(record)
            if not is_safe_name(record.id):
                reason = f"id '{record.id}' is not safe as a file name"
                self._fault(record.place, "unsafe-id", reason, f"use {SAFE_NAMES}", record.id)
            if not record.subject.isprintable():
                reason = f"subject {record.subject!r} holds control characters"
                self._fault(record.place, "unsafe-id", reason, "use printable characters", record.id)
        for group in groups.values():
            for record in group if len(group) > 1 else ():
                others = ", ".join(other.place for other in group if other is not record)
                reason = f"id '{record.id}' is also that of {others}"
                remedy = "remove the row, or make ids unique, e.g. data.id='{participant_id}_{session_id}'"
                self._fault(record.place, "duplicate-id", reason, remedy, record.id)


def split_subjects(subjects: Collection[str], seed: int, fractions: Mapping[str, float]) -> dict[str, str]:
    """Assign subjects to splits in the order of a hash of (seed, subject): test, then valid, then train.

    The order of one subject never depends on the others, so subjects that are added later move only the few
    that stand at a boundary. A split with a fraction above 0 gets one subject at least when there are three.
    """
    order = sorted(subjects, key=lambda subject: hashlib.sha256(f"{seed}\t{subject}".encode()).digest())
    counts = {}
    for name in ("test", "valid"):
        fraction = fractions.get(name, 0.0)
        least = 1 if fraction > 0 and len(order) >= len(SPLITS) else 0
        counts[name] = max(least, round(fraction * len(order)))
    names = ["test"] * counts["test"] + ["valid"] * counts["valid"]
    names += ["train"] * max(0, len(order) - len(names))
    return dict(zip(order, names, strict=False))


def carved(splits: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """With ``split.carve_out``, validation subjects out of the training split; those of the table are test ones.

    Args:
        splits: subject -> split, of the table's column.
        settings: ``data.split``.
    """
    if settings["carve_out"] is None:
        return dict(splits)
    train = [who for who, split in splits.items() if split == "train"]
    held_out = {who: "test" for who in splits if who not in train}
    return held_out | split_subjects(train, settings["seed"], {"valid": settings["carve_out"]})


def _value(covariate: Covariate, expression: Expression, row: Row) -> Value:
    """Read a covariate from a row: a finite number, a level's text, or ``None`` when a column is missing."""
    if covariate.kind == "categorical":
        if expression.tree[0] != "column":
            raise LdmError(f"covariate '{covariate.name}' is categorical; its column cannot be an expression")
        return row[expression.columns[0]]

    def number(column: str) -> float | None:
        return None if row[column] is None else covariate.number(row[column])

    try:
        value = expression(number)
    except ZeroDivisionError as error:
        raise LdmError(f"covariate '{covariate.name}': '{expression.text}' divides by zero") from error
    return None if value is None else covariate.number(value)


def _file_templates(config: Mapping[str, Any]) -> dict[str, Template]:
    image = config["image"]
    channels = image if isinstance(image, Mapping) else {DEFAULT_CHANNEL: image}
    if "labels" in channels:
        raise LdmError("data.image: 'labels' is no channel; give the label images as data.labels")
    templates = {name: Template.parse(text, f"data.image.{name}") for name, text in channels.items()}
    if config["labels"] is not None:
        templates["labels"] = Template.parse(config["labels"], "data.labels")
    return templates


def _require_column(column: str, table: Table, where: str) -> None:
    if column not in table.columns:
        raise LdmError(
            f"{where}: the table has no column '{column}'.{nearest(column, table.columns)} "
            f"Columns: {', '.join(table.columns)}"
        )
