"""Where a run writes, what it is called, and what every run leaves behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ldm.diffusion.checks import check_count
from ldm.errors import LdmError
from ldm.files import write_text

RUN_DIR = "LDM_RUN_DIR"  # tells further ranks where the first one writes
SHARED = ("data", "vae", "ldm", "schedule", "experiment", "runs_dir", "seed")  # what means the same to every verb


def is_sweep() -> bool:
    """Whether this is one of the jobs of ``--multirun``."""
    return HydraConfig.get().mode.name == "MULTIRUN"


@contextlib.contextmanager
def run_folder(config: DictConfig) -> Iterator[Path]:
    """Settle the run folder once, for this process and all ranks it starts.

    A sweep's job writes where Hydra put it; a rank started by Lightning writes where the first rank does.
    """
    folder = config.run_dir
    if is_sweep():
        folder = HydraConfig.get().runtime.output_dir
    if "LOCAL_RANK" in os.environ and RUN_DIR in os.environ:
        folder = os.environ[RUN_DIR]
    folder = Path(folder).resolve()
    with open_dict(config):
        config.run_dir = str(folder)
    before = os.environ.get(RUN_DIR)
    os.environ[RUN_DIR] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(RUN_DIR)
        if before is not None:
            os.environ[RUN_DIR] = before


def plain(node: Any) -> Any:
    """A resolved configuration section as plain dicts and lists; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def check_counts(config: DictConfig, *names: str) -> None:
    """Refuse settings that are no whole number of at least 1, as these have to be.

    Raises:
        LdmError: naming the first.
    """
    for name in names:
        check_count(name, config[name])


def section(config: DictConfig, name: str) -> dict[str, Any]:
    """A section that is a mapping; null is an empty one.

    Raises:
        LdmError: it is something else.
    """
    value = plain(config[name])
    if value is not None and not isinstance(value, dict):
        raise LdmError(f"{name} is {value!r}; legal: {{key: value, ...}}, or null.")
    return value or {}


def write_config(config: DictConfig, folder: Path) -> None:
    """Write the resolved configuration to ``config.yaml``, atomically."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))


def require_file(path: Path, what: str, verb: str) -> Path:
    """``path``, or an error that says which command makes it: ``verb``, for the same data.

    Raises:
        LdmError: there is no such file.
    """
    if not Path(path).is_file():
        raise LdmError(f"There is no {what} at {path}. Train one first: {_command(verb)}")
    return Path(path)


def _command(verb: str) -> str:
    """``verb`` with those of the settings typed that it shares."""
    typed = [item for item in sys.argv[2:] if item.lstrip("+~").partition("=")[0].partition(".")[0] in SHARED]
    named = {item.partition("=")[0] for item in typed}
    if "data.name" in named and not named & {"data", "experiment"}:  # it would be the simulated cohort under that name
        typed.insert(0, "data=...")
    return shlex.join(["ldm", verb, *typed])
