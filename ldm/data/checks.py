"""Check a cohort before anything is trained on it: every file is read, and every fault told in one report.

`ldm.data.inspection` reads the files, `ldm.data.file_faults` judges them; this module joins that with what the table
says (`ldm.data.cohort`) into one report.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ldm.data.cohort import Cohort, assemble
from ldm.data.cohort_config import SPLITS
from ldm.data.draft import Draft, draft_cohort
from ldm.data.faults import Fault, render
from ldm.data.file_faults import file_faults, file_warnings, files_without_row
from ldm.data.grids import model_grid, unlike_sizes, volumes_as_channels
from ldm.data.inspection import FileFacts, FileReader
from ldm.data.plausibility import implausible_values
from ldm.errors import LdmError

__all__ = ["CheckReport", "Fault", "check_cohort"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        name: the cohort's name.
        policy: ``stop`` or ``leave_out``.
        faults: everything that is wrong.
        warnings: what deserves a look and stops nothing.
        cohort: the cohort after the policy; ``None`` when the faults stop it.
        facts: counts, shapes, spacing, the model's grid, split hash, files read and taken from the cache, seconds.
    """

    name: str
    policy: str
    faults: tuple[Fault, ...]
    warnings: tuple[Fault, ...]
    cohort: Cohort | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def stopping(self) -> tuple[Fault, ...]:
        """The faults that forbid to go on: all under ``stop``, else those of the whole cohort."""
        return tuple(fault for fault in self.faults if self.policy == "stop" or fault.record is None)

    def raise_for_policy(self) -> None:
        """Raise the rendered report as an LdmError if any fault stops."""
        if self.stopping:
            raise LdmError(self.render())

    def render(self) -> str:
        """Return the report as text: facts, faults and warnings grouped by kind, and the verdict."""
        facts = "\n".join(f"  {key:<12}{_plain(self.facts[key])}" for key in self.facts if key != "left_out")
        parts = [
            f"cohort {self.name}\n{facts}",
            render(self.faults, "faults"),
            render(self.warnings, "warnings"),
            self._verdict(),
        ]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "name": self.name,
            "policy": self.policy,
            "verdict": self._verdict(),
            "facts": self.facts,
            "faults": [fault.to_dict() for fault in self.faults],
            "warnings": [warning.to_dict() for warning in self.warnings],
        }

    def _verdict(self) -> str:
        if not self.faults:
            return "No faults."
        if not self.stopping:
            return f"Left out {len(self.facts['left_out'])} records, as data.faults=leave_out asks."
        if self.policy == "stop" and all(fault.record is not None for fault in self.faults):
            return "Stopped. Mend the faults, or set data.faults=leave_out to go on without these records."
        return "Stopped. Faults of the whole cohort have to be mended."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "-" if value is None else str(value)


def check_cohort(
    data_cfg: Mapping[str, Any] | DictConfig,
    cache_dir: Path | None = None,
    progress: bool = True,
    multiple: int | Sequence[int] = 1,
) -> CheckReport:
    """Read the table and every file of a cohort and report all that is wrong.

    Args:
        data_cfg: the ``data`` configuration (``conf/data/base.yaml`` explains every key).
        cache_dir: where results are kept, so that unchanged files are not read again; ``None``: nowhere.
        progress: show a progress bar on a terminal.
        multiple: what the shape of the model's grid must be a multiple of, one number or one an axis.

    Raises:
        LdmError: only when the configuration or the table itself cannot be read; faults are in the report,
            and :meth:`CheckReport.raise_for_policy` turns them into an error.
    """
    start = time.monotonic()
    draft = draft_cohort(data_cfg)
    reader = FileReader(draft, cache_dir)
    files = reader.read_all(progress)
    sizes, size_warnings = unlike_sizes(draft, files)
    # Rows that stand twice have their files' faults twice.
    faults = list(dict.fromkeys([*draft.faults, *file_faults(draft, files), *sizes]))
    affected = {fault.record for fault in faults if fault.record} if draft.leave_out else set()
    cohort, late, notes = assemble(draft, affected) if draft.readable else (None, [], [])
    faults += late
    warnings = [*draft.warnings, *implausible_values(draft), *notes, *file_warnings(draft, files), *size_warnings]
    warnings += [*volumes_as_channels(draft, files), *files_without_row(draft)]
    warnings = list(dict.fromkeys(warnings))
    left_out = sorted({fault.record for fault in faults if fault.record}) if draft.leave_out else []
    stops = any(not draft.leave_out or fault.record is None for fault in faults)
    if cohort is not None:
        cohort = replace(cohort, contents={ref: one.content for ref, one in files.items()})
    facts = {
        **_summary(draft, cohort, files, multiple),
        "files": len(files),
        "from_cache": reader.cached,
        "seconds": round(time.monotonic() - start, 2),
        "left_out": left_out,
    }
    if left_out:
        logger.warning("%s: left out %d records at fault: %s", draft.name, len(left_out), ", ".join(left_out))
    return CheckReport(
        draft.name, draft.config["faults"], tuple(faults), tuple(warnings), None if stops else cohort, facts
    )


def _summary(
    draft: Draft, cohort: Cohort | None, files: Mapping[str, FileFacts], multiple: int | Sequence[int]
) -> dict[str, Any]:
    records = draft.kept if cohort is None else cohort.records
    good = [files[ref] for record in records for ref in record.images.values() if files[ref].kind is None]
    shapes = np.array([facts.shape for facts in good if len(facts.shape) == draft.config["spatial_dims"] + 1])
    spacings = Counter(facts.spacing for facts in good if facts.spacing is not None)
    return {
        "root": str(draft.root),
        "records": len(records),
        "subjects": len({record.subject for record in records}),
        "splits": {split: sum(record.split == split for record in records) for split in SPLITS},
        "split_hash": None if cohort is None else cohort.split_hash,
        "shape_min": shapes.min(axis=0).tolist() if len(shapes) else None,
        "shape_max": shapes.max(axis=0).tolist() if len(shapes) else None,
        "spacing_mm": list(spacings.most_common(1)[0][0]) if spacings else None,
        "spacings": len(spacings),
        "model_grid": model_grid(draft.config, records, files, multiple),
    }
