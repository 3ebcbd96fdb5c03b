"""``ldm audit``: are samples copies of the training scans?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import track

from ldm.applications.release import asked_of
from ldm.commands.held_out import expect_a_split
from ldm.commands.run import check_counts, plain, require_file
from ldm.commands.sample import asked_rows, asked_table, draw, load_model
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.data.datamodule import CohortDataModule
from ldm.data.images import read
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.audit import AuditResult, AuditSettings, Scans, audit, check_subjects
from ldm.evaluation.audit_report import pair_pictures, write_audit_page
from ldm.evaluation.spaces import audit_spaces, check_matcher, checked_flips, has_autoencoder, reconstruction
from ldm.files import write_json
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.matcher import Matcher
from ldm.model.output import as_written, file_ends, grouped, in_model_space
from ldm.model.provenance import PROVENANCE, RELEASE, read_provenance

logger = logging.getLogger(__name__)

SETTINGS = ("rate", "alpha", "recall", "planted", "seed")
NOT_PASSED = 3  # exit status


def run(config: DictConfig) -> AuditResult:
    """Audit samples against the cohort's training split; writes ``audit.json`` and ``audit.html``.

    Raises:
        SystemExit: with status 3, when the audit does not pass.
    """
    check_counts(config, "n", "batch_size", "planted")
    settings = AuditSettings(**{name: config[name] for name in SETTINGS})
    folder = Path(config.run_dir)
    model, path = optional_model(config)
    datamodule = prepared(cohort_datamodule(config))
    recipe = datamodule.preprocessing if model is None else model.preprocessing
    expect_same_split(model, path, datamodule)
    flips = plain(config.flip_axes)
    flips = checked_flips([flips] if isinstance(flips, int) else flips, recipe.spatial_dims)
    matcher = Matcher.load(require_file(config.matcher_path, "matcher", "train-matcher"), _device(model))
    check_matcher(matcher, config.matcher_path, recipe, datamodule.cohort)
    train, held_out = (real_scans(datamodule, recipe, splits) for splits in (("train",), ("test", "valid")))
    check_subjects(train, held_out)
    source = synthetic_folder(config, model, path, folder)
    synthetic = list(read_folder(recipe, source))
    protocol = {
        "cohort": datamodule.cohort.name,
        "split_sha256": datamodule.cohort.split_hash,
        "matcher_sha256": matcher.sha256,
        "matcher": {**matcher.facts, **matcher.metrics},
        **origin(source, model),
        "images": "as written to files and read again",
        "flip_axes": list(flips),
    }
    linked = plain(config.data).get("subjects_linked", True)
    spaces = audit_spaces(matcher, model, flips)
    rebuild = partial(reconstruction, model) if has_autoencoder(model) else None
    shown = recipe.shown_range
    result = audit(synthetic, train, held_out, spaces, settings, shown, rebuild, linked, protocol, _watch)
    pictures = pair_pictures(result, synthetic, train, folder / "figures", recipe.value_range, recipe.is_rgb)
    write_json(folder / "audit.json", result.to_dict())
    page = write_audit_page(folder / "audit.html", result.to_dict(), pictures)
    for line in result.lines:
        logger.log(logging.INFO if result.passed else logging.WARNING, "%s", line)
    logger.info("Page: %s", page)
    if not result.passed:
        raise SystemExit(NOT_PASSED)
    return result


def optional_model(config: DictConfig) -> tuple[LatentDiffusionModel | None, Path]:
    """The model; None where there is none and ``synthetic`` is given: then there is no latent space to look in."""
    path = Path(config.model)
    if path.is_file() or config.synthetic is None:
        return load_model(config)
    logger.warning("There is no model %s: the latent space is left out.", path)
    return None, path


def expect_same_split(model: LatentDiffusionModel | None, path: Path, datamodule: CohortDataModule) -> None:
    """Refuse a model whose training scans are not those of the split.

    Raises:
        LdmError: it was imported, or trained on another split.
    """
    if model is None:
        return
    expect_a_split(model, path)
    if datamodule.cohort.split_hash != model.header["split_sha256"]:
        raise LdmError(
            f"{path} was trained on another split of the cohort than data.split gives now: copies would be looked for "
            "among the wrong scans. Use the same data settings as for training."
        )


def synthetic_folder(config: DictConfig, model: LatentDiffusionModel | None, path: Path, folder: Path) -> Path:
    """The folder ``synthetic``, or one that samples are drawn into.

    Raises:
        LdmError: no such folder, or samples of another model than the one whose latent space is looked in.
    """
    if config.synthetic is None:
        rows = asked_rows(config.covariates, asked_table(config.covariates), model, {})
        rows, inputs = model.requests(rows, {}, config.n, config.seed)
        draw(model, path, folder / "samples", rows, config, inputs)
        return folder / "samples"
    source = Path(config.synthetic)
    if not source.is_dir():
        raise LdmError(f"synthetic={source}: is no folder of images.")
    drawn_from = read_provenance(source).get("model_sha256")
    if model is not None and drawn_from not in (None, model.header["tensors_sha256"]):
        raise LdmError(
            f"synthetic={source}: was drawn from model {drawn_from[:16]}, {path} is "
            f"{model.header['tensors_sha256'][:16]}. Set model= to the one that it was drawn from."
        )
    return source


def origin(source: Path, model: LatentDiffusionModel | None) -> dict[str, Any]:
    """Where the images of a folder come from, for the protocol; ``model_sha256`` is None where nothing there says so.

    Args:
        source: the folder.
        model: whose latents are looked in; that it is given is no evidence that it drew the images.
    """
    known = read_provenance(source)
    drawn_from, remark = known.get("model_sha256"), {}
    if drawn_from is None:
        logger.warning(
            "%s has no %s that says which model drew its images: the audit vouches for these images and for no model.",
            source,
            PROVENANCE,
        )
    if drawn_from is None and has_autoencoder(model):
        remark = {"latents": f"of model {model.header['tensors_sha256']}, which need not have drawn the images"}
    return {
        "model_sha256": drawn_from,
        "synthetic": str(source),
        "sampling": known.get("sampling"),
        "sampling_seed": known.get("seed"),
        "conditions": asked_of(known, None if drawn_from is None else model),
        **remark,
    }


def read_folder(recipe: Preprocessing, folder: Path) -> Iterable[np.ndarray]:
    """Images ``(C, *S)`` of a folder that was written as `ldm sample` or `ldm release` does, in order of their names.

    Raises:
        LdmError: there are none, or one lacks the file of a channel.
    """
    ends = file_ends(recipe, folder)
    groups = grouped(folder.glob("shard-*/sub-*/anat/sub-*" if (folder / RELEASE).is_file() else "sub-*"), ends)
    if not groups:
        raise LdmError(f"{folder} has no images sub-*{ends[0]}, which is how `ldm sample` writes those of this cohort.")
    for files in track(groups, "reading synthetic images"):
        arrays = [read(file, spatial_dims=recipe.spatial_dims).array for file in files]
        yield in_model_space(recipe, np.concatenate(arrays))  # (C, *S)


class WrittenScans(Sequence):
    """Scans of some splits, each ``(C, *S)`` as if it had been written to files, like synthetic images, and read."""

    def __init__(self, datamodule: CohortDataModule, recipe: Preprocessing, splits: Sequence[str]) -> None:
        self.recipe = recipe
        self.channels = [datamodule.preprocessing.channels.index(name) for name in recipe.channels]
        datasets = [datamodule.dataset(split) for split in splits]
        self.items = [(dataset, position) for dataset in datasets for position in range(len(dataset))]
        self.records = [datamodule.cohort.records[dataset.indices[position]] for dataset, position in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        dataset, position = self.items[index]
        return as_written(self.recipe, dataset[position]["image"][self.channels].numpy())


def real_scans(datamodule: CohortDataModule, recipe: Preprocessing, splits: Sequence[str]) -> Scans:
    """The scans of some splits, with their subjects and ids."""
    images = WrittenScans(datamodule, recipe, splits)
    return Scans(images, [record.subject for record in images.records], [record.id for record in images.records])


def _watch(images: Iterable[np.ndarray], what: str) -> Iterable[np.ndarray]:
    return track(images, what, total=len(images) if isinstance(images, Sequence) else None)


def _device(model: LatentDiffusionModel | None) -> Any:
    return "cpu" if model is None else model.device
