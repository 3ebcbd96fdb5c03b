"""``ldm check``: all faults of a cohort in one report."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from ldm.commands.stages import cohort_datamodule
from ldm.data.checks import CheckReport, check_cohort
from ldm.errors import LdmError
from ldm.files import write_json


def run(config: DictConfig) -> CheckReport:
    """Check the cohort; prints the report and writes ``check.json``.

    Raises:
        LdmError: there are faults that stop, see ``data.faults``.
    """
    datamodule = cohort_datamodule(config)
    report = check_cohort(datamodule.config, datamodule.cache_dir, multiple=datamodule.multiple)
    write_json(Path(config.run_dir) / "check.json", report.to_dict())
    sys.stdout.write(report.render() + "\n")
    if report.stopping:
        raise LdmError(f"{len(report.stopping)} faults in cohort '{report.name}', listed above.")
    return report
