"""Detection against the truth, beside what it has to be better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.applications.anomaly import DetectionOptions, image_scores
from ldm.applications.cases import IMAGE
from ldm.applications.detection import Seen
from ldm.applications.tuning import reference_of
from ldm.metrics.detection import detection_metrics
from ldm.metrics.segmentation import mean_of_patients

#: what methods are called in the table
TITLES = {"partial_noising": "partial noising", "reconstruction": "first stage's reconstruction"}
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


def evaluate(
    seen: Sequence[Seen],
    options: DetectionOptions,
    thresholds: Mapping[str, float | None],
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers of every method with their intervals over patients, and the two sanity numbers.

    Args:
        seen: images of which the truth is known.
        options: of scores.
        thresholds: of each method, chosen on other images.
        resamples, seed: see `ldm.metrics.detection.interval_over_patients`.

    Raises:
        LdmError: the truth is not known of all, or is the same for all.
    """
    reference, methods = reference_of(seen), {}
    for name in seen[0].maps:
        maps = np.stack([one.maps[name] for one in seen])  # (N, *S) of one method at a time
        scores = image_scores(maps, options)
        methods[name] = detection_metrics(maps, scores, reference, thresholds.get(name), resamples, seed)
    return {
        "images": {"healthy": int((~reference.diseased).sum()), "diseased": int(reference.diseased.sum())},
        "patients": len(set(reference.subjects)),
        "thresholds": {name: thresholds.get(name) for name in methods},
        "methods": methods,
        "sanity": sanity(seen, reference.diseased, seed),
    }


def sanity(seen: Sequence[Seen], diseased: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How much of the maps is not the disease, each with its 95 % interval over patients.

    ``round_trip_mae``: mean absolute error of encoding and decoding without guidance, in the model's intensity range;
    ``healthy_map_unguided`` and ``healthy_map_guided``: mean of the map on healthy images at s = 0 and at the chosen s;
    ``healthy_change``: the latter less the former, paired; ``diseased_map_guided`` for comparison. Empty without a
    round trip.
    """
    if not seen[0].sanity:
        return {}
    errors, unguided, guided = (
        np.array([one.sanity[name] for one in seen]) for name in ("error", "unguided", "guided")
    )  # (N,)
    subjects = np.array([one.record.subject for one in seen])
    everyone = np.ones_like(diseased)
    values = {
        "round_trip_mae": (errors, everyone),
        "healthy_map_unguided": (unguided, ~diseased),
        "healthy_map_guided": (guided, ~diseased),
        "healthy_change": (guided - unguided, ~diseased),
        "diseased_map_guided": (guided, diseased),
    }
    return {name: _of_patients(of_images[kind], subjects[kind], seed) for name, (of_images, kind) in values.items()}


def _of_patients(values: np.ndarray, subjects: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean over patients of the mean of their images, with its interval."""
    return mean_of_patients([values[subjects == one].mean() for one in np.unique(subjects)], seed=seed)


def markdown(metrics: Mapping[str, Any]) -> str:
    """The methods as a Markdown table, with intervals or n/a, and what is to be known of the numbers."""
    columns = [(key, title) for key, title in COLUMNS if any(key in one for one in metrics["methods"].values())]
    lines = ["| method | " + " | ".join(title for _, title in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in metrics["methods"].items():
        cells = [_cell(values.get(key)) for key, _ in columns]
        lines.append(f"| {TITLES.get(name, name)} | " + " | ".join(cells) + " |")
    remarks = in_words(metrics)
    return "\n".join([*lines, *([""] if remarks else []), *(f"* {remark}" for remark in remarks)]) + "\n"


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


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["interval"] is None:
        return f"{entry['value']:.3f} (n/a)"
    low, high = entry["interval"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"
