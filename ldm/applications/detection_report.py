"""Detection against the truth, beside what it has to be better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm.applications.anomaly import DetectionOptions, image_scores, smoothed
from ldm.applications.detection import Found, maps_of
from ldm.applications.tuning import reference_of
from ldm.metrics.detection import detection_metrics
from ldm.metrics.segmentation import mean_of_patients

#: what is compared, by the array of `Found` that the image is compared with
METHODS = {"partial_noising": "partial noising", "reconstruction": "first stage's reconstruction"}
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


def method_maps(founds: Sequence[Found], options: DetectionOptions, channel: int) -> dict[str, np.ndarray]:
    """Maps ``(N, *S)`` of the guided detection (by the name of its guide) and of everything beside it.

    Args:
        channel: whose intensity is the simplest map of all.
    """
    maps = {options.guide: maps_of(founds, options)}
    for name in METHODS:
        if getattr(founds[0], name) is not None:
            maps[name] = maps_of(founds, options, name)
    if founds[0].round_trip is not None:
        maps["intensity"] = smoothed(np.stack([found.case.image[channel] for found in founds]), options)
    return maps


def evaluate(
    founds: Sequence[Found],
    options: DetectionOptions,
    thresholds: Mapping[str, float | None],
    channel: int,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers of every method with their intervals over patients, and the two sanity numbers.

    Args:
        founds: images of which the truth is known.
        thresholds: of each method, chosen on other images.
        channel: see :func:`method_maps`.

    Raises:
        LdmError: the truth is not known of all, or is the same for all.
    """
    reference = reference_of([found.case for found in founds])
    methods = {
        name: detection_metrics(maps, image_scores(maps, options), reference, thresholds.get(name), resamples, seed)
        for name, maps in method_maps(founds, options, channel).items()
    }
    return {
        "images": {"healthy": int((~reference.diseased).sum()), "diseased": int(reference.diseased.sum())},
        "patients": len(set(reference.subjects)),
        "thresholds": {name: thresholds.get(name) for name in methods},
        "methods": methods,
        "sanity": sanity(founds, options, reference.diseased, seed),
    }


def sanity(founds: Sequence[Found], options: DetectionOptions, diseased: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How much of the maps is not the disease, each with its 95 % interval over patients.

    ``round_trip_mae``: mean absolute error of encoding and decoding without guidance, in the model's intensity range;
    ``healthy_map_unguided`` and ``healthy_map_guided``: mean of the map on healthy images at s = 0 and at the chosen s;
    ``healthy_change``: the latter less the former, paired; ``diseased_map_guided`` for comparison. Empty without a
    round trip.
    """
    if founds[0].round_trip is None:
        return {}
    errors = np.array([np.abs(found.case.image - found.round_trip).mean() for found in founds])
    unguided, guided = (maps_of(founds, options, name) for name in ("round_trip", "healthy"))
    unguided, guided = (maps.reshape(len(maps), -1).mean(1) for maps in (unguided, guided))  # (N,)
    subjects = np.array([found.case.record.subject for found in founds])
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
    """The methods as a Markdown table, with intervals; n/a where there is none."""
    columns = [(key, title) for key, title in COLUMNS if any(key in one for one in metrics["methods"].values())]
    lines = ["| method | " + " | ".join(title for _, title in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in metrics["methods"].items():
        cells = [_cell(values.get(key)) for key, _ in columns]
        lines.append(f"| {METHODS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["interval"] is None:
        return f"{entry['value']:.3f} (n/a)"
    low, high = entry["interval"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"
