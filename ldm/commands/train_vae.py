"""``ldm train-vae``: the first stage."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from ldm.commands.posteriors import same_split
from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared, voxels
from ldm.commands.target import LABELS, Target, check_target, find_target
from ldm.data.datamodule import CohortDataModule
from ldm.errors import LdmError
from ldm.model.build import PIXELS
from ldm.model.file import load_matching, read_header, read_tensors
from ldm.model.first_stage import KIND, FirstStage
from ldm.training.fit import check_trainer, fit
from ldm.training.panels import ReconstructionPanels
from ldm.training.vae import VAE

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Train the first stage and write ``model.safetensors``; returns the final validation metrics."""
    run_dir = Path(config.run_dir)
    if config.vae.network.kind == PIXELS:
        raise LdmError("vae=identity has nothing to train: go on with ldm train-ldm vae=identity.")
    check_trainer(plain(config.trainer))
    check_target(config)
    datamodule = prepared(cohort_datamodule(config, config.vae.batch_size, config.vae.patch_size))
    target = compressed(config, datamodule)
    module = build_vae(config, datamodule, target)
    if config.vae.init_from and not (run_dir / "last.ckpt").is_file():
        header = read_header(config.vae.init_from, KIND)
        same_split(header, datamodule.cohort, f"vae.init_from={config.vae.init_from}")
        logger.info("Starting from %s (%s).", config.vae.init_from, header.get("cohort"))
        load_matching(module.network, read_tensors(config.vae.init_from), config.vae.init_from)

    def save_model(metrics) -> None:
        FirstStage(
            module.network,
            module.config,
            target.preprocessing,
            {name.removeprefix("vae/val/"): value for name, value in metrics.items()},
            {
                "cohort": datamodule.cohort.name,
                "split_sha256": datamodule.cohort.split_hash,
                "steps": module.step,
                **({"target": target.facts} if target.classes else {}),
            },
        ).save(run_dir / "model.safetensors")

    discriminator = {name: value for name, value in plain(config.vae.discriminator).items() if name != "lr"}
    metrics = fit(
        module,
        datamodule,
        plain(config.trainer),
        run_dir,
        {
            "network": module.config,
            "preprocessing": target.preprocessing.fingerprint(),
            **({"labels": target.classes.meaning} if target.classes else {}),
            "split_sha256": datamodule.cohort.split_hash,
            "discriminator": discriminator if module.loss["adversarial_weight"] else None,
        },
        save_model,
        label=f"{datamodule.cohort.name} vae",
        monitor="vae/val/psnr",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
        callbacks=[ReconstructionPanels(run_dir, target.preprocessing.is_rgb)],
    )
    logger.info(
        "First stage: PSNR %.2f dB, SSIM %.3f on held-out images. Model: %s",
        metrics["vae/val/psnr"],
        metrics["vae/val/ssim"],
        run_dir / "model.safetensors",
    )
    return metrics


def compressed(config: DictConfig, datamodule: CohortDataModule) -> Target:
    """The cohort's images, all channels; with ``ldm.target=labels`` the masks of its label maps."""
    return find_target(config, datamodule) if config.ldm.target == LABELS else Target(datamodule.preprocessing)


def build_vae(config: DictConfig, datamodule: CohortDataModule, target: Target) -> VAE:
    """The module for this cohort; says how strongly it compresses."""
    vae = plain(config.vae)
    image_shape = (len(target.preprocessing.channels), *datamodule.image_shape[1:])
    network = {**vae["network"], "in_channels": image_shape[0]}
    torch.manual_seed(config.seed)
    module = VAE(
        network,
        vae["loss"],
        vae["optimizer"],
        vae["discriminator"],
        image_shape,
        target.preprocessing.value_range,
        config.trainer.log_every,
        config.seed,
        target.classes,
    )
    factor = module.network.downsampling_factor
    latent = (module.network.latent_channels, *(side // factor for side in image_shape[1:]))
    logger.info(
        "%s -> latent %s, compression %.0f : 1, %.2f M parameters.",
        voxels(image_shape),
        voxels(latent),
        math.prod(image_shape) / math.prod(latent),
        sum(p.numel() for p in module.network.parameters()) / 1e6,
    )
    return module
