"""``ldm train-gan``: the GAN baselines, on the same cohort as the diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from ldm.commands.nulls import check_nulls, lacking, learned_nulls
from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared, voxels
from ldm.commands.target import refuse_missing
from ldm.data.datamodule import CohortDataModule
from ldm.evaluation.instruments import find_instruments, merged, quick_sections
from ldm.evaluation.pictures import evenly
from ldm.model.gan import GAN
from ldm.training.fit import check_trainer, fit
from ldm.training.gan import LSGAN, MODULES
from ldm.training.panels import FigureCallback, ReconstructionPanels, SamplePanels

logger = logging.getLogger(__name__)

DRAWN = ("gan/train/adversarial", "gan/train/discriminator", "gan/val/pooled_kid", "gan/val/psnr")


def run(config: DictConfig) -> dict[str, float]:
    """Train a GAN and write ``model.safetensors``; returns the final validation metrics."""
    run_dir, gan = Path(config.run_dir), plain(config.gan)
    check_trainer(plain(config.trainer))
    refuse_missing(config)
    datamodule = prepared(cohort_datamodule(config, gan["batch_size"]))
    model = build_model(config, datamodule)
    module = build_module(config, datamodule, model)

    def save_model(metrics: Mapping[str, float]) -> None:
        model.header |= {"metrics": dict(metrics), "steps": module.step}
        model.save(run_dir / "model.safetensors")

    metrics = fit(
        module,
        datamodule,
        plain(config.trainer),
        run_dir,
        run_identity(model, gan["discriminator"]),
        save_model,
        label=f"{datamodule.cohort.name} gan",
        monitor="gan/val/pooled_kid",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
        callbacks=panels(config, datamodule, model),
    )
    logger.info("%s of %d steps. Model: %s", model.what, module.step, run_dir / "model.safetensors")
    return metrics


def run_identity(model: GAN, discriminator: Mapping[str, Any]) -> dict[str, Any]:
    """What a resume checkpoint has to agree with; ``discriminator`` is that section of the configuration."""
    same = ("method", "network", "encoder", "condition", "loss", "ema_decay", "split_sha256")
    return {
        **{name: model.header[name] for name in same},
        "discriminator": {name: value for name, value in discriminator.items() if name != "lr"},
        "preprocessing": model.preprocessing.fingerprint(),
        "covariates": list(model.schema.to_dict().items()),  # their order and ranges are what the codes mean
    }


def build_model(config: DictConfig, datamodule: CohortDataModule) -> GAN:
    """An untrained model for this cohort."""
    gan, (channels, *size) = plain(config.gan), datamodule.image_shape
    value_range = datamodule.preprocessing.value_range
    without_effect = ("stem", "refine_channels") if gan["network"]["stem"] == "none" else ()
    header = {
        "cohort": datamodule.cohort.name,
        "simulated": config.data.simulate is not None,
        "split_sha256": datamodule.cohort.split_hash,
        "method": gan["method"],
        "network": {
            **{name: value for name, value in gan["network"].items() if name not in without_effect},
            "spatial_dims": config.data.spatial_dims,
            "out_channels": channels,
            "image_size": size,
            "value_range": None if value_range is None else list(value_range),
        },
        "encoder": gan.get("encoder"),
        "condition": gan["condition"],
        "loss": gan["loss"],
        "ema_decay": gan["ema_decay"],
        "metrics": {},
        "seed": config.seed,
    }
    torch.manual_seed(config.seed)
    schema = datamodule.schema
    distribution = datamodule.cohort.distribution() if len(schema) else None
    model = GAN(header, datamodule.preprocessing, schema, distribution)
    train, valid = (codes(datamodule, split) for split in ("train", "valid"))
    model.header["learned_nulls"] = learned_nulls(gan["condition"], {}, lacking(model, train))
    check_nulls(model, valid)
    return model


def codes(datamodule: CohortDataModule, split: str) -> np.ndarray:
    """Encoded covariates of a split, ``(N, K)``."""
    return datamodule.schema.encode_table([record.covariates for record in datamodule.cohort.split(split)])


def build_module(config: DictConfig, datamodule: CohortDataModule, model: GAN) -> LSGAN:
    """The training of ``model``; says how large it is."""
    gan = plain(config.gan)
    module = MODULES[gan["method"]](
        model,
        gan["optimizer"],
        gan["discriminator"],
        gan["loss"],
        gan["ema_decay"],
        config.trainer.log_every,
        config.seed,
    )
    rows = [record.covariates for record in datamodule.cohort.split("train")]
    module.fit_conditioners(torch.from_numpy(datamodule.schema.encode_table(rows)))
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (module.network, module.discriminator)]
    logger.info(
        "%s of %s: %.1f M parameters to train, and %.1f M of the discriminator; condition: %s.",
        model.what,
        voxels(datamodule.image_shape),
        *sizes,
        model.condition_in_words(),
    )
    return module


def panels(config: DictConfig, datamodule: CohortDataModule, model: GAN) -> list[FigureCallback]:
    """Fixed-seed samples at covariates of held-out subjects, evenly from the table's; of a VAE-GAN, reconstructions."""
    valid = datamodule.cohort.split("valid")
    rows = [dict(valid[case].covariates) for case in evenly(len(valid), config.gan.val_samples)]
    sections = quick_sections(plain(config.data).get("instrument"))
    found = find_instruments(sections, datamodule.preprocessing, datamodule.schema)
    figures: list[FigureCallback] = [SamplePanels(config.run_dir, rows, None, merged(found), group="gan", drawn=DRAWN)]
    if model.reconstructs:
        figures.insert(0, ReconstructionPanels(config.run_dir, model.preprocessing.is_rgb, "gan", drawn=()))
    return figures
