"""``ldm compare``: the table of a cohort, real images and models side by side, measured alike."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from ldm.commands.compare_models import REFERENCE, Entry, check_entries, read_entries, reconstructing
from ldm.commands.held_out import held_out, read_sample
from ldm.commands.run import check_counts, plain, section
from ldm.commands.sample import draw, sampling_options
from ldm.commands.sampler_table import device_in_words, seconds_a_sample
from ldm.commands.stages import cohort_datamodule, prepared, record_inputs
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.comparison import Measure, Row, file_slug, markdown, over_models
from ldm.evaluation.distances import (
    CONTROL,
    FLOOR,
    PRIOR,
    RECONSTRUCTED,
    SMALLEST,
    blurred,
    compare,
    prior_images,
    too_few,
)
from ldm.evaluation.features import FeatureNetwork, find_features
from ldm.evaluation.instruments import OfAnotherSplit, find_instruments, instrument_hashes
from ldm.evaluation.reconstruction import reconstructions
from ldm.files import write_json, write_text
from ldm.model import latent_diffusion
from ldm.model.generative import Generative
from ldm.model.output import as_written, image_paths, sample_name
from ldm.training import figures
from ldm.training.panels import describe

logger = logging.getLogger(__name__)

SHOWN = 8  # columns of the picture


@dataclass(frozen=True)
class HeldOut:
    """The held-out subjects that every row stands for: images ``(C, *S)``, covariates and records, N each.

    ``content`` is the hash of covariates and of all files, which a model may be given.
    """

    images: Sequence[np.ndarray]
    rows: Sequence[dict[str, Any]]
    records: Sequence[Record]
    content: str

    @classmethod
    def choose(cls, datamodule: CohortDataModule, channels: Sequence[str], n: int | None, seed: int) -> HeldOut:
        """``n`` of them at random, all if None.

        Raises:
            LdmError: there are too few images or subjects.
        """
        images, rows, records = held_out(datamodule, channels)
        if n is not None and not SMALLEST <= n <= len(images):
            raise LdmError(f"n is {n}; legal: {SMALLEST} up to the number of held-out images, {len(images)}.")
        order = np.random.default_rng(seed).permutation(len(images))[:n]
        if (lacking := too_few([records[i].subject for i in order])) is not None:
            raise LdmError(f"Of held-out images to compare there are {lacking}. See n and data.split.")
        chosen = [[values[i] for i in order] for values in (images, rows, records)]
        return cls(*chosen, datamodule.cohort.content_hash(chosen[-1]))


def run(config: DictConfig) -> dict[str, Any]:
    """Measure every row and write ``compare.json``, ``compare.md`` and ``compare.png``; returns the table."""
    check_counts(config, "n_ref", "batch_size", *(["n"] if config.n is not None else []))
    entries = read_entries(section(config, "models"))
    recipe = Preprocessing.from_dict(entries[0].header["preprocessing"])
    network = find_features(section(config, "features"), "cuda" if torch.cuda.is_available() else "cpu", recipe)
    if network is None:
        given = section(config, "features").get("path")
        raise LdmError(f"features.path={given}: without it nothing can be compared.")
    datamodule, folder = prepared(cohort_datamodule(config)), Path(config.run_dir)
    check_entries(entries, datamodule, network)
    subjects = HeldOut.choose(datamodule, recipe.channels, config.n, config.seed)
    chosen = reference_positions(datamodule, config.n_ref, config.seed)
    measure = build_measure(config, datamodule, recipe, network, subjects, folder / "rows")
    reference = reference_row(measure, recipe, datamodule, chosen)
    rows, train = measure_rows(measure, entries, subjects, config, folder), datamodule.cohort.split("train")
    table = compare(
        reference.features,
        {name: row.features for name, row in rows.items()},
        FLOOR,
        CONTROL,
        protocol(config, datamodule, network, subjects, len(reference.features)),
        config.seed,
        controls=[name for name in rows if name not in {FLOOR, *(entry.name for entry in entries)}],
        subjects=[record.subject for record in subjects.records],
        reference_subjects=[train[position].subject for position in chosen],
    )
    if measure.of_another_split:
        table["protocol"] |= {"of_another_split": list(measure.of_another_split)}
    for name, row in rows.items():
        table["rows"][name] |= row.facts
    for entry in entries:
        table["rows"][entry.name] |= entry.facts
    groups = {entry.group: [one.name for one in entries if one.group == entry.group] for entry in entries}
    several = {group: names for group, names in groups.items() if len(names) > 1}
    table["several"] = {group: over_models([table["rows"][name] for name in names]) for group, names in several.items()}
    write_json(folder / "compare.json", table)
    write_text(folder / "compare.md", markdown(table))
    picture(entries, measure, subjects, config, folder)
    logger.info("The table, and a row of samples of every model at the same covariates: %s", folder / "compare.md")
    return table


# --- rows -------------------------------------------------------------------------------------------


def build_measure(
    config: DictConfig,
    datamodule: CohortDataModule,
    recipe: Preprocessing,
    network: FeatureNetwork,
    subjects: HeldOut,
    folder: Path,
) -> Measure:
    """What all rows share, and what they are kept under; ``recipe`` is of the images that the models generate."""
    instrument = plain(config.data).get("instrument")
    found = find_instruments(instrument, recipe, datamodule.schema, datamodule.cohort.split_hash)
    key = {
        "features": network.identity["sha256"],
        **{name: network.identity[name] for name in ("shown", "resize", "planes") if name in network.identity},
        "instruments": instrument if found else None,  # each of them is asked
        "instrument_sha256": instrument_hashes(instrument),
        "preprocessing": datamodule.preprocessing.fingerprint(),
        "channels": list(recipe.channels),
        "split": datamodule.cohort.split_hash,
        "records": datamodule.cohort.content_hash(),
        "subjects": [record.id for record in subjects.records],
        "seed": config.seed,
    }
    whose = [record.subject for record in subjects.records]
    foreign = [title for title, one in found.items() if isinstance(one, OfAnotherSplit)]
    shared = datamodule.schema, subjects.rows, whose, recipe.shown_range, folder, key, foreign
    return Measure(network, found, *shared)


def reference_positions(datamodule: CohortDataModule, n_ref: int, seed: int) -> np.ndarray:
    """Positions in the training split of the images that all rows are measured against.

    Raises:
        LdmError: there are too few images or subjects.
    """
    chosen = np.random.default_rng(seed).permutation(len(datamodule.dataset("train")))[:n_ref]
    train = datamodule.cohort.split("train")
    if (lacking := too_few([train[position].subject for position in chosen])) is not None:
        raise LdmError(f"Of training images to compare with there are {lacking}. See n_ref and data.split.")
    return chosen


def reference_row(measure: Measure, recipe: Preprocessing, datamodule: CohortDataModule, chosen: np.ndarray) -> Row:
    """The training images that all rows are measured against; ``recipe`` is the models'."""
    train = datamodule.dataset("train")
    channels = [datamodule.preprocessing.channels.index(name) for name in recipe.channels]

    def images() -> list[np.ndarray]:
        whole = (train[position]["image"][channels].numpy() for position in chosen)
        return [as_written(recipe, image) for image in track(whole, REFERENCE, total=len(chosen))]

    return measure.row(REFERENCE, {"n_ref": len(chosen)}, images, covariates=False)


def measure_rows(
    measure: Measure, entries: Sequence[Entry], subjects: HeldOut, config: DictConfig, folder: Path
) -> dict[str, Row]:
    """Real images, models, what first stages keep and make, and the control, in this order."""
    written = functools.partial(as_written, entries[0].outline.preprocessing)
    rows = {FLOOR: measure.row(FLOOR, {}, lambda: [written(image) for image in subjects.images])}
    for entry in entries:
        logger.info("%s: %s", entry.name, entry.path)
        rows[entry.name] = model_row(measure, entry, subjects, config, folder)
    sources = reconstructing(entries)
    for entry in sources:
        suffix = f" ({entry.name})" if len(sources) > 1 else ""
        rows |= first_stage_rows(measure, entry, subjects, suffix, config.seed)
    rows[CONTROL] = measure.row(CONTROL, {}, lambda: [written(blurred(image)) for image in subjects.images])
    return rows


def model_row(measure: Measure, entry: Entry, subjects: HeldOut, config: DictConfig, folder: Path) -> Row:
    """Samples of one model at the covariates of the subjects, through files; and how long one takes."""
    key = {**entry.key, "batch_size": config.batch_size}
    load = functools.cache(entry.load)  # once, if at all, and gone with this function

    def images() -> list[np.ndarray]:
        return read_samples(entry, subjects, config, folder, range(len(subjects.rows)), load)

    def further() -> dict[str, Any]:
        options, rows = sampling_options(entry.asked), subjects.rows[: config.batch_size]
        given = record_inputs(entry.header.get("conditioners", {}), subjects.records[: config.batch_size])
        return {
            "seconds_a_sample": seconds_a_sample(load(), rows, given, options),
            "timed_on": device_in_words(load()),
        }

    return measure.row(entry.name, key, images, further=further)


def samples_folder(entry: Entry, subjects: HeldOut, config: DictConfig) -> str:
    """Name of the folder of a model's samples, by what decides them and nothing that they are measured with."""
    key = {
        **entry.key,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "subjects": subjects.content,
    }
    return file_slug(entry.name, json.dumps(key, sort_keys=True, default=str))


def read_samples(
    entry: Entry,
    subjects: HeldOut,
    config: DictConfig,
    folder: Path,
    numbers: Sequence[int],
    load: Callable[[], Generative],
) -> list[np.ndarray]:
    """Samples of a model as their files hold them, ``(C, *S)`` each; loads the model to draw what has no file yet."""
    out, count = folder / "samples" / samples_folder(entry, subjects, config), len(subjects.rows)
    paths = [image_paths(entry.outline, out, sample_name(i)) for i in range(count)]
    missing = not all(path.is_file() for one in paths for path in one)
    asked = OmegaConf.create({"seed": config.seed, "batch_size": config.batch_size, **entry.options})
    inputs = record_inputs(entry.header.get("conditioners", {}), subjects.records)
    model = load() if missing else entry.outline  # whose request is looked at all the same
    draw(model, entry.path, out, [dict(row) for row in subjects.rows], asked, inputs)
    return [read_sample(entry.outline, paths[i]) for i in numbers]


def first_stage_rows(measure: Measure, entry: Entry, subjects: HeldOut, suffix: str, seed: int) -> dict[str, Row]:
    """Reconstructions, and what a first stage makes of draws of N(0, I); those of a VAE-GAN are its samples."""
    written = functools.partial(as_written, entry.outline.preprocessing)
    load = functools.cache(entry.load)  # once, if at all, and gone with this function

    def rebuilt() -> list[np.ndarray]:
        return [written(image) for image in reconstructions(load(), subjects.images, subjects.rows)]

    def decoded() -> list[np.ndarray]:
        return [written(image) for image in prior_images(load(), len(subjects.rows), seed)]

    key = {"model": entry.header.get("first_stage_sha256", entry.header["tensors_sha256"])}
    rows = {f"{RECONSTRUCTED}{suffix}": measure.row(RECONSTRUCTED, key, rebuilt)}
    if entry.header["kind"] == latent_diffusion.KIND:
        rows[f"{PRIOR}{suffix}"] = measure.row(PRIOR, key, decoded, covariates=False)
    return rows


# --- what is written --------------------------------------------------------------------------------


def protocol(
    config: DictConfig, datamodule: CohortDataModule, network: FeatureNetwork, subjects: HeldOut, references: int
) -> dict[str, Any]:
    """Everything that the numbers depend on beside the models."""
    return {
        "cohort": datamodule.cohort.name,
        "split_sha256": datamodule.cohort.split_hash,
        "features": network.identity,
        "instruments_sha256": instrument_hashes(plain(config.data).get("instrument")),
        "reference": {"images": "training split", "n": references, "of": len(datamodule.dataset("train"))},
        "images": "as written to files and read again, at the covariates of held-out subjects",
        "image_size": list(subjects.images[0].shape),
        "value_range": None
        if datamodule.preprocessing.value_range is None
        else list(datamodule.preprocessing.value_range),
        "seconds_a_sample": f"batches of {min(config.batch_size, len(subjects.rows))}",  # on what: each row knows
    }


def picture(entries: Sequence[Entry], measure: Measure, subjects: HeldOut, config: DictConfig, folder: Path) -> Path:
    """A row of real images, and one of samples at the same covariates for every model."""
    count, recipe = len(subjects.rows), entries[0].outline.preprocessing
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(SHOWN, count))})
    rows = {"real": [subjects.images[i] for i in shown]}
    for entry in entries:
        rows[entry.name] = read_samples(entry, subjects, config, folder, shown, entry.load)
    titles = [describe(subjects.rows[i]) for i in shown]
    return figures.mosaic_rows(rows, folder / "compare.png", titles, measure.value_range, recipe.is_rgb)
