"""``ldm detect``: anomalies of images, by what a diffusion model makes of them when it is asked for healthy ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import Progress, track

from ldm.applications.anomaly import DetectionOptions, Detector, image_scores
from ldm.applications.cases import Truth, gather, load_case, unit_of
from ldm.applications.detection import (
    STORED,
    Comparison,
    Found,
    comparison_of,
    look_again,
    look_at,
    map_of,
    summary,
)
from ldm.applications.detection_output import TABLE, write_case, write_scores
from ldm.applications.detection_report import evaluate, markdown
from ldm.applications.detection_volumes import stack_detections
from ldm.applications.tuning import FILE, apply_choices, expect_lesions_of, read_choices, tuned_baselines
from ldm.commands.detect_request import (
    FIRST_STAGE,
    Images,
    asked_options,
    build_detector,
    channel_name,
    check_settings,
    classifier_sha256,
    find_images,
    map_settings,
    rebuilder_sha256,
    request,
    tuned_ids,
)
from ldm.commands.detect_tuning import tune
from ldm.commands.sample import load_model
from ldm.data.draft import Record
from ldm.diffusion.checks import check_count
from ldm.errors import LdmError
from ldm.files import write_json, write_text
from ldm.metrics.segmentation import dice
from ldm.model.generative import Generative
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.provenance import settle_request
from ldm.training import figures

logger = logging.getLogger(__name__)

METRICS = ("metrics.json", "metrics.md")


def run(config: DictConfig) -> Path:
    """Write maps, healthy counterparts, scores, a panel and the provenance; returns the table of scores.

    With ``slices`` the images are slices of volumes, and also put back into these; see
    :func:`ldm.applications.detection_volumes.stack_detections`.
    Where it is known which images are healthy, also ``metrics.json`` and ``metrics.md``. With ``tune`` choose L, s and
    the threshold instead, and return the file beside the model that holds them.
    """
    check_count("batch_size", config.batch_size)
    check_settings(config)
    model, path = load_model(config)
    expect_diffusion_of_images(model, path)
    detector = build_detector(config, model)
    channel = model.preprocessing.channels.index(channel_name(config, model))
    if config.tune:
        return tune(config, detector, path, channel)
    truth = Truth(detector.target, detector.healthy)
    entry = read_choices(path, classifier_sha256(detector), config.guide, truth)
    options, threshold = apply_choices(asked_options(config), entry, config.threshold)
    detector.check(options)
    if entry is None:
        warn_of_defaults(config, path, options, detector.level(options))
    images = find_images(config, model, path, detector, config.split)
    if config.images is None:  # which labels are lesions is not told of a folder
        expect_lesions_of(entry, path, config.guide, images.truth)
    tuned = tuned_ids(images, entry)
    evaluated = evaluated_ids(config, images, tuned)
    expect_a_lesion(images, evaluated, read_lesions(images, model))
    remarks = worth(images, evaluated, tuned) if evaluated else {}
    baselines = tuned_baselines(entry, options)
    comparison = Comparison()
    if config.compare and config.slices is None:  # of slices of volumes, nothing is measured
        comparison = comparison_of(detector, options, baselines.get("partial_noising", {}).get("level"))
    out = Path(config.run_dir)
    asked, changeable = request(config, detector, options, comparison, images), map_settings(options, threshold)
    settle_request(out, asked, changeable=changeable)
    for name in METRICS:
        (out / name).unlink(missing_ok=True)  # of maps that are written anew
    rows, seen = [], []
    for found in look(config, detector, images, options, comparison, out / STORED):
        anomaly = map_of(found, options)
        write_case(out, found.case, model.preprocessing, found.healthy, anomaly, threshold)
        rows.append(score_row(found, anomaly, options, images.truth, threshold))
        if found.case.record.id in evaluated:
            seen.append(summary(found, anomaly, options, channel))
    chosen = to_show(images, config.shown) if config.slices is None else highest(images.records, rows, config.shown)
    shown = [look_again(one, model.preprocessing, images.truth, out / STORED) for one in chosen]
    panel(shown, options, model, channel, out / "panel.png")
    table = write_scores(out / TABLE, rows)
    if config.slices is not None:
        volumes = stack_detections(out, images.records, model.preprocessing, images.truth, options, threshold)
        logger.info("The slices, put back into volumes, and scores of these: %s", volumes.parent)
    if seen:
        thresholds = baseline_thresholds(baselines, channel_name(config, model), detector) | {options.guide: threshold}
        metrics = evaluate(seen, options, thresholds, config.resamples, config.seed) | remarks
        metrics["protocol"] = {name: value for name, value in asked.items() if name not in ("images", "files_sha256")}
        metrics["protocol"] |= changeable
        metrics["protocol"] |= {"split": images.split, "intensity_channel": channel_name(config, model)}
        write_metrics(out, metrics)
    logger.info("%d images: maps, healthy counterparts and %s are in %s", len(rows), TABLE, out)
    return table


def expect_diffusion_of_images(model: Generative, path: Path) -> None:
    """Refuse a model that cannot bring an image to noise and back.

    Raises:
        LdmError: naming the file and what it holds.
    """
    if not isinstance(model, LatentDiffusionModel):
        raise LdmError(f"{path} holds {model.what}; only a diffusion model can look for what is not healthy.")
    if model.classes is not None:
        raise LdmError(
            f"{path} makes label maps, and no images; ldm detect takes a model of images, and this is one for "
            "ldm segment."
        )


def warn_of_defaults(config: DictConfig, path: Path, options: DetectionOptions, level: float) -> None:
    """Say what is used where neither the request nor ``detection.json`` says it.

    Args:
        config: the request.
        path: of the model.
        options, level: that are used.
    """
    used = {"level": f"{level:g}", "scale": f"{options.scale:g}", "threshold": "none, so that no lesions are written"}
    names = [name for name in used if config[name] is None and not (name == "scale" and options.guide == "none")]
    if names:
        logger.warning(
            "%s has nothing for guide=%s, so these are not tuned: %s. ldm detect tune=true guide=%s chooses them on "
            "images of which the truth is known.",
            *(path.with_name(FILE), options.guide, "; ".join(f"{name}: {used[name]}" for name in names), options.guide),
        )


def baseline_thresholds(
    baselines: Mapping[str, Mapping[str, Any]], channel: str, detector: Detector
) -> dict[str, float | None]:
    """Thresholds that were chosen for what stands beside the detection.

    That of another channel's intensity, or of another first stage's reconstructions, is none.
    """
    thresholds = {name: one["threshold"] for name, one in baselines.items()}
    foreign = [name for name, one in baselines.items() if one.get("channel", channel) != channel]
    if foreign:
        logger.warning(
            "The threshold of plain intensity was chosen for %s, so %s has none; tune with intensity_channel=%s.",
            *(baselines[foreign[0]]["channel"], channel, channel),
        )
    thresholds |= dict.fromkeys(foreign)
    rebuilt = baselines.get("reconstruction", {})
    if detector.rebuilds and rebuilt.get(FIRST_STAGE, rebuilder_sha256(detector)) != rebuilder_sha256(detector):
        logger.warning(
            "The threshold of reconstructions was chosen with another first stage, so there is none; tune with "
            "reconstructed_by as it is here."
        )
        thresholds["reconstruction"] = None
    return thresholds


def evaluated_ids(config: DictConfig, images: Images, tuned: set[str]) -> set[str]:
    """Images that are compared with the truth: none where it is not known, and not those that choices were made on.

    Args:
        config: says whether to evaluate; slices of volumes are not.
        images: what is looked at.
        tuned: those that choices were made on; they are taken where there are no others, with a warning.

    Raises:
        LdmError: the class is known of some images only, or is the same for all.
    """
    known = [images.truth.diseased(record) for record in images.records]
    if config.slices is not None or config.evaluate is False or all(one is None for one in known):
        return set()
    remedy = "evaluate=false writes maps and scores alone."
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


def read_lesions(images: Images, model: LatentDiffusionModel) -> dict[str, bool | None]:
    """Whether each image's mask has a lesion; None without a mask. What is read here can be read in the long run too.

    Raises:
        LdmError: all images and masks that cannot be used, by name.
    """

    def lesion(record: Record) -> bool | None:
        mask = load_case(record, model.preprocessing, images.truth).mask
        return None if mask is None else bool(mask.any())

    found = gather(track(images.records, "reading"), lesion)
    return {record.id: one for record, one in zip(images.records, found, strict=True)}


def expect_a_lesion(images: Images, evaluated: set[str], lesions: Mapping[str, bool | None]) -> None:
    """Refuse masks that are all empty, before anything is computed.

    Raises:
        LdmError: naming the labels and the images.
    """
    known = {name: lesions[name] for name in sorted(evaluated) if lesions[name] is not None}
    if not known or any(known.values()):
        return
    classes = images.truth.lesion
    labels = "a label other than 0" if classes is None else f"a label of {', '.join(classes.names)}"
    names = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
    raise LdmError(
        f"None of the {len(known)} masks to evaluate ({names}) has {labels} on the model's grid. Name other classes "
        "(lesion=[...]), take other images, or write maps and scores alone (evaluate=false)."
    )


def worth(images: Images, evaluated: set[str], tuned: set[str]) -> dict[str, Any]:
    """What the numbers of these images are worth: whether model or choices were made on them, whose they are.

    ``trained_on_these``: how many are of the training split; None of a folder, where that is not known.
    """
    trained = (
        None
        if images.split is None
        else len(evaluated & {record.id for record in images.records if record.split == "train"})
    )
    if trained:
        logger.warning(
            "split=%s: the model was trained on %d of these %d images; the numbers say so in `trained_on_these`.",
            *(images.split, trained, len(evaluated)),
        )
    return {
        "trained_on_these": trained,
        "chosen_on_these_images": bool(evaluated & tuned),
        "unit": unit_of(images.patients_known),
    }


# --- results ------------------------------------------------------------------------------------------


def look(
    config: DictConfig,
    detector: Detector,
    images: Images,
    options: DetectionOptions,
    comparison: Comparison,
    folder: Path,
) -> Iterator[Found]:
    """Healthy counterparts of all images, one by one, with a progress bar."""
    with Progress() as bar:
        task = bar.add_task("detecting", total=len(images.records))
        yield from look_at(
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


def score_row(
    found: Found, anomaly: np.ndarray, options: DetectionOptions, truth: Truth, threshold: float | None
) -> dict[str, Any]:
    """A row of the table: an image's score, what it is said to be and, with a threshold, how much lesion it has."""
    case = found.case
    row = {
        "participant_id": case.record.id,
        "subject": case.record.subject,
        "score": float(image_scores(anomaly[None], options)[0]),
        truth.target.name: case.record.covariates.get(truth.target.name),
    }
    if threshold is not None:
        lesion = anomaly > threshold
        known = case.mask is not None and bool(case.mask.any())
        row |= {"lesion_voxels": int(lesion.sum()), "dice": dice(lesion, case.mask) if known else None}
    return row


def write_metrics(out: Path, metrics: Mapping[str, Any]) -> None:
    """The numbers as JSON and as a table."""
    numbers, table = METRICS
    write_json(out / numbers, metrics)
    logger.info("Against the truth:\n%s", write_text(out / table, markdown(metrics)).read_text())


def to_show(images: Images, shown: int) -> list[Record]:
    """The first diseased, healthy and unknown images, as many of each."""
    groups = [[r for r in images.records if images.truth.diseased(r) is kind] for kind in (True, False, None)]
    present = sum(bool(group) for group in groups)
    return [record for group in groups for record in group[: -(-shown // present)]][:shown]


def highest(records: Sequence[Record], rows: Sequence[Mapping[str, Any]], shown: int) -> list[Record]:
    """The records of the highest scores, the highest first: the first slices of a volume show little."""
    order = sorted(range(len(records)), key=lambda index: -rows[index]["score"])
    return [records[index] for index in order[:shown]]


def panel(
    founds: Sequence[Found], options: DetectionOptions, model: LatentDiffusionModel, channel: int, path: Path
) -> None:
    """Image, healthy counterpart, map and mask of cases."""
    if not founds:
        return
    first = np.stack([found.case.image[channel] for found in founds])
    low, high = model.preprocessing.value_range or (float(first.min()), float(first.max()))
    maps = [map_of(found, options) for found in founds]
    top = float(np.percentile(np.stack(maps), 99.9)) or 1.0
    rows = []
    for found, anomaly in zip(founds, maps, strict=True):
        mask = None if found.case.mask is None else found.case.mask.astype(np.float32)
        rows.append((found.case.image[channel], found.healthy[channel], anomaly, mask))
    figures.table_of_pictures(
        rows,
        path,
        (model.preprocessing.channels[channel], "healthy counterpart", f"map (0 to {top:.2g})", "mask"),
        ((low, high), (low, high), (0.0, top), (0.0, 1.0)),
        ("gray", "gray", "inferno", "gray"),
        [f"{found.case.record.id}\n{_word(found.case.diseased)}" for found in founds],
    )


def _word(diseased: bool | None) -> str:
    return "" if diseased is None else "diseased" if diseased else "healthy"
