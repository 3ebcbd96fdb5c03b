"""How good written segmentations are, and whether their uncertainty is right, with intervals over patients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.applications.segmentation import Result, Source, read_result, read_truth
from ldm.data.draft import Record
from ldm.metrics import segmentation as measures

#: of a class, over the patients who have it
WHERE_PRESENT = ("dice", "jaccard", "hd95", "ged", "member_dice", "ceiling", "volume_error", "in_interval")
PER_PATIENT = ("ece_region", "spearman", "uncertainty")


def evaluate(
    source: Source,
    records: Sequence[Record],
    out: Path,
    split: str | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure what :func:`ldm.applications.segmentation.segment` wrote against the label maps, in the files' space.

    All images of a patient count as one volume; only surface distances are measured image by image and averaged.
    Overlap is that of patients who have the class: one without it would earn 1 for every empty answer, and is asked
    only whether something was found (``false_volume``). Calibration is that of "any class" against background; its
    region is where some member has a class, which is known without the truth.

    Args:
        source: what segmented.
        records: subjects with label maps.
        out: folder of the results.
        split: which of the cohort's the records are; None for files.
        seed: of the bootstrap.
        progress: called with the number of finished patients.

    Returns:
        ``protocol``, ``patients`` (a row each), ``summary`` (95 % bootstrap intervals over patients), ``calibration``.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.subject].append(record)
    patients, everywhere, region = [], [], []
    for subject, own in groups.items():
        results = [read_result(out, record, source) for record in own]
        truths = [read_truth(record, source) for record in own]
        seen = [_through_the_grid(record, source) for record in own]
        patient, bins = measure_patient(results, truths, seen, source.classes.names)
        patients.append({"subject": subject, "images": len(own), **patient})
        everywhere.append(bins["everywhere"])
        region.append(bins["region"])
        if progress is not None:
            progress(1)
    return {
        "protocol": {
            **source.facts,
            "classes": {name: list(values) for name, values in source.classes.values.items()},
            "images": len(records),
            "patients": len(groups),
            "unit": "pixels" if results[0].spacing is None else "mm",
            "split": split,
            "split_sha256": None if split is None else source.split_sha256,
        },
        "patients": patients,
        "summary": summarise(patients, source.classes.names, seed),
        "calibration": calibrate(patients, everywhere, region, seed),
    }


def measure_patient(
    results: Sequence[Result], truths: Sequence[np.ndarray], seen: Sequence[np.ndarray], classes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers of one patient, and the bins of the reliability diagram.

    Args:
        results: of the patient's images.
        truths: class indices ``(*S)`` of each.
        seen: the same as a perfect answer on the model's grid would be written.
        classes: names of 1, 2, ...
    """
    labels, truth, ceiling = (_flat(arrays) for arrays in ([r.labels for r in results], truths, seen))
    members = np.concatenate([r.members.reshape(len(r.members), -1) for r in results], axis=1)  # (M, V)
    probability = np.clip(_flat([r.mean.sum(0) for r in results]), 0, 1)
    variance = _flat([r.variance for r in results])
    voxel = float(np.prod(results[0].spacing)) if results[0].spacing else 1.0
    of_classes = {}
    for index, name in enumerate(classes, 1):
        masks = (labels == index, truth == index, members == index, ceiling == index)
        of_classes[name] = _measure_class(*masks, voxel) | _surfaces(results, truths, index)
    inside, region = truth > 0, (members > 0).any(0)
    bins = {
        "everywhere": measures.reliability(probability, inside),
        "region": measures.reliability(probability[region], inside[region]),
    }
    patient = {
        "classes": of_classes,
        "has_any": bool(inside.any()),
        "error": 1 - measures.dice(labels > 0, inside),
        "ece_region": measures.expected_calibration_error(bins["region"]),
        "spearman": measures.spearman(variance[region], (labels != truth)[region]),
        "uncertainty": float(variance[region].mean()) if region.any() else 0.0,
        "rejection": measures.rejection_curve(labels > 0, inside, variance, int(region.sum())),
        "with_truth": [_measure_image(r, t) for r, t in zip(results, truths, strict=True) if t.any()],
    }
    return patient, bins


def _measure_class(
    found: np.ndarray, true: np.ndarray, each: np.ndarray, ceiling: np.ndarray, voxel: float
) -> dict[str, Any]:
    """Overlap and volume where the patient has the class; without it what was found instead.

    Args:
        found, true, ceiling: masks ``(V,)``.
        each: of the members ``(M, V)``.
        voxel: volume of one.
    """
    dice = measures.dice(found, true)
    if not true.any():
        return {"present": False, "dice_or_empty": dice, "false_volume": float(found.sum()) * voxel}
    low, high = np.percentile(each.sum(1), (2.5, 97.5))
    return {
        "present": True,
        "dice": dice,
        "dice_or_empty": dice,
        "jaccard": measures.jaccard(found, true),
        "ged": measures.generalised_energy_distance(list(each), [true]),
        "dice_of_members": (of_members := [measures.dice(one, true) for one in each]),
        "member_dice": float(np.mean(of_members)),
        "ceiling": measures.dice(ceiling, true),
        "volume": float(found.sum()) * voxel,
        "true_volume": float(true.sum()) * voxel,
        "volume_error": (float(found.sum()) - float(true.sum())) * voxel,
        "in_interval": float(low <= true.sum() <= high),
    }


def _surfaces(results: Sequence[Result], truths: Sequence[np.ndarray], index: int) -> dict[str, Any]:
    """Mean distance over images in which both masks have a surface, and the number of those in which only one has."""
    pairs = [(r.labels == index, t == index, r.spacing) for r, t in zip(results, truths, strict=True)]
    distances = [measures.hd95(*pair) for pair in pairs]
    known = [one for one in distances if np.isfinite(one)]
    return {
        "hd95": float(np.mean(known)) if known else float("nan"),
        "one_surface": sum(bool(found.any() != true.any()) for found, true, _ in pairs),
    }


def _measure_image(result: Result, truth: np.ndarray) -> dict[str, float]:
    """How unsure an ensemble was of an image, known without the truth, and how wrong it was: 1 - Dice of any class."""
    region = (result.members > 0).any(0)
    return {
        "uncertainty": float(result.variance[region].mean()) if region.any() else 0.0,
        "error": 1 - measures.dice(result.labels > 0, truth > 0),
    }


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _through_the_grid(record: Record, source: Source) -> np.ndarray:
    """The label map ``(*S)`` as class indices as a perfect answer on the model's grid would be written."""
    recipe = source.preprocessing
    _, geometry = recipe.load(record)
    stored = geometry.undo(recipe.load_labels(record)[None], labels=True)[0]
    return source.classes.classes(torch.from_numpy(stored)).numpy()


def summarise(patients: Sequence[Mapping[str, Any]], classes: Sequence[str], seed: int) -> dict[str, Any]:
    """Means over patients with intervals; those of a class over the patients who have it, but for two.

    ``dice_or_empty`` is over all, 1 where neither has the class; ``false_volume`` over those without it, with
    ``false_positives``, the share of them in whom something was found.
    """
    per_class = {}
    for name in classes:
        rows = [patient["classes"][name] for patient in patients]
        absent = [row["false_volume"] for row in rows if not row["present"]]
        per_class[name] = {
            measure: measures.bootstrap([row[measure] for row in rows if row["present"]], seed=seed)
            for measure in WHERE_PRESENT
        } | {
            "dice_or_empty": measures.bootstrap([row["dice_or_empty"] for row in rows], seed=seed),
            "false_volume": measures.bootstrap(absent, seed=seed),
            "false_positives": measures.bootstrap([float(volume > 0) for volume in absent], seed=seed),
            "one_surface": sum(row["one_surface"] for row in rows),
        }
    return {"classes": per_class} | {
        name: measures.bootstrap([patient[name] for patient in patients], seed=seed) for name in PER_PATIENT
    }


def calibrate(
    patients: Sequence[Mapping[str, Any]], everywhere: Sequence[dict], region: Sequence[dict], seed: int
) -> dict[str, Any]:
    """Whether the ensemble knows where it is wrong.

    Rank correlations are those of mean variance with 1 - Dice, over images and over patients that have any class.
    """
    ill = [patient for patient in patients if patient["has_any"]]
    pooled, near = measures.pooled(everywhere), measures.pooled(region)
    curves = np.array([patient["rejection"] for patient in ill]).reshape(len(ill), len(measures.SHARES))
    return {
        "reliability": pooled,
        "reliability_region": near,
        "ece": measures.expected_calibration_error(pooled),
        "ece_region": measures.expected_calibration_error(near),
        "spearman_of_images": measures.clustered_spearman(
            [[(one["uncertainty"], one["error"]) for one in patient["with_truth"]] for patient in ill], seed
        ),
        "spearman_of_patients": measures.clustered_spearman([[(p["uncertainty"], p["error"])] for p in ill], seed),
        "rejected_share": list(measures.SHARES),
        "rejection_dice": [measures.bootstrap(column, seed=seed) for column in curves.T],
    }


def paired_difference(metrics: Mapping[str, Any], other: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Dice of one evaluation less that of another, class by class, paired over the patients who have it.

    Args:
        metrics, other: two of :func:`evaluate`, of the same patients in the same order.
        seed: of the bootstrap.
    """
    pairs = list(zip(metrics["patients"], other["patients"], strict=True))
    return {
        name: measures.bootstrap(
            [
                one["classes"][name]["dice"] - two["classes"][name]["dice"]
                for one, two in pairs
                if one["classes"][name]["present"]
            ],
            seed=seed,
        )
        for name in metrics["protocol"]["classes"]
    }
