"""``ldm train-segmenter``: the instrument that measures volumes in real and generated images."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared
from ldm.commands.target import unnamed_values
from ldm.data.labels import LabelClasses
from ldm.errors import LdmError
from ldm.model.segmenter import Segmenter
from ldm.training.fit import check_trainer, fit
from ldm.training.segmenter import SegmenterModule

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Train on the cohort's label maps and write ``model.safetensors``; returns the held-out metrics."""
    if config.data.labels is None:
        raise LdmError("train-segmenter needs label maps: set data.labels and data.label_names.")
    check_trainer(plain(config.trainer))
    run_dir = Path(config.run_dir)
    labels = LabelClasses.from_config(plain(config.data).get("label_names"))
    datamodule = prepared(cohort_datamodule(config, config.segmenter.batch_size))
    unnamed = unnamed_values(labels, datamodule)
    network = {
        **plain(config.segmenter.network),
        "spatial_dims": config.data.spatial_dims,
        "in_channels": datamodule.image_shape[0],
        "out_channels": len(labels),
    }
    voxel = 1.0 if datamodule.spacing is None else float(np.prod(datamodule.spacing))
    torch.manual_seed(config.seed)
    module = SegmenterModule(
        network, labels, plain(config.segmenter.optimizer), voxel, config.trainer.log_every, config.seed
    )

    def save_model(metrics) -> None:
        facts = {
            "cohort": datamodule.cohort.name,
            "split_sha256": datamodule.cohort.split_hash,
            "steps": module.step,
            "unnamed": unnamed,
        }
        Segmenter(module.network, network, labels, datamodule.preprocessing, metrics, facts).save(
            run_dir / "model.safetensors"
        )

    metrics = fit(
        module,
        datamodule,
        plain(config.trainer),
        run_dir,
        {
            "network": network,
            "labels": labels.meaning,
            "preprocessing": datamodule.preprocessing.fingerprint(),
            "split_sha256": datamodule.cohort.split_hash,
        },
        save_model,
        label=f"{datamodule.cohort.name} segmenter",
        monitor="segmenter/val/dice",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
    )
    dice = metrics.get("segmenter/val/dice", math.nan)  # no held-out image has a class
    logger.info("Held-out Dice %.3f. Model: %s", dice, run_dir / "model.safetensors")
    return metrics
