"""The first stage that a diffusion model stands on, and the cohort's posteriors under it, encoded once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import DictConfig
from rich.progress import track

from ldm.commands.run import plain, require_file
from ldm.commands.target import Target
from ldm.data.cohort import Cohort
from ldm.data.datamodule import CohortDataModule
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.latents.cache import PosteriorCache, cache_folder, write_cache
from ldm.latents.encode import CohortEncoder
from ldm.model.build import PIXELS, build_first_stage
from ldm.model.first_stage import FirstStage

logger = logging.getLogger(__name__)


def load_first_stage(config: DictConfig) -> FirstStage:
    """The first stage of the cohort; says so, with the number, when it is below the configured quality.

    Raises:
        LdmError: it has not been trained.
    """
    first_stage = FirstStage.load(require_file(config.first_stage, "first stage", "train-vae"))
    gate, psnr = config.vae.gate_psnr, first_stage.metrics.get("psnr")
    if psnr is None:
        logger.warning("The first stage %s has no recorded held-out PSNR.", config.first_stage)
    elif gate is not None and psnr < gate:
        logger.warning(
            "The first stage reaches %.2f dB held-out PSNR, below vae.gate_psnr=%.1f: samples cannot be better than "
            "its reconstructions. Train it longer, or give it more latent channels.",
            psnr,
            gate,
        )
    return first_stage


def pixel_space(preprocessing: Preprocessing) -> FirstStage:
    """The first stage that changes nothing, for what is generated."""
    channels = len(preprocessing.channels)
    network = {"kind": PIXELS, "spatial_dims": preprocessing.spatial_dims, "in_channels": channels}
    return FirstStage(build_first_stage(network), network, preprocessing)


def same_preprocessing(first_stage: FirstStage, preprocessing: Preprocessing) -> None:
    """Refuse a cohort that is prepared otherwise than the first stage's training images were.

    Args:
        first_stage: a trained one.
        preprocessing: of what is to be generated.

    Raises:
        LdmError: naming what differs.
    """
    ours, theirs = preprocessing.to_dict(), first_stage.preprocessing.to_dict()
    differing = [name for name in ours if name not in ("reference", "multiple", "shape") and ours[name] != theirs[name]]
    if differing:
        what = "; ".join(f"{name}: {ours[name]} now, {theirs[name]} for the first stage" for name in differing)
        raise LdmError(f"The first stage was trained on images prepared otherwise. {what}.")


def same_split(facts: Mapping[str, Any], cohort: Cohort, where: str | Path) -> None:
    """Refuse what was trained on another split of this cohort: subjects that are held out now may have trained it.

    Args:
        facts: ``cohort`` and ``split_sha256`` of what was trained, as a model's header has them.
        cohort: what is to be trained on.
        where: setting and file, for messages.

    Raises:
        LdmError: another split of the cohort.
    """
    ours, theirs = cohort.split_hash, facts.get("split_sha256")
    if facts.get("cohort") == cohort.name and theirs is not None and ours != theirs:
        raise LdmError(
            f"{where} was trained on another split of the cohort '{cohort.name}': split_sha256 {theirs}, now {ours}; "
            "subjects that are held out now may have trained it. Use the data settings that it was trained with, or "
            "train another of these; another cohort needs another data.name."
        )


def same_cohort(first_stage: FirstStage, cohort: Cohort, classes: LabelClasses | None, path: str | Path) -> None:
    """Refuse a first stage of this cohort that has seen other subjects, or masks of other label values.

    Of another cohort, by name, a first stage may be taken: what it was trained on is not held out here.

    Args:
        first_stage: a trained one.
        cohort: what is to be trained on.
        classes: of the label maps that are to be generated; None for images.
        path: of its file, for messages.

    Raises:
        LdmError: another split of the cohort, or other values of its classes.
    """
    facts = first_stage.facts
    if facts.get("cohort") != cohort.name:
        return
    same_split(facts, cohort, f"first_stage={path}")
    labels = facts.get("target", {}).get("labels")
    if classes is not None and labels is not None and LabelClasses.from_config(labels) != classes:
        raise LdmError(
            f"{path} was trained on masks of other label values: data.label_names is {dict(classes.values)} now, was "
            f"{labels}. Use the same, or train another with ldm train-vae."
        )


def posterior_cache(
    config: DictConfig,
    datamodule: CohortDataModule,
    first_stage: FirstStage,
    split: str,
    conditioners: Mapping[str, Any],
    target: Target,
) -> PosteriorCache:
    """The posteriors of a split, encoded now if they are not there yet (by the first process only)."""
    augmented = split == "train" and config.ldm.latents.variants > 1
    data = plain(config.data)
    keep_labels = config.ldm.latents.labels or "mask" in conditioners
    label_classes = LabelClasses.from_config(data["label_names"]) if keep_labels else None
    channels = datamodule.preprocessing.channels
    given = conditioners.get("image", {}).get("channels", ())
    diffused = [channels.index(name) for name in target.preprocessing.channels if target.classes is None]
    encoder = CohortEncoder(
        first_stage.network,
        datamodule.dataset(split),
        datamodule.schema,
        datamodule.augmentation,
        variants=config.ldm.latents.variants if augmented else 1,
        label_classes=label_classes,
        diffused=tuple(diffused) if given else None,
        conditions=tuple(channels.index(name) for name in given),
        targets=target.classes,
        spacing=datamodule.spacing,
        value_range=datamodule.preprocessing.value_range,
        seed=config.seed,
        device="cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu",
    )
    key = {
        "first_stage": first_stage.sha256,
        "preprocessing": datamodule.preprocessing.fingerprint(),
        "cohort": datamodule.cohort.split_hash,
        "records": datamodule.cohort.content_hash(),
        "split": split,
        "schema": datamodule.schema.to_dict(),
        "augment": augment_key(data["augment"]) if augmented else None,
        "labels": None if label_classes is None else {"shares": label_classes.meaning},
        **({"images": list(given)} if given else {}),
        **({"target": target.classes.meaning} if target.classes else {}),
        "variants": encoder.variants,
        "seed": config.seed if augmented else None,
        "dtype": config.ldm.latents.dtype,
    }
    folder = cache_folder(Path(config.latents_dir), key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # ranks that start together: one encodes, the others wait
        if not folder.is_dir():
            encode(encoder, folder, key, datamodule, first_stage, config.ldm.latents.dtype)
    return PosteriorCache(folder, key)


def augment_key(augment: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``data.augment`` names a cache: settings that came later where they are on, so that older caches stay."""
    return {name: value for name, value in augment.items() if value or not name.startswith("missing")}


def encode(encoder: CohortEncoder, folder: Path, key, datamodule, first_stage: FirstStage, dtype: str) -> None:
    """Write the cache, with a progress bar."""
    encoder.first_stage.to(encoder.device)
    factor = first_stage.network.downsampling_factor
    shape = (first_stage.network.latent_channels, *(side // factor for side in datamodule.image_shape[1:]))

    def items(start: int):
        return track(encoder.items(start), f"encoding {key['split']}", total=len(encoder), completed=start)

    write_cache(folder, key, items, len(encoder), shape, encoder.plane_channels, dtype)
