"""What the verbs share: the cohort, the shapes that fit the networks, the loggers."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig, open_dict

from ldm.commands.run import plain
from ldm.commands.safe import build
from ldm.data.cohort import Cohort
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import Record
from ldm.model.build import build_first_stage

logger = logging.getLogger(__name__)


def cohort_datamodule(config: DictConfig, batch_size: int = 1, patch_size: Any = None) -> CohortDataModule:
    """The cohort's data module, with a grid that both networks can halve as often as they need.

    Prepared arrays go beside the runs unless ``data.cache_dir`` says otherwise: a data folder is often read-only.
    """
    return CohortDataModule(
        data_section(config),
        multiple=grid_multiple(config),
        batch_size=batch_size,
        seed=config.seed,
        patch_size=patch_size,
    )


def cohort_alone(config: DictConfig) -> Cohort:
    """The checked cohort for those who want its records alone: no images are prepared, and no networks have to fit."""
    return prepared(CohortDataModule({**data_section(config), "cache": False}, multiple=1, seed=config.seed)).cohort


def data_section(config: DictConfig) -> dict[str, Any]:
    """The ``data`` section, plain, with the folder of prepared arrays."""
    data = plain(config.data)
    return {**data, "cache_dir": data["cache_dir"] or str(Path(config.runs_dir) / data["name"] / "cache")}


def grid_multiple(config: DictConfig) -> int:
    """Every side of an image has to be a multiple of this: first stage's factor times the U-Net's, patches included."""
    network = {**plain(config.vae.network), "in_channels": 1}
    with torch.device("meta"):
        factor = build_first_stage(network).downsampling_factor
    return factor * config.ldm.network.get("patch_size", 1) * 2 ** (len(config.ldm.network.channels) - 1)


def prepared(datamodule: CohortDataModule) -> CohortDataModule:
    """Check, preprocess and open the cohort outside a trainer."""
    datamodule.cache_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{datamodule.cache_dir}.lock"):  # ranks that start together: one prepares, the others wait
        datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def record_inputs(conditioners: Mapping[str, Any], records: Sequence[Record]) -> dict[str, list[Any]]:
    """The label map and the images of each record that a model with these conditioners may be given."""
    inputs: dict[str, list[Any]] = {}
    if "mask" in conditioners:
        inputs["mask"] = [record.labels for record in records]
    if "image" in conditioners:
        channels = conditioners["image"]["channels"]
        inputs["image"] = [{name: record.images[name] for name in channels} for record in records]
    return inputs


def loggers(config: DictConfig) -> list[Any]:
    """The loggers that are asked for beside ``metrics.jsonl``; they get the resolved configuration."""
    sections = {name: config.logger.extra[name].copy() for name in config.logger.extra}
    for section in sections.values():
        if str(section.get("_target_")).endswith(".WandbLogger") and "id" not in section:
            with open_dict(section):  # a resumed run goes on in the same panels
                section.update(id=run_id(Path(config.run_dir)), resume="allow")
    built = [build(section, f"logger.extra.{name}") for name, section in sections.items()]
    for one in built:
        one.log_hyperparams(plain(config))
    return built


def run_id(run_dir: Path) -> str:
    """A random name that stays with a run folder, in ``wandb_id``."""
    path = run_dir / "wandb_id"
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            path.write_text(secrets.token_hex(8))
        return path.read_text()


def voxels(shape: tuple[int, ...]) -> str:
    """A shape and its number of elements, for messages."""
    return f"{'x'.join(map(str, shape))} ({math.prod(shape):,} numbers)"
