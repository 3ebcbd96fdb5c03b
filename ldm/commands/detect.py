"""``ldm detect``: anomalies of images, by what a diffusion model makes of them when it is asked for healthy ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import Progress

from ldm.applications.anomaly import DetectionOptions, Detector, find_healthy, image_scores
from ldm.applications.cases import Truth, folder_records, lesion_classes
from ldm.applications.detection import STORED, Comparison, Found, comparison_of, look_at, maps_of
from ldm.applications.detection_output import TABLE, settle_request, write_case, write_scores
from ldm.commands.run import plain, require_file
from ldm.commands.sample import load_model
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.commands.train_classifier import expect_cohort_of, find_target, take_networks
from ldm.data.cohort_config import SPLITS
from ldm.data.draft import Record
from ldm.diffusion.checks import check_choice, check_count
from ldm.errors import LdmError
from ldm.model.classifier import Classifier
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training import figures

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Path:
    """Write maps, healthy counterparts, scores, a panel and the provenance; returns the table of scores."""
    check_count("batch_size", config.batch_size)
    model, path = load_model(config)
    detector = build_detector(config, model)
    options = detection_options(config)
    detector.check(options)
    records, truth = find_records(config, model, path, detector)
    out = Path(config.run_dir)
    comparison = comparison_of(detector, options) if config.compare else Comparison()
    settle_request(out, request(config, detector, options, comparison, records))
    founds = look(config, detector, records, truth, options, comparison, out / STORED)
    maps = maps_of(founds, options)
    scores = image_scores(maps, options)
    for found, anomaly in zip(founds, maps, strict=True):
        write_case(out, found.case, model.preprocessing, found.healthy, anomaly, config.threshold)
    panel(config, model, founds, maps, out / "panel.png")
    rows = [
        {"participant_id": f.case.record.id, "subject": f.case.record.subject, "score": float(score)}
        | {truth.target.name: f.case.record.covariates.get(truth.target.name)}
        for f, score in zip(founds, scores, strict=True)
    ]
    table = write_scores(out / TABLE, rows)
    logger.info("%d images: maps, healthy counterparts and %s are in %s", len(founds), TABLE, out)
    return table


def build_detector(config: DictConfig, model: LatentDiffusionModel) -> Detector:
    """The model with its classifier, where one guides, and the level of the target that means healthy.

    Raises:
        LdmError: no classifier, one of another diffusion model, or no target.
    """
    classifier = None
    if config.guide == "classifier":
        path = require_file(config.classifier_model, "classifier", "train-classifier")
        classifier = Classifier.load(path, model.device)
    if classifier is None:
        target = find_target(model.schema, config.target, "target")
    else:
        target = classifier.target
        if config.target not in (None, target.name):
            raise LdmError(f"target is '{config.target}', but the classifier tells '{target.name}'.")
    healthy = find_healthy(target, None if config.healthy is None else str(config.healthy))
    return Detector(model, target, healthy, classifier, config.precision)


def detection_options(config: DictConfig) -> DetectionOptions:
    """The settings that are the options' own."""
    names = [field.name for field in fields(DetectionOptions) if field.name in config]
    values = {name: config[name] for name in names}
    if values["encode_as"] is not None:
        values["encode_as"] = str(values["encode_as"])
    return DetectionOptions(**values)


def find_records(
    config: DictConfig, model: LatentDiffusionModel, path: Path, detector: Detector
) -> tuple[list[Record], Truth]:
    """The images to look at, and how they say what is healthy.

    Raises:
        LdmError: none, or ones that do not fit the model.
    """
    target, healthy = detector.target, detector.healthy
    if config.images is not None:
        files = [None if config[name] is None else Path(config[name]) for name in ("masks", "table")]
        return folder_records(Path(config.images), model.preprocessing, target, healthy, *files), Truth(target, healthy)
    for name in ("masks", "table"):
        if config[name] is not None:
            raise LdmError(f"{name} goes with images=FOLDER; masks of a cohort are data.labels, its table data.table.")
    check_choice("split", config.split, (*SPLITS, "all"))
    take_networks(config, model)
    cohort = prepared(cohort_datamodule(config)).cohort
    expect_cohort_of(model, cohort, path)
    records = [record for record in cohort.records if config.split in ("all", record.split)]
    if not records:
        raise LdmError(f"cohort '{cohort.name}' has no image in split={config.split}; see data.split.")
    names = plain(config.data)["label_names"] or {}
    return records, Truth(target, healthy, lesion_classes(names, config.lesion and list(config.lesion)))


def request(
    config: DictConfig,
    detector: Detector,
    options: DetectionOptions,
    comparison: Comparison,
    records: Sequence[Record],
) -> dict[str, Any]:
    """What the results depend on."""
    model, classifier = detector.model, detector.classifier
    return {
        "model_sha256": model.header["tensors_sha256"],
        "simulated_training_data": model.header.get("simulated", False),
        "classifier_sha256": None if classifier is None else classifier.sha256,
        "target": detector.target.name,
        "healthy": detector.healthy,
        "options": {**asdict(options), "level": detector.level(options)},
        "comparison": asdict(comparison),
        "threshold": config.threshold,
        "seed": config.seed,
        "precision": config.precision,
        "images": {record.id: list(record.images.values()) for record in records},
    }


def look(
    config: DictConfig,
    detector: Detector,
    records: Sequence[Record],
    truth: Truth,
    options: DetectionOptions,
    comparison: Comparison,
    folder: Path,
) -> list[Found]:
    """Healthy counterparts of all records, with a progress bar."""
    with Progress() as bar:
        task = bar.add_task("detecting", total=len(records))
        return list(
            look_at(
                detector,
                records,
                truth,
                options,
                folder,
                comparison,
                config.batch_size,
                config.seed,
                lambda count: bar.advance(task, count),
            )
        )


def panel(
    config: DictConfig, model: LatentDiffusionModel, founds: Sequence[Found], maps: np.ndarray, path: Path
) -> Path | None:
    """Image, healthy counterpart, map and mask of the first diseased and the first healthy cases."""
    half = max(1, config.shown // 2)
    groups = [[k for k, f in enumerate(founds) if f.case.diseased is kind] for kind in (True, False, None)]
    chosen = [k for group in groups for k in group[:half]][: config.shown]
    if not chosen:
        return None
    channel = intensity_channel(config, model)
    first = np.stack([founds[k].case.image[channel] for k in chosen])
    low, high = model.preprocessing.value_range or (float(first.min()), float(first.max()))
    top = float(np.percentile(maps, 99.9))
    rows = []
    for k in chosen:
        case = founds[k].case
        mask = None if case.mask is None else case.mask.astype(np.float32)
        rows.append((case.image[channel], founds[k].healthy[channel], maps[k], mask))
    names = [f"{founds[k].case.record.id}\n{_word(founds[k].case.diseased)}" for k in chosen]
    return figures.table_of_pictures(
        rows,
        path,
        (model.preprocessing.channels[channel], "healthy counterpart", f"map (0 to {top:.2g})", "mask"),
        ((low, high), (low, high), (0.0, top), (0.0, 1.0)),
        ("gray", "gray", "inferno", "gray"),
        names,
    )


def _word(diseased: bool | None) -> str:
    return "" if diseased is None else "diseased" if diseased else "healthy"


def intensity_channel(config: DictConfig, model: LatentDiffusionModel) -> int:
    """Position of ``intensity_channel`` among the model's channels.

    Raises:
        LdmError: no such channel.
    """
    if config.intensity_channel is None:
        return 0
    check_choice("intensity_channel", config.intensity_channel, model.preprocessing.channels)
    return model.preprocessing.channels.index(config.intensity_channel)
