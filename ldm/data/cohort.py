"""The cohort: who is in it, where the images are, which covariates go with them, and how it is split.

Reading happens in two steps, so that everything wrong is found at once. `draft_cohort` (`ldm.data.draft`) reads the
table and collects the faults of rows; `assemble` leaves out what the policy leaves out, fits the covariate schema on
the training split and finds the faults of the whole. Between the two, `ldm.data.checks` reads the images.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.data.cohort_config import SPLITS
from ldm.data.distribution import CovariateDistribution
from ldm.data.draft import Draft, Record, draft_cohort
from ldm.data.faults import Fault, render
from ldm.data.schema import Covariate, CovariateSchema, Value
from ldm.errors import LdmError, nearest


@dataclass(frozen=True)
class Cohort:
    """A cohort that is ready for use.

    Attributes:
        name: its name.
        root: folder that holds the files.
        records: in the order of the table.
        schema: covariates, fitted on the training split.
        seed: seed of the split; ``None`` when a column of the table decides.
        contents: reference -> hash of what the file holds, where it has been read (`ldm.data.checks`).
    """

    name: str
    root: Path
    records: tuple[Record, ...]
    schema: CovariateSchema
    seed: int | None = None
    contents: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_config(cls, data_cfg: Mapping[str, Any] | DictConfig) -> Cohort:
        """Read the cohort that a ``data`` configuration describes, without reading an image.

        Raises:
            LdmError: with the whole report, when anything is at fault and ``data.faults`` is ``stop``, or
                when a fault concerns the cohort as a whole.
        """
        draft = draft_cohort(data_cfg)
        affected = {fault.record for fault in draft.faults if fault.record} if draft.leave_out else set()
        cohort, late, _ = assemble(draft, affected) if draft.readable else (None, [], [])
        faults = [*draft.faults, *late]
        if cohort is None or any(not draft.leave_out or fault.record is None for fault in faults):
            raise LdmError(render(faults, f"{draft.name}: faults in the cohort"))
        return cohort

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the image channels."""
        return tuple(self.records[0].images)

    @functools.cached_property
    def split_hash(self) -> str:
        """SHA-256 over the sorted lines ``subject<TAB>split``: equal when two runs share their split."""
        lines = sorted({f"{record.subject}\t{record.split}\n" for record in self.records})
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def contents_of(self, record: Record) -> list[str]:
        """Hashes of what the files of a record hold, wherever they lie; the cohort must have been checked."""
        return [self.contents[reference] for reference in record.references]

    def content_hash(self, records: Iterable[Record] | None = None) -> str:
        """SHA-256 over ids, covariates and the content of the files of ``records``, by default of all.

        What was derived from them is out of date when it changes: a row was corrected or moved, an image replaced.
        A copy of the files in another folder, as jobs make on the disk of a node, has the same.
        """
        chosen = self.records if records is None else records
        rows = [[record.id, self.contents_of(record), record.covariates] for record in chosen]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def split(self, name: str) -> list[Record]:
        """Return the records of ``train``, ``valid`` or ``test``."""
        if name not in SPLITS:
            raise LdmError(f"there is no split '{name}'.{nearest(name, SPLITS)} Legal: {', '.join(SPLITS)}")
        return [record for record in self.records if record.split == name]

    def distribution(self) -> CovariateDistribution:
        """Return the distribution of the training covariates: each subject's first record counts, once."""
        first = {record.subject: record.covariates for record in reversed(self.split("train"))}
        return CovariateDistribution.fit(self.schema, list(first.values()))


def assemble(draft: Draft, affected: Collection[str]) -> tuple[Cohort | None, list[Fault], list[Fault]]:
    """Make the cohort of the records that are neither ``affected`` nor dropped.

    Returns:
        The cohort (``None`` when there is no schema to be had), the faults of the whole and of records that
        only show now, and warnings.
    """
    records = [record for record in draft.kept if record.id not in affected]
    faults = _empty_splits(draft, records)
    train = [record.covariates for record in records if record.split == "train"]
    faults += [fault for covariate in draft.schema if (fault := _constant(covariate, train))]
    if not train or any(fault.kind == "covariate-empty" for fault in faults):
        return None, faults, []
    schema = draft.schema.fit(train)
    unknown = [fault for record in records for fault in _unknown_levels(schema, record)]
    if draft.leave_out:
        gone = {fault.record for fault in unknown}
        records = [record for record in records if record.id not in gone]
        if gone:
            faults = [fault for fault in faults if fault.kind != "empty-split"] + _empty_splits(draft, records)
    warnings = [*_no_test_split(records), *_outside_fitted(draft, schema, records)]
    seed = draft.config["split"]["seed"] if draft.config["split"]["column"] is None else None
    cohort = Cohort(draft.name, draft.root, tuple(records), schema, seed)
    return cohort, faults + unknown, warnings


def _empty_splits(draft: Draft, records: Iterable[Record]) -> list[Fault]:
    counts = Counter(record.split for record in records)
    column = draft.config["split"]["column"]
    where, remedy = "data.split.fractions", "raise the split's fraction, or give more subjects"
    if column is not None:
        where, remedy = f"data.split.column={column}", "mark rows as train and as valid in that column"
    return [
        Fault(where, "empty-split", f"no record is left in the {name} split", remedy)
        for name in ("train", "valid")
        if not counts[name]
    ]


def _no_test_split(records: Iterable[Record]) -> list[Fault]:
    if any(record.split == "test" for record in records):
        return []
    remedy = "nothing, if test subjects are kept elsewhere; otherwise evaluation has no subjects of its own"
    return [Fault("data.split", "no-test-split", "no record is in the test split", remedy)]


def _constant(covariate: Covariate, rows: Sequence[Mapping[str, Value]]) -> Fault | None:
    given = {row[covariate.name] for row in rows if row[covariate.name] is not None}
    if len(given) > 1 or not rows:
        return None
    kind = "covariate-constant" if given else "covariate-empty"
    reason = (
        f"'{covariate.name}' is {next(iter(given))} in every training row" if given else "no training row has a value"
    )
    remedy = "a model can learn nothing from it: take it out of data.covariates, or give more subjects"
    return Fault(f"data.covariates.{covariate.name}", kind, reason, remedy)


def _unknown_levels(schema: CovariateSchema, record: Record) -> list[Fault]:
    """Levels that the training split does not have."""
    faults = []
    for covariate in schema:
        value = record.covariates[covariate.name]
        if covariate.kind == "categorical" and value is not None and value not in covariate.levels:
            reason = f"{covariate.name} is '{value}', which no training row has"
            remedy = "put a subject with that level into the training split, or write n/a"
            faults.append(Fault(record.place, "covariate-unknown-level", reason, remedy, record.id))
    return faults


def _outside_fitted(draft: Draft, schema: CovariateSchema, records: Iterable[Record]) -> list[Fault]:
    """Held-out values outside a range that was fitted (a configured range makes them faults of their own)."""
    remedy = "nothing, or configure the covariate's range; outside it the model extrapolates"
    return [
        Fault(record.place, "covariate-outside-training", warning, remedy, record.id)
        for record in records
        for covariate in schema
        if draft.schema[covariate.name].range is None
        and (warning := covariate.warning(record.covariates[covariate.name]))
    ]
