"""``ldm evaluate``: samples at the covariates of held-out subjects, measured, and a report."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import track

from ldm.commands.run import plain
from ldm.commands.sample import draw, load_model
from ldm.commands.stages import cohort_datamodule, prepared, record_inputs
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import Record
from ldm.data.images import read
from ldm.data.schema import Covariate
from ldm.errors import LdmError
from ldm.evaluation.agreement import agreement, level_agreement
from ldm.evaluation.distances import model_distances
from ldm.evaluation.diversity import nearest_pairs, spread
from ldm.evaluation.features import check_features, find_features
from ldm.evaluation.folders import folder_distances
from ldm.evaluation.instruments import Instrument, find_instrument
from ldm.evaluation.masks import CHANCE, HELD_OUT, REBUILT, SAMPLES, mask_dice, mask_segmenter
from ldm.evaluation.report import write_folder_report, write_report
from ldm.model.file import read_header
from ldm.model.generative import Generative
from ldm.model.output import image_paths, in_model_space, sample_name
from ldm.training import figures
from ldm.training.panels import describe
from ldm.training.vae import psnr

logger = logging.getLogger(__name__)

SHOWN = 16
MASK_ROWS = {"samples": SAMPLES, "held-out images": HELD_OUT, "reconstructions": REBUILT, "chance": CHANCE}


def run(config: DictConfig) -> dict[str, Any]:
    """Evaluate a model against the held-out subjects of its cohort; returns what ``metrics.json`` holds.

    With ``real`` and ``synthetic``, two folders of images, no model is needed.
    """
    if config.real is not None or config.synthetic is not None:
        return compare_folders(config)
    folder = Path(config.run_dir)
    model, path = load_model(config)
    if model.classes is not None:
        raise LdmError(
            f"{path} generates label maps; measure them with ldm segment evaluate=true, see ldm segment --help."
        )
    expect_a_split(model, path)
    datamodule = prepared(cohort_datamodule(config))
    if datamodule.cohort.split_hash != model.header["split_sha256"]:
        raise LdmError(
            f"{path} was trained on another split of the cohort than data.split gives now: its training subjects "
            "could be among the held-out ones. Use the same data settings as for training."
        )
    network = find_features(plain(config.features), model.device)
    if network is not None:
        check_features(network, model.preprocessing, datamodule.cohort.name, datamodule.cohort.split_hash)
    real, rows, records = evenly_first(config.n, *held_out(datamodule, model.preprocessing.channels))
    repeated = min(config.repeats, len(rows))
    numbers = [i % len(rows) for i in range(config.n)] + list(range(repeated))
    asked = [dict(rows[i]) for i in numbers]
    inputs = record_inputs(model.header.get("conditioners", {}), [records[i] for i in numbers])
    draw(model, path, folder / "samples", asked, config, inputs)
    samples = [read_sample(model, image_paths(model, folder / "samples", sample_name(i))) for i in range(len(asked))]
    value_range = model.preprocessing.value_range or (float(real[0].min()), float(real[0].max()))
    rebuilt = reconstructions(model, real, rows, value_range) if model.reconstructs else None
    metrics: dict[str, Any] = {
        "model_sha256": model.header["tensors_sha256"],
        "cohort": datamodule.cohort.name,
        "simulated": model.header.get("simulated", False),
        "split_sha256": datamodule.cohort.split_hash,
        "n": {"held_out": len(real), "samples": config.n, "repeats": repeated},
        **({} if rebuilt is None else {"reconstruction": quality(real, rebuilt, value_range)}),
        "diversity": diversity(model, real, rebuilt, rows, samples, config.n, repeated, value_range),
    }
    instrument = find_instrument(
        plain(config.data).get("instrument"),
        datamodule.preprocessing,
        datamodule.schema,
        datamodule.cohort.split_hash,
    )
    if instrument is not None:
        metrics["fidelity"] = fidelity(instrument, model, real, rows, samples, asked, folder / "figures")
    if "mask" in inputs:
        subjects = numbers[: config.n]  # the others repeat a map
        metrics["mask_dice"] = mask_agreement(config, model, records, real, rebuilt, samples[: config.n], subjects)
    if network is not None:
        drawn = samples[: config.n]  # the others repeat covariates
        distances = model_distances(network, model, datamodule, real, rebuilt, drawn, config.n_ref, config.seed)
        metrics |= {} if distances is None else {"distances": distances}
    pictures(model, real, rows, samples, asked, folder / "figures", value_range)
    _write_json(folder / "metrics.json", metrics)
    report = write_report(folder / "report.html", model, metrics, folder / "figures", training_curves(model, config))
    logger.info("Report: %s", report)
    return metrics


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


def compare_folders(config: DictConfig) -> dict[str, Any]:
    """Distances of two folders of images, in ``metrics.json`` and ``report.html``; returns what the former holds.

    Raises:
        LdmError: one folder is not given, or there are no feature weights.
    """
    for name in ("real", "synthetic"):
        if config[name] is None:
            raise LdmError(f"{name}=DIR is missing: real and synthetic are two folders of images.")
    network = find_features(plain(config.features), "cuda" if torch.cuda.is_available() else "cpu")
    if network is None:
        raise LdmError(f"features.path={config.features.path}: without it two folders cannot be compared.")
    folder, real, synthetic = Path(config.run_dir), Path(config.real), Path(config.synthetic)
    distances = folder_distances(network, real, synthetic, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"real": str(real), "synthetic": str(synthetic), "distances": distances}
    _write_json(folder / "metrics.json", metrics)
    logger.info("Report: %s", write_folder_report(folder / "report.html", real, synthetic, distances))
    return metrics


def held_out(
    datamodule: CohortDataModule, channels: Sequence[str]
) -> tuple[list[np.ndarray], list[dict[str, Any]], list[Record]]:
    """Images ``(C, *S)``, covariate rows and records of the subjects that no stage was trained on.

    Only those channels that the model generates.
    """
    images, rows, records = [], [], []
    chosen = [datamodule.preprocessing.channels.index(name) for name in channels]
    for split in ("test", "valid"):
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
    chosen = [i * total // n for i in range(n)] if n < total else list(range(total))
    order = [*chosen, *sorted(set(range(total)) - set(chosen))]
    return [[one[i] for i in order] for one in lists]


def read_sample(model: Generative, paths: Sequence[Path]) -> np.ndarray:
    """A written sample, all its files together, on the model's grid and in its range: ``(C, *S)``."""
    recipe = model.preprocessing
    array = np.concatenate([read(path, spatial_dims=recipe.spatial_dims).array for path in paths])  # (C, *file)
    return in_model_space(recipe, array)  # (C, *S)


def reconstructions(
    model: Generative,
    real: Sequence[np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    value_range: tuple[float, float],
) -> list[np.ndarray]:
    """Held-out images ``(C, *S)`` through the model, see :meth:`Generative.reconstruct`."""
    rebuilt = []
    for image, row in zip(track(real, "reconstructing"), rows, strict=True):
        decoded = model.reconstruct(torch.from_numpy(image)[None], [row])  # (1, C, *S)
        rebuilt.append(decoded[0].clamp(*value_range).cpu().numpy())
    return rebuilt


def quality(
    real: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray], value_range: tuple[float, float]
) -> dict[str, float]:
    """PSNR in dB of the reconstructions."""
    span = value_range[1] - value_range[0]
    values = [psnr(torch.from_numpy(x), torch.from_numpy(y), span) for x, y in zip(real, rebuilt, strict=True)]
    return {"psnr_mean": float(np.mean(values)), "psnr_std": float(np.std(values)), "n": len(values)}


def diversity(
    model: Generative,
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray] | None,
    rows: Sequence[dict[str, Any]],
    samples: Sequence[np.ndarray],
    n: int,
    repeated: int,
    value_range: tuple[float, float],
) -> dict[str, Any]:
    """Spread of real subjects with like covariates, of samples asked as these, and of samples at the same covariates.

    The same subjects after reconstruction stand between: noise and fine detail that the first stage does not keep
    make real images differ, and no sample can have them. Sample i was asked as subject i, so the first three rows
    compare the same pairs of covariates.
    """
    result = {}
    codes = model.schema.encode_table(rows) if len(model.schema) else np.zeros((len(rows), 1))
    asked = min(n, len(rows))
    if asked > 1:
        pairs = nearest_pairs(codes[:asked])
        result["real, nearest covariates"] = spread(real, pairs, value_range)
        if rebuilt is not None:
            result["the same, reconstructed"] = spread(rebuilt, pairs, value_range)
        result["samples asked as these"] = spread(samples, pairs, value_range)
    if repeated:
        same = [(i, n + i) for i in range(repeated)]
        result["samples, same covariates"] = spread(samples, same, value_range)
    return result


def fidelity(
    instrument: Instrument,
    model: Generative,
    real: Sequence[np.ndarray],
    rows: Sequence[dict[str, Any]],
    samples: Sequence[np.ndarray],
    asked: Sequence[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Agreement of what was asked and measured in samples, and of truth and measurement on real held-out images."""
    on_real = [instrument(image) for image in track(real, "measuring held-out images")]
    on_samples = [instrument(image) for image in track(samples, "measuring samples")]
    result = {}
    for name in on_real[0]:
        if name not in model.schema.names:
            continue
        compare = compare_levels if model.schema[name].kind == "categorical" else compare_values
        found = compare(model.schema[name], _pairs(rows, on_real, name), _pairs(asked, on_samples, name), folder)
        if found is None:
            logger.warning("%s: too few images could be measured, or all alike.", name)
            continue
        result[name] = {**found, "unmeasurable_samples": sum(not _measured(values[name]) for values in on_samples)}
    return result


def mask_agreement(
    config: DictConfig,
    model: Generative,
    records: Sequence[Record],
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray],
    samples: Sequence[np.ndarray],
    subjects: Sequence[int],
) -> dict[str, Any]:
    """Dice of the label maps that samples were given with those found in them; ``left_out`` says why there is none."""
    try:
        if any(record.labels is None for record in records):
            raise LdmError("held-out subjects have no label map that could be asked for; set data.labels.")
        classes, recipe = model.network.conditioners["mask"].classes, model.preprocessing
        segmenter, path = mask_segmenter(plain(config.data).get("instrument"), classes, recipe)
    except LdmError as error:
        logger.warning("No Dice of asked and found label maps: %s", error)
        return {"left_out": str(error)}
    masks = [recipe.read_labels(record.labels) for record in records]  # (*S) each
    found = mask_dice(segmenter, masks, real, rebuilt, samples, subjects, config.seed)
    for label, rows in found["labels"].items():
        shown = {name: f"{rows[row]['mean']:.3f}" for name, row in MASK_ROWS.items() if rows.get(row, {}).get("n")}
        logger.info("Dice of %s: %s.", label, ", ".join(f"{name} {mean}" for name, mean in shown.items()))
    return {**found, "segmenter_sha256": read_header(path)["tensors_sha256"]}


Pairs = tuple[list[Any], list[Any]]  # true or asked values, and the measured ones


def compare_values(covariate: Covariate, real: Pairs, samples: Pairs, folder: Path) -> dict[str, Any] | None:
    """Agreement of a continuous covariate, and a scatter plot each; None where it cannot be had."""
    (truth, found), (wanted, got) = real, samples
    if min(len(truth), len(wanted)) < 3 or min(map(np.ptp, (truth, found, wanted, got))) == 0:
        return None
    name, unit = covariate.name, covariate.unit or ""
    figures.scatter(truth, found, f"{name}: held-out images", unit, folder / f"measured_real_{name}.png")
    figures.scatter(wanted, got, f"{name}: samples", unit, folder / f"measured_samples_{name}.png")
    agreements = {"instrument_on_held_out": agreement(truth, found), "samples": agreement(wanted, got)}
    return {"kind": covariate.kind, "unit": unit, **agreements}


def compare_levels(covariate: Covariate, real: Pairs, samples: Pairs, folder: Path) -> dict[str, Any] | None:
    """Agreement of a categorical covariate; None where no image has it."""
    shares = {}
    for name, (wanted, found) in (("instrument_on_held_out", real), ("samples", samples)):
        if not wanted:
            return None
        wanted = [covariate.levels[covariate.level_index(value)] for value in wanted]
        shares[name] = level_agreement(wanted, found, covariate.levels)
    return {"kind": covariate.kind, "levels": list(covariate.levels), **shares}


def _measured(value: float | str) -> bool:
    return isinstance(value, str) or bool(np.isfinite(value))


def _pairs(rows: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], name: str) -> Pairs:
    pairs = [
        (row[name], values[name])
        for row, values in zip(rows, measured, strict=True)
        if row.get(name) is not None and _measured(values[name])
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def pictures(model, real, rows, samples, asked, folder: Path, value_range: tuple[float, float]) -> None:
    """Mosaics of held-out images, of samples at the same covariates, and of repeated samples."""
    count, rgb = min(len(real), len(samples)), model.preprocessing.is_rgb
    shown = [i * count // min(SHOWN, count) for i in range(min(SHOWN, count))]  # evenly: tables are often sorted
    for name, images, titles in (("real", real, rows), ("samples", samples, asked)):
        titles = [describe(titles[i]) for i in shown]
        figures.mosaic([images[i] for i in shown], folder / f"{name}.png", titles, value_range, rgb=rgb)


def training_curves(model: Generative, config: DictConfig) -> dict[str, Path]:
    """Curves that the trainings left beside their models."""
    folders = {model.what: Path(config.model).parent}
    if hasattr(model, "first_stage"):
        folders = {"first stage": Path(config.first_stage).parent, **folders}
    return {
        name: folder / "figures" / "curves.png"
        for name, folder in folders.items()
        if (folder / "figures" / "curves.png").is_file()
    }


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
