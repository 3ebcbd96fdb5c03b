"""``ldm detect``: anomalies of images, by what a diffusion model makes of them when it is asked for healthy ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import Progress, track

from ldm.applications.anomaly import SCALES, DetectionOptions, Detector, anomaly_map, find_healthy, image_scores
from ldm.applications.cases import Truth, folder_records, lesion_classes, load_case
from ldm.applications.detection import STORED, Comparison, Found, comparison_of, look_at, maps_of
from ldm.applications.detection_output import TABLE, write_case, write_scores
from ldm.applications.detection_report import evaluate, markdown
from ldm.applications.tuning import (
    apply_choices,
    best,
    judge,
    read_choices,
    reference_of,
    settled,
    sweep,
    tuning_subjects,
    write_choices,
)
from ldm.commands.run import plain, require_file
from ldm.commands.sample import load_model
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.commands.train_classifier import expect_cohort_of, find_target, take_networks
from ldm.data.cohort_config import SPLITS
from ldm.data.draft import Record
from ldm.diffusion.checks import check_choice, check_count
from ldm.errors import LdmError
from ldm.files import write_json, write_text
from ldm.metrics.detection import dice
from ldm.model.classifier import Classifier
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.provenance import settle_request
from ldm.training import figures

logger = logging.getLogger(__name__)

#: swept where nothing else is asked for: quantiles of the training times, and s
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
SWEPT_SCALES = {"classifier": (3.0, 10.0, 30.0, 100.0, 300.0), "free": (1.0, 2.0, 3.0, 5.0, 8.0), "none": (0.0,)}


def run(config: DictConfig) -> Path:
    """Write maps, healthy counterparts, scores, a panel and the provenance; returns the table of scores.

    Where it is known which images are healthy, also ``metrics.json`` and ``metrics.md``. With ``tune`` choose L, s and
    the threshold instead, and return the file beside the model that holds them.
    """
    check_count("batch_size", config.batch_size)
    model, path = load_model(config)
    detector = build_detector(config, model)
    channel = intensity_channel(config, model)
    if config.tune:
        return tune(config, detector, path, channel)
    entry = read_choices(path, classifier_sha256(detector), config.guide)
    options, threshold = apply_choices(asked_options(config), entry, config.threshold)
    detector.check(options)
    images = find_images(config, model, path, detector, config.split)
    evaluated = evaluated_ids(config, images, entry)
    baselines = entry["baselines"] if entry is not None and settled(options) == entry["options"] else {}
    comparison = Comparison()
    if config.compare:
        comparison = comparison_of(detector, options, baselines.get("partial_noising", {}).get("level"))
    out = Path(config.run_dir)
    settle_request(out, request(config, detector, options, comparison, threshold, images.records))
    founds = look(config, detector, images, options, comparison, out / STORED)
    maps = maps_of(founds, options)
    for found, anomaly in zip(founds, maps, strict=True):
        write_case(out, found.case, model.preprocessing, found.healthy, anomaly, threshold)
    panel(founds, maps, model, channel, config.shown, out / "panel.png")
    table = write_scores(out / TABLE, score_rows(founds, maps, options, images.truth, threshold))
    if evaluated:
        chosen = [found for found in founds if found.case.record.id in evaluated]
        thresholds = {name: one["threshold"] for name, one in baselines.items()} | {options.guide: threshold}
        metrics = evaluate(chosen, options, thresholds, channel, config.resamples, config.seed)
        metrics["chosen_on_these_images"] = bool(evaluated & tuned_ids(images, entry))
        write_json(out / "metrics.json", metrics)
        logger.info("Against the truth:\n%s", write_text(out / "metrics.md", markdown(metrics)).read_text())
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


def classifier_sha256(detector: Detector) -> str | None:
    """Hash of the classifier, where there is one."""
    return None if detector.classifier is None else detector.classifier.sha256


def asked_options(config: DictConfig) -> dict[str, Any]:
    """Those settings that are options of detection; None where nothing is asked."""
    asked = {field.name: config[field.name] for field in fields(DetectionOptions) if field.name in config}
    return asked | {"encode_as": None if asked["encode_as"] is None else str(asked["encode_as"])}


# --- images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What to look at.

    Attributes:
        records: the images' records.
        truth: how they say what is healthy.
        split: of the cohort; None for those of a folder.
        split_sha256: of the cohort; None for those of a folder.
    """

    records: Sequence[Record]
    truth: Truth
    split: str | None = None
    split_sha256: str | None = None


def find_images(
    config: DictConfig, model: LatentDiffusionModel, path: Path, detector: Detector, split: str | None
) -> Images:
    """The images to look at: those of a folder, or of a split of the cohort.

    Raises:
        LdmError: none, or ones that do not fit the model.
    """
    target, healthy = detector.target, detector.healthy
    if config.images is not None:
        files = [None if config[name] is None else Path(config[name]) for name in ("masks", "table")]
        records = folder_records(Path(config.images), model.preprocessing, target, healthy, *files)
        return Images(records, Truth(target, healthy))
    for name in ("masks", "table"):
        if config[name] is not None:
            raise LdmError(f"{name} goes with images=FOLDER; masks of a cohort are data.labels, its table data.table.")
    take_networks(config, model)
    cohort = prepared(cohort_datamodule(config)).cohort
    expect_cohort_of(model, cohort, path)
    split = split or ("test" if cohort.split("test") else "valid")
    check_choice("split", split, (*SPLITS, "all"))
    records = [record for record in cohort.records if split in ("all", record.split)]
    if not records:
        raise LdmError(f"cohort '{cohort.name}' has no image in split={split}; see data.split.")
    classes = lesion_classes(
        plain(config.data)["label_names"] or {}, None if config.lesion is None else list(config.lesion)
    )
    return Images(records, Truth(target, healthy, classes), split, cohort.split_hash)


def tuned_ids(images: Images, entry: Mapping[str, Any] | None) -> set[str]:
    """Those of the images that L, s and the threshold were chosen on."""
    if entry is None or images.split is None or entry["images"]["split_sha256"] != images.split_sha256:
        return set()
    there = [record for record in images.records if record.split == entry["images"]["split"]]
    subjects = tuning_subjects(there, entry["images"]["share"], entry["images"]["seed"]) if there else set()
    return {record.id for record in there if record.subject in subjects}


def evaluated_ids(config: DictConfig, images: Images, entry: Mapping[str, Any] | None) -> set[str]:
    """Images that are compared with the truth: none where it is not known, and not those that choices were made on.

    Raises:
        LdmError: the class is known of some images only, or is the same for all.
    """
    known = [images.truth.diseased(record) for record in images.records]
    if not config.evaluate or all(one is None for one in known):
        return set()
    remedy = "evaluate=false writes maps and scores alone."
    tuned = tuned_ids(images, entry)
    rest = {record.id for record in images.records} - tuned
    if not rest:
        logger.warning(
            "All these images are ones that L, s and the threshold were chosen on: the numbers are too good. Take "
            "another split, or tune on a part of the patients (sweep.share)."
        )
        rest = tuned
    found = {one for record, one in zip(images.records, known, strict=True) if record.id in rest}
    if None in found:
        unknown = next(r.id for r, one in zip(images.records, known, strict=True) if one is None and r.id in rest)
        raise LdmError(f"'{unknown}' has no value of '{images.truth.target.name}', which others have. {remedy}")
    if len(found) < 2:
        raise LdmError(
            f"All {len(rest)} images to evaluate are {_word(found.pop())} by '{images.truth.target.name}': areas under "
            f"curves and false alarms need healthy and diseased ones. {remedy}"
        )
    masked = [record.labels is not None for record in images.records if record.id in rest]
    if any(masked) and not all(masked):
        raise LdmError(f"{masked.count(False)} of {len(masked)} images have no mask: give all of them one. {remedy}")
    return rest


# --- tuning -------------------------------------------------------------------------------------------


def tune(config: DictConfig, detector: Detector, path: Path, channel: int) -> Path:
    """Choose L, s and the threshold on validation images; returns ``detection.json`` beside the model.

    What has been swept is kept in the output folder, so that the same command goes on.
    """
    options = DetectionOptions(**{name: value for name, value in asked_options(config).items() if value is not None})
    images = find_images(config, detector.model, path, detector, config.sweep.split)
    share = config.sweep.share or 1.0
    subjects = tuning_subjects(images.records, share, config.seed)
    records = [record for record in images.records if record.subject in subjects]
    cases = [load_case(record, detector.model.preprocessing, images.truth) for record in track(records, "reading")]
    reference, levels = reference_of(cases), swept_levels(config, detector)
    scales = SWEPT_SCALES[options.guide] if config.sweep.scales is None else list(config.sweep.scales)
    for level in levels:
        detector.check(replace(options, level=level))
    out = Path(config.run_dir)
    stored = out / f"sweep-{options.guide}.json"
    asked = request(config, detector, options, Comparison(), None, records) | {"levels": levels, "scales": scales}
    rows = swept(config, detector, cases, options, levels, scales, stored, asked)
    chosen, criterion = best(rows["guided"])
    baselines = {}
    if options.guide != "none":
        baselines["partial_noising"] = best(rows["partial_noising"])[0]
        images_array = np.stack([case.image for case in cases])  # (N, C, *S)
        baselines["intensity"] = judge(images_array[:, channel], options, reference)
        if comparison_of(detector, options).reconstruction:
            rebuilt = np.concatenate([detector.reconstructions(image[None]) for image in images_array])
            baselines["reconstruction"] = judge(anomaly_map(images_array, rebuilt, options), options, reference)
    entry = {
        "classifier_sha256": classifier_sha256(detector),
        "target": detector.target.name,
        "healthy": detector.healthy,
        **{name: chosen[name] for name in ("level", "scale", "threshold")},
        "options": settled(options),
        "criterion": criterion,
        "sweep": rows["guided"],
        "baselines": baselines,
        "images": {
            "split": images.split,
            "split_sha256": images.split_sha256,
            "share": share,
            "seed": config.seed,
            "count": len(records),
            "patients": len(subjects),
        },
    }
    file = write_choices(path, options.guide, entry)
    logger.info(
        "Chosen on %d images of %d patients: level %g, scale %g, threshold %s (%s %.3f); kept in %s",
        len(records),
        len(subjects),
        chosen["level"],
        chosen["scale"],
        "none" if chosen["threshold"] is None else f"{chosen['threshold']:.4g}",
        criterion,
        chosen[criterion],
        file,
    )
    return file


def swept_levels(config: DictConfig, detector: Detector) -> list[float]:
    """The levels to sweep: those asked for, or quantiles of the training times."""
    if config.sweep.levels is not None:
        return list(config.sweep.levels)
    return [detector.time_at(share) for share in LEVELS]


def swept(
    config: DictConfig,
    detector: Detector,
    cases: Sequence[Any],
    options: DetectionOptions,
    levels: Sequence[float],
    scales: Sequence[float],
    stored: Path,
    asked: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the sweep, ``guided`` and of ``partial_noising``; levels that ``stored`` has are not swept again."""
    asked = json.loads(json.dumps(asked))
    kept = json.loads(stored.read_text()) if stored.is_file() else {}
    rows = kept["rows"] if kept.get("request") == asked else {"guided": [], "partial_noising": []}
    kinds = {"guided": (options, scales)}
    if options.guide != "none":
        noising = comparison_of(detector, options).partial_noising
        kinds["partial_noising"] = (noising, [SCALES["none"]])
    total = len(levels) * len(cases) * sum(len(of_kind) for _, of_kind in kinds.values())
    with Progress() as bar:
        task = bar.add_task("sweeping", total=total)
        for kind, (of_kind, of_scales) in kinds.items():
            for level in levels:
                if any(row["level"] == level for row in rows[kind]):
                    bar.advance(task, len(cases) * len(of_scales))
                    continue
                rows[kind] += sweep(
                    detector,
                    cases,
                    of_kind,
                    [level],
                    of_scales,
                    config.batch_size,
                    config.seed,
                    lambda count: bar.advance(task, count),
                )
                write_json(stored, {"request": asked, "rows": rows})
    return rows


# --- results ------------------------------------------------------------------------------------------


def request(
    config: DictConfig,
    detector: Detector,
    options: DetectionOptions,
    comparison: Comparison,
    threshold: float | None,
    records: Sequence[Record],
) -> dict[str, Any]:
    """What the results depend on."""
    model = detector.model
    return {
        "model_sha256": model.header["tensors_sha256"],
        "simulated_training_data": model.header.get("simulated", False),
        "classifier_sha256": classifier_sha256(detector),
        "target": detector.target.name,
        "healthy": detector.healthy,
        "options": {**asdict(options), "level": detector.level(options)},
        "comparison": asdict(comparison),
        "threshold": threshold,
        "seed": config.seed,
        "precision": config.precision,
        "images": {record.id: list(record.images.values()) for record in records},
    }


def look(
    config: DictConfig,
    detector: Detector,
    images: Images,
    options: DetectionOptions,
    comparison: Comparison,
    folder: Path,
) -> list[Found]:
    """Healthy counterparts of all images, with a progress bar."""
    with Progress() as bar:
        task = bar.add_task("detecting", total=len(images.records))
        return list(
            look_at(
                detector,
                images.records,
                images.truth,
                options,
                folder,
                comparison,
                config.batch_size,
                config.seed,
                lambda count: bar.advance(task, count),
            )
        )


def score_rows(
    founds: Sequence[Found], maps: np.ndarray, options: DetectionOptions, truth: Truth, threshold: float | None
) -> list[dict[str, Any]]:
    """The table, a row an image: its score, what it is said to be and, with a threshold, how much lesion it has."""
    rows = []
    for found, anomaly, score in zip(founds, maps, image_scores(maps, options), strict=True):
        case = found.case
        row = {
            "participant_id": case.record.id,
            "subject": case.record.subject,
            "score": float(score),
            truth.target.name: case.record.covariates.get(truth.target.name),
        }
        if threshold is not None:
            lesion = anomaly > threshold
            known = case.mask is not None and bool(case.mask.any())
            row |= {"lesion_voxels": int(lesion.sum()), "dice": dice(lesion, case.mask) if known else None}
        rows.append(row)
    return rows


def panel(
    founds: Sequence[Found], maps: np.ndarray, model: LatentDiffusionModel, channel: int, shown: int, path: Path
) -> None:
    """Image, healthy counterpart, map and mask of the first diseased and the first healthy cases."""
    groups = [[k for k, f in enumerate(founds) if f.case.diseased is kind] for kind in (True, False, None)]
    present = sum(bool(group) for group in groups)
    chosen = [k for group in groups for k in group[: -(-shown // present)]][:shown]
    if not chosen:
        return
    first = np.stack([founds[k].case.image[channel] for k in chosen])
    low, high = model.preprocessing.value_range or (float(first.min()), float(first.max()))
    top = float(np.percentile(maps, 99.9)) or 1.0
    rows = []
    for k in chosen:
        case = founds[k].case
        mask = None if case.mask is None else case.mask.astype(np.float32)
        rows.append((case.image[channel], founds[k].healthy[channel], maps[k], mask))
    figures.table_of_pictures(
        rows,
        path,
        (model.preprocessing.channels[channel], "healthy counterpart", f"map (0 to {top:.2g})", "mask"),
        ((low, high), (low, high), (0.0, top), (0.0, 1.0)),
        ("gray", "gray", "inferno", "gray"),
        [f"{founds[k].case.record.id}\n{_word(founds[k].case.diseased)}" for k in chosen],
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
