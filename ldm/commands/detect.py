"""``ldm detect``: anomalies of images, by what a diffusion model makes of them when it is asked for healthy ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import Progress

from ldm.applications.anomaly import DetectionOptions, Detector, image_scores
from ldm.applications.cases import Truth
from ldm.applications.detection import STORED, Comparison, Found, comparison_of, look_at, maps_of
from ldm.applications.detection_output import TABLE, write_case, write_scores
from ldm.applications.detection_report import evaluate, markdown
from ldm.applications.tuning import apply_choices, read_choices, settled
from ldm.commands.detect_request import (
    Images,
    asked_options,
    build_detector,
    channel_name,
    check_settings,
    classifier_sha256,
    find_images,
    request,
    tuned_ids,
)
from ldm.commands.detect_tuning import tune
from ldm.commands.sample import load_model
from ldm.diffusion.checks import check_count
from ldm.errors import LdmError
from ldm.files import write_json, write_text
from ldm.metrics.segmentation import dice
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.provenance import settle_request
from ldm.training import figures

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Path:
    """Write maps, healthy counterparts, scores, a panel and the provenance; returns the table of scores.

    Where it is known which images are healthy, also ``metrics.json`` and ``metrics.md``. With ``tune`` choose L, s and
    the threshold instead, and return the file beside the model that holds them.
    """
    check_count("batch_size", config.batch_size)
    check_settings(config)
    model, path = load_model(config)
    detector = build_detector(config, model)
    channel = model.preprocessing.channels.index(channel_name(config, model))
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
    asked = request(config, detector, options, comparison, threshold, images.records)
    settle_request(out, asked)
    founds = look(config, detector, images, options, comparison, out / STORED)
    maps = maps_of(founds, options)
    for found, anomaly in zip(founds, maps, strict=True):
        write_case(out, found.case, model.preprocessing, found.healthy, anomaly, threshold)
    panel(founds, maps, model, channel, config.shown, out / "panel.png")
    table = write_scores(out / TABLE, score_rows(founds, maps, options, images.truth, threshold))
    if evaluated:
        chosen = [found for found in founds if found.case.record.id in evaluated]
        thresholds = baseline_thresholds(baselines, channel_name(config, model)) | {options.guide: threshold}
        metrics = evaluate(chosen, options, thresholds, channel, config.resamples, config.seed)
        metrics["chosen_on_these_images"] = bool(evaluated & tuned_ids(images, entry))
        metrics["protocol"] = {name: value for name, value in asked.items() if name not in ("images", "files_sha256")}
        metrics["protocol"] |= {"split": images.split, "intensity_channel": channel_name(config, model)}
        write_json(out / "metrics.json", metrics)
        logger.info("Against the truth:\n%s", write_text(out / "metrics.md", markdown(metrics)).read_text())
    logger.info("%d images: maps, healthy counterparts and %s are in %s", len(founds), TABLE, out)
    return table


def baseline_thresholds(baselines: Mapping[str, Mapping[str, Any]], channel: str) -> dict[str, float | None]:
    """Thresholds that were chosen for what stands beside the detection; that of another channel's intensity is none."""
    thresholds = {name: one["threshold"] for name, one in baselines.items()}
    if "intensity" in baselines and baselines["intensity"]["channel"] != channel:
        logger.warning(
            "The threshold of plain intensity was chosen for %s, so %s has none; tune with intensity_channel=%s.",
            *(baselines["intensity"]["channel"], channel, channel),
        )
        thresholds["intensity"] = None
    return thresholds


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


# --- results ------------------------------------------------------------------------------------------


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
