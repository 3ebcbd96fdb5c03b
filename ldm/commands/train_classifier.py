"""``ldm train-classifier``: a classifier of the noisy latents of a trained diffusion model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, open_dict

from ldm.commands.control import first_stage_of
from ldm.commands.posteriors import posterior_cache, same_preprocessing
from ldm.commands.run import plain, require_file, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared
from ldm.commands.target import Target
from ldm.data.cohort import Cohort
from ldm.data.schema import Covariate, CovariateSchema
from ldm.diffusion.checks import check_choice
from ldm.errors import LdmError
from ldm.model.classifier import Classifier, noisy_space
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.classifier import ClassifierModule
from ldm.training.data import LatentDataModule
from ldm.training.fit import check_trainer, fit

logger = logging.getLogger(__name__)

WEIGHTS = ("balanced", "none")


def run(config: DictConfig) -> dict[str, float]:
    """Train on the model's latents and write ``model.safetensors``; returns the held-out metrics.

    The last state is kept, not the best one: nothing is chosen on the validation images, so they still tell.
    """
    check_trainer(plain(config.trainer))
    run_dir, settings = Path(config.run_dir), plain(config.classifier)
    check_choice("classifier.class_weights", settings["class_weights"], WEIGHTS)
    path = require_file(config.model, "diffusion model", "train-ldm")
    model = LatentDiffusionModel.load(path)
    take_networks(config, model)
    datamodule = prepared(cohort_datamodule(config))
    cohort = datamodule.cohort
    expect_cohort_of(model, cohort, path)
    target = find_target(cohort.schema, settings["target"])
    counts = level_counts(cohort, target)
    first_stage, conditioners = first_stage_of(model), model.header.get("conditioners", {})
    images = Target(replace(datamodule.preprocessing, channels=model.preprocessing.channels))
    same_preprocessing(first_stage, images.preprocessing)
    train, valid = (
        posterior_cache(config, datamodule, first_stage, split, conditioners, images) for split in ("train", "valid")
    )
    network = {
        **settings["network"],
        "latent_shape": list(model.latent_shape),
        "num_classes": len(target.levels),
    }
    weights = class_weights(counts, target, settings["class_weights"])
    torch.manual_seed(config.seed)
    module = ClassifierModule(
        network, model, target, weights, settings["optimizer"], config.trainer.log_every, config.seed
    )
    space = noisy_space(model)

    def save_model(metrics: Mapping[str, float]) -> None:
        facts = {
            "cohort": cohort.name,
            "split_sha256": cohort.split_hash,
            "steps": module.step,
            "model_sha256": model.header["tensors_sha256"],
        }
        Classifier(module.network, network, target, space, metrics, facts).save(run_dir / "model.safetensors")

    metrics = fit(
        module,
        LatentDataModule(train, valid, cohort, settings["batch_size"], config.seed),
        plain(config.trainer),
        run_dir,
        {
            "network": network,
            "target": CovariateSchema([target]).to_dict(),
            "class_weights": settings["class_weights"],
            "space": space,
            "split_sha256": cohort.split_hash,
        },
        save_model,
        label=f"{cohort.name} classifier",
        monitor="classifier/val/loss",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
    )
    logger.info(
        "Held-out balanced accuracy %.3f over all times, %.3f in the least noisy tenth. Model: %s",
        metrics["classifier/val/balanced_accuracy"],
        metrics["classifier/val/balanced_accuracy_bin/0"],
        run_dir / "model.safetensors",
    )
    return metrics


def take_networks(config: DictConfig, model: LatentDiffusionModel) -> None:
    """Let the grid of the cohort be that of the model's networks, whatever the configuration says of them."""
    with open_dict(config):
        config.vae.network, config.ldm.network = model.header["first_stage"], model.header["denoiser"]


def expect_cohort_of(model: LatentDiffusionModel, cohort: Cohort, path: Path) -> None:
    """Refuse another split, or other covariates, than the diffusion model was trained on.

    Raises:
        LdmError: naming what differs.
    """
    if model.header["split_sha256"] != cohort.split_hash:
        raise LdmError(
            f"{path} was trained on another split of the cohort than data.split gives now: its training subjects "
            "could be among the validation ones. Use the same data settings as for training."
        )
    if model.schema != cohort.schema:
        raise LdmError(
            f"{path} knows the covariates {', '.join(model.schema.names) or 'none'}; the cohort's, "
            f"{', '.join(cohort.schema.names) or 'none'}, are others, or have other levels or ranges: set "
            "data.covariates as for training."
        )


def find_target(schema: CovariateSchema, name: str | None, where: str = "classifier.target") -> Covariate:
    """The categorical covariate ``name``, or the only one.

    Raises:
        LdmError: no such covariate, not a categorical one, or several to choose from.
    """
    legal = [covariate.name for covariate in schema if covariate.kind == "categorical"]
    if name is None:
        if len(legal) != 1:
            raise LdmError(f"{where} is not set; categorical covariates: {', '.join(legal) or 'none'}.")
        name = legal[0]
    if schema[name].kind != "categorical":
        raise LdmError(f"{where} '{name}' is continuous; categorical covariates: {', '.join(legal) or 'none'}.")
    return schema[name]


def level_counts(cohort: Cohort, target: Covariate) -> Counter[str]:
    """Training images of every level.

    Raises:
        LdmError: a level without training images, or a split in which all images are of one.
    """
    for split in ("train", "valid"):
        values = [record.covariates[target.name] for record in cohort.split(split)]
        counts = Counter(target.levels[target.level_index(value)] for value in values if value is not None)
        if split == "train":
            of_training = counts
        if len(counts) < 2:
            raise LdmError(
                f"classifier.target '{target.name}': all {sum(counts.values())} images of the {split} split are "
                f"'{next(iter(counts), 'n/a')}'; a classifier needs images of two levels or more in it."
            )
    missing = [level for level in target.levels if not of_training[level]]
    if missing:
        raise LdmError(f"classifier.target '{target.name}': no training image is '{missing[0]}'; take the level out.")
    return of_training


def class_weights(counts: Mapping[str, int], target: Covariate, kind: str) -> Sequence[float]:
    """Weights ``(L,)`` of the levels, 1 on the average over training images."""
    if kind == "none":
        return [1.0] * len(target.levels)
    numbers = np.array([counts[level] for level in target.levels], np.float64)
    return (numbers.sum() / (len(numbers) * numbers)).tolist()
