"""The subjects that no stage was trained on, as every verb that measures a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ldm.commands.stages import cohort_datamodule, prepared
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import Record
from ldm.data.images import read
from ldm.errors import LdmError
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.pictures import evenly
from ldm.evaluation.reconstruction import HELD_OUT_SPLITS
from ldm.model.generative import Generative
from ldm.model.output import in_model_space


def model_cohort(config: DictConfig, model: Generative, path: Path) -> CohortDataModule:
    """The cohort that a model was trained on, with the same split.

    Raises:
        LdmError: the model was imported, or trained on another split.
    """
    expect_a_split(model, path)
    datamodule = prepared(cohort_datamodule(config))
    if datamodule.cohort.split_hash != model.header["split_sha256"]:
        raise LdmError(
            f"{path} was trained on another split of the cohort than data.split gives now: its training subjects "
            "could be among the held-out ones. Use the same data settings as for training."
        )
    return datamodule


def expect_a_split(model: Generative, path: Path) -> None:
    """Refuse a model whose training subjects are not known.

    Raises:
        LdmError: it was imported.
    """
    if model.header["split_sha256"] is None:
        raise LdmError(
            f"{path} was imported (ldm import-weights) and has no split: whom it was trained on is not known, so no "
            f"subject can be called held out. Draw from it (ldm sample model={path} ...) and compare the folder with "
            "images that it has not seen: ldm evaluate real=DIR synthetic=DIR."
        )


def held_out_set(datamodule: CohortDataModule, channels: Sequence[str], n: int) -> tuple[ImageSet, list[Record]]:
    """Held-out images with their covariates and subjects, and their records, those that ``n`` samples ask as first."""
    images, rows, records = evenly_first(n, *held_out(datamodule, channels))
    return ImageSet(images, rows, [record.subject for record in records]), records


def held_out(
    datamodule: CohortDataModule, channels: Sequence[str]
) -> tuple[list[np.ndarray], list[dict[str, Any]], list[Record]]:
    """Images ``(C, *S)``, covariate rows and records of the subjects that no stage was trained on.

    Only those channels that the model generates.
    """
    images, rows, records = [], [], []
    chosen = [datamodule.preprocessing.channels.index(name) for name in channels]
    for split in HELD_OUT_SPLITS:
        dataset = datamodule.dataset(split)
        for position in range(len(dataset)):
            item = dataset[position]
            records.append(datamodule.cohort.records[item["index"]])
            images.append(item["image"][chosen].float().numpy())
            rows.append(dict(records[-1].covariates))
    if not images:
        raise LdmError(f"cohort '{datamodule.cohort.name}' has no held-out subjects; see data.split.")
    return images, rows, records


def evenly_first(n: int, *lists: Sequence[Any]) -> list[list[Any]]:
    """Lists of equal length in one new order: first ``n`` evenly from all, then the others.

    A table is often sorted, and the first rows would all be of one class.
    """
    total = len(lists[0])
    chosen = evenly(total, n)
    order = [*chosen, *sorted(set(range(total)) - set(chosen))]
    return [[one[i] for i in order] for one in lists]


def read_sample(model: Generative, paths: Sequence[Path]) -> np.ndarray:
    """A written sample, all its files together, on the model's grid and in its range: ``(C, *S)``."""
    recipe = model.preprocessing
    array = np.concatenate([read(path, spatial_dims=recipe.spatial_dims).array for path in paths])  # (C, *file)
    return in_model_space(recipe, array)  # (C, *S)
