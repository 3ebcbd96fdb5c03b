"""``ldm detect tune=true``: L, s and the threshold, chosen on images of which the truth is known."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.progress import Progress, track

from ldm.applications.anomaly import SCALES, DetectionOptions, Detector, anomaly_map
from ldm.applications.cases import Case, gather, load_case, unit_of
from ldm.applications.detection import Comparison, comparison_of, intensity_maps
from ldm.applications.tuning import (
    LESION,
    best,
    judge,
    lesion_values,
    reference_of,
    settled,
    sweep,
    tuning_subjects,
    write_choices,
)
from ldm.commands.detect_request import (
    FIRST_STAGE,
    Images,
    asked_options,
    channel_name,
    classifier_sha256,
    find_images,
    map_settings,
    marks,
    rebuilder_sha256,
    request,
)
from ldm.data.draft import Record
from ldm.files import write_json

logger = logging.getLogger(__name__)

#: swept where nothing else is asked for: quantiles of the training times, and s
LEVELS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
SWEPT_SCALES = {"classifier": (3.0, 10.0, 30.0, 100.0, 300.0), "free": (1.0, 2.0, 3.0, 5.0, 8.0), "none": (0.0,)}


def tune(config: DictConfig, detector: Detector, path: Path, channel: int) -> Path:
    """Choose L, s and the threshold on validation images; returns ``detection.json`` beside the model.

    What has been swept is kept in the output folder, so that the same command goes on.
    """
    options = DetectionOptions(**{name: value for name, value in asked_options(config).items() if value is not None})
    images = find_images(config, detector.model, path, detector, config.sweep.split)
    share = 1.0 if config.sweep.share is None else config.sweep.share
    subjects = tuning_subjects(images.records, share, config.seed)
    records = [record for record in images.records if record.subject in subjects]
    chosen_images = chosen_on(images, records)
    read = partial(load_case, preprocessing=detector.model.preprocessing, truth=images.truth)
    cases = gather(track(records, "reading"), read)
    reference, levels = reference_of(cases), swept_levels(config, detector, options)
    scales = SWEPT_SCALES[options.guide] if config.sweep.scales is None else list(config.sweep.scales)
    for scale in scales:
        replace(options, scale=scale)  # refuses one that is no number
    out = Path(config.run_dir)
    stored = out / f"sweep-{options.guide}.json"
    asked = request(config, detector, options, Comparison(), replace(images, records=records)) | map_settings(options)
    asked |= {"levels": levels, "scales": scales, "truth_sha256": truth_sha256(cases)}
    rows = swept(config, detector, cases, options, levels, scales, stored, asked)
    chosen, criterion = best(rows["guided"])
    baselines = {}
    if options.guide != "none":
        baselines["partial_noising"] = best(rows["partial_noising"])[0]
        images_array = np.stack([case.image for case in cases])  # (N, C, *S)
        for name, maps in intensity_maps(images_array, channel, options).items():
            baselines[name] = judge(maps, options, reference) | {"channel": channel_name(config, detector.model)}
        if comparison_of(detector, options).reconstruction:
            rebuilt = np.concatenate([detector.reconstructions(image[None]) for image in images_array])
            rebuilding = judge(anomaly_map(images_array, rebuilt, options, cases[0].channels), options, reference)
            baselines["reconstruction"] = rebuilding | {FIRST_STAGE: rebuilder_sha256(detector)}
    entry = {
        "classifier_sha256": classifier_sha256(detector),
        "target": detector.target.name,
        "healthy": detector.healthy,
        **({} if reference.masks is None else {LESION: lesion_values(images.truth)}),
        **{name: chosen[name] for name in ("level", "scale", "threshold")},
        "options": settled(options),
        "criterion": criterion,
        "sweep": rows["guided"],
        "baselines": baselines,
        "images": {"share": share, "seed": config.seed, **chosen_images},
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


def chosen_on(images: Images, records: Sequence[Record]) -> dict[str, Any]:
    """What the records that choices were made on are recognised by, see `tuned_ids`, and how many there are."""
    subjects = sorted({record.subject for record in records})
    return {
        "split": images.split,
        "split_sha256": images.split_sha256,
        "unit": unit_of(images.patients_known),
        "subjects": subjects,
        "files": sorted({mark for record in records for mark in marks(record, images)}),
        "count": len(records),
        "patients": len(subjects),
    }


def swept_levels(config: DictConfig, detector: Detector, options: DetectionOptions) -> list[float]:
    """The levels to sweep: those asked for, or quantiles of the training times; of levels with one chain the first.

    Raises:
        LdmError: a level that is none, or outside the chain.
    """
    asked = config.sweep.levels
    levels = [detector.time_at(share) for share in LEVELS] if asked is None else list(asked)
    chains: dict[float, float] = {}
    for level in levels:
        at_level = replace(options, level=level)
        detector.check(at_level)
        chains.setdefault(detector.grid(at_level).t[0], level)
    dropped = [level for level in levels if level not in chains.values()]
    if dropped:
        logger.info("sweep.levels: with steps=%d the chains of %s are those of others.", options.steps, dropped)
    return list(chains.values())


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


def truth_sha256(cases: Sequence[Case]) -> str:
    """Hash of what is known of cases, which a choice depends on."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.record.id} {case.diseased}".encode())
        digest.update(b"" if case.mask is None else np.packbits(case.mask).tobytes())
    return digest.hexdigest()
