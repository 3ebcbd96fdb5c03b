"""``ldm train-matcher``: the network that recognises training scans in generated images."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared
from ldm.diffusion.checks import check_count
from ldm.errors import LdmError
from ldm.model.matcher import Matcher
from ldm.training.fit import check_trainer, fit
from ldm.training.matcher import MatcherModule
from ldm.training.views import ViewDataModule, Views

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Train on the cohort's training split and write ``model.safetensors``; returns the validation metrics.

    The last state is kept, not the best one: nothing is chosen on scans that an audit calls held out.
    """
    check_trainer(plain(config.trainer))
    run_dir, settings = Path(config.run_dir), plain(config.matcher)
    views, pool = Views.from_config(settings["views"]), settings["pool"]
    check_count("matcher.pool", pool)
    if settings["batch_size"] < 2 or settings["temperature"] <= 0:
        raise LdmError(
            f"matcher.batch_size is {settings['batch_size']} and matcher.temperature {settings['temperature']}; legal: "
            "2 or more, and above 0."
        )
    datamodule = prepared(cohort_datamodule(config))
    cohort = datamodule.cohort
    network = {
        **settings["network"],
        "spatial_dims": config.data.spatial_dims,
        "in_channels": datamodule.image_shape[0],
    }
    torch.manual_seed(config.seed)
    module = MatcherModule(
        network, settings["optimizer"], settings["temperature"], config.trainer.log_every, config.seed
    )

    def save_model(metrics) -> None:
        facts = {"cohort": cohort.name, "split_sha256": cohort.split_hash, "steps": module.step}
        matcher = Matcher(module.network, network, datamodule.preprocessing, pool, asdict(views), metrics, facts)
        matcher.save(run_dir / "model.safetensors")

    metrics = fit(
        module,
        ViewDataModule(datamodule, views, settings["batch_size"], config.seed, pool),
        plain(config.trainer),
        run_dir,
        {
            "network": network,
            "views": asdict(views),
            **({"pool": pool} if pool > 1 else {}),
            "temperature": settings["temperature"],
            "preprocessing": datamodule.preprocessing.fingerprint(),
            "split_sha256": cohort.split_hash,
        },
        save_model,
        label=f"{cohort.name} matcher",
        monitor="matcher/val/recognised",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
    )
    logger.info(
        "%.1f %% of the validation scans are recognised in another view. Model: %s",
        100 * metrics["matcher/val/recognised"],
        run_dir / "model.safetensors",
    )
    return metrics
