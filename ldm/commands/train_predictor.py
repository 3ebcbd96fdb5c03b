"""``ldm train-predictor``: the network that reads covariates from real and generated images."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared
from ldm.model.predictor import Predictor, Targets
from ldm.training.fit import check_trainer, fit
from ldm.training.predictor import PredictorModule

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Train on the cohort's covariates and write ``model.safetensors``; returns the held-out metrics.

    The last state is kept, not the best one: the learning rate has come down to zero by then, and since nothing was
    chosen on the validation images, they still tell how good the predictor is.
    """
    check_trainer(plain(config.trainer))
    run_dir, settings = Path(config.run_dir), plain(config.predictor)
    datamodule = prepared(cohort_datamodule(config, settings["batch_size"]))
    cohort = datamodule.cohort
    targets = Targets.fit(cohort.schema, [record.covariates for record in cohort.split("train")], settings["targets"])
    network = {
        **settings["network"],
        "spatial_dims": config.data.spatial_dims,
        "in_channels": datamodule.image_shape[0],
        "out_channels": sum(targets.sizes.values()),
    }
    torch.manual_seed(config.seed)
    module = PredictorModule(
        network, targets, cohort.schema, settings["optimizer"], config.trainer.log_every, config.seed
    )

    def save_model(metrics) -> None:
        facts = {"cohort": cohort.name, "split_sha256": cohort.split_hash, "steps": module.step}
        Predictor(module.network, network, targets, datamodule.preprocessing, metrics, facts).save(
            run_dir / "model.safetensors"
        )

    metrics = fit(
        module,
        datamodule,
        plain(config.trainer),
        run_dir,
        {
            "network": network,
            "targets": targets.schema.to_dict(),
            "order": list(targets.schema.names),  # of the outputs; of two mappings it makes no difference
            "preprocessing": datamodule.preprocessing.fingerprint(),
            "split_sha256": cohort.split_hash,
        },
        save_model,
        label=f"{cohort.name} predictor",
        monitor="predictor/val/loss",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
    )
    logger.info("Held-out: %s. Model: %s", in_words(metrics), run_dir / "model.safetensors")
    return metrics


def in_words(metrics: dict[str, float]) -> str:
    """Accuracy, correlation and error of every target."""
    prefix = "predictor/val/"
    names = [name for name in metrics if name.startswith(prefix) and "/" in name.removeprefix(prefix)]
    return ", ".join(f"{name.removeprefix(prefix)} {metrics[name]:.3g}" for name in names)
