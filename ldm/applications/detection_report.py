"""Detection against the truth, beside what it has to be better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.applications.anomaly import DetectionOptions, image_scores
from ldm.applications.cases import IMAGE
from ldm.applications.detection import Seen
from ldm.applications.tuning import reference_of
from ldm.metrics.detection import detection_statistics, paired_differences, values_of
from ldm.metrics.segmentation import mean_of_patients

#: what methods are called in the table
TITLES = {
    "partial_noising": "partial noising",
    "reconstruction": "first stage's reconstruction",
    "intensity_scaled": "intensity, scaled by image",
}
COLUMNS = (
    ("pixel_auroc", "voxel AUROC"),
    ("pixel_auprc", "voxel AUPRC"),
    ("dice", "Dice"),
    ("dice_pooled", "Dice, pooled"),
    ("dice_otsu", "Dice, Otsu"),
    ("image_auroc", "image AUROC"),
    ("image_auprc", "image AUPRC"),
    ("false_positive_voxels", "false voxels"),
    ("false_positive_images", "false images"),
)
SANITY = {
    "round_trip_mae": "error of the round trip",
    "healthy_map_unguided": "map of healthy images, unguided",
    "healthy_map_guided": "map of healthy images, guided",
    "healthy_change": "change of that map by guidance",
    "healthy_change_p99": "change of healthy images by guidance, 99th percentile of each",
    "diseased_map_guided": "map of diseased images, guided",
}


def evaluate(
    seen: Sequence[Seen],
    options: DetectionOptions,
    thresholds: Mapping[str, float | None],
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers of every method, what the guide is better by than each of the others, and the sanity numbers.

    All with intervals over patients; for ``differences`` see `ldm.metrics.detection.paired_differences`.

    Args:
        seen: images of which the truth is known.
        options: of scores.
        thresholds: of each method, chosen on other images.
        resamples, seed: see `ldm.metrics.detection.interval_over_patients`.

    Raises:
        LdmError: the truth is not known of all, or is the same for all.
    """
    reference, statistics = reference_of(seen), {}
    for name in seen[0].maps:
        maps = np.stack([one.maps[name] for one in seen])  # (N, *S) of one method at a time
        scores = image_scores(maps, options)
        statistics[name] = detection_statistics(maps, scores, reference, thresholds.get(name))
    methods = {name: values_of(one, reference, resamples, seed) for name, one in statistics.items()}
    ours = statistics[options.guide]
    return {
        "images": {"healthy": int((~reference.diseased).sum()), "diseased": int(reference.diseased.sum())},
        "patients": len(set(reference.subjects)),
        "thresholds": {name: thresholds.get(name) for name in methods},
        "methods": methods,
        "differences": {
            name: paired_differences(ours, one, reference, resamples, seed)
            for name, one in statistics.items()
            if name != options.guide
        },
        "sanity": sanity(seen, reference.diseased, seed),
    }


def sanity(seen: Sequence[Seen], diseased: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How much of the maps is not the disease, each with its 95 % interval over patients.

    ``round_trip_mae``: mean absolute error of encoding and decoding without guidance, in the model's intensity range;
    ``healthy_map_unguided`` and ``healthy_map_guided``: mean of the map on healthy images at s = 0 and at the chosen s;
    ``healthy_change``: the latter less the former, paired; ``healthy_change_p99``: mean over healthy images of the 99th
    percentile of what guidance changes in them, ``|guided - unguided|``, which shows a focal change that the mean of an
    image hides; ``diseased_map_guided`` for comparison. Empty without a round trip.
    """
    if not seen[0].sanity:
        return {}
    errors, unguided, guided, p99 = (
        np.array([one.sanity[name] for one in seen]) for name in ("error", "unguided", "guided", "change_p99")
    )  # (N,)
    subjects = np.array([one.record.subject for one in seen])
    everyone = np.ones_like(diseased)
    values = {
        "round_trip_mae": (errors, everyone),
        "healthy_map_unguided": (unguided, ~diseased),
        "healthy_map_guided": (guided, ~diseased),
        "healthy_change": (guided - unguided, ~diseased),
        "healthy_change_p99": (p99, ~diseased),
        "diseased_map_guided": (guided, diseased),
    }
    return {name: _of_patients(of_images[kind], subjects[kind], seed) for name, (of_images, kind) in values.items()}


def _of_patients(values: np.ndarray, subjects: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean over patients of the mean of their images, with its interval."""
    return mean_of_patients([values[subjects == one].mean() for one in np.unique(subjects)], seed=seed)


def markdown(metrics: Mapping[str, Any]) -> str:
    """Markdown tables of methods, differences and sanity numbers, and what is to be known of the numbers."""
    parts = [_table("method", metrics["methods"])]
    differences = {name: one for name, one in metrics.get("differences", {}).items() if one}
    if differences:
        guide = next(name for name in metrics["methods"] if name not in metrics["differences"])
        parts.append(_table(f"{guide} less", differences, "+.3f"))
    if metrics.get("sanity"):
        rows = [f"| {SANITY[name]} | {_cell(one, '.4f')} |" for name, one in metrics["sanity"].items()]
        parts.append(["| not the disease | mean over patients |", "|---|---|", *rows])
    remarks = [f"* {remark}" for remark in in_words(metrics)]
    return "\n\n".join("\n".join(part) for part in [*parts, remarks] if part) + "\n"


def _table(corner: str, rows: Mapping[str, Mapping[str, Any]], form: str = ".3f") -> list[str]:
    """Lines of a table of methods, with the columns that one of them has."""
    columns = [(key, title) for key, title in COLUMNS if any(key in one for one in rows.values())]
    lines = [f"| {corner} | " + " | ".join(title for _, title in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [_cell(values.get(key), form) for key, _ in columns]
        lines.append(f"| {TITLES.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def in_words(metrics: Mapping[str, Any]) -> list[str]:
    """What makes the numbers worth less than they look, a sentence each."""
    remarks, images = [], sum(metrics["images"].values())
    if metrics.get("trained_on_these"):
        remarks.append(
            f"{metrics['trained_on_these']} of {images} images are ones that the model was trained on: the numbers are "
            "too good."
        )
    if metrics.get("chosen_on_these_images"):
        remarks.append("Level, scale and threshold were chosen on these images: the numbers are too good.")
    if metrics.get("unit") == IMAGE:
        remarks.append("It is not known whose images these are: intervals are over images, not over patients.")
    return remarks


def _cell(entry: Mapping[str, Any] | None, form: str = ".3f") -> str:
    if entry is None:
        return ""
    if entry["interval"] is None:
        return f"{entry['value']:{form}} (n/a)"
    low, high = entry["interval"]
    return f"{entry['value']:{form}} ({low:{form}} to {high:{form}})"
