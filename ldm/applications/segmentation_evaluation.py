"""How good written segmentations are, and whether their uncertainty is right, with intervals over patients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.applications.segmentation import Result, interval_of, read_result, read_truth
from ldm.applications.segmentation_sources import EnsembleSource
from ldm.data.draft import Record
from ldm.metrics import segmentation as measures

#: of a class, over the patients who have it
WHERE_PRESENT = ("dice", "jaccard", "hd95", "ged", "member_dice", "ceiling", "volume_error", "in_interval")
PER_PATIENT = ("ece_region", "spearman", "uncertainty")


def evaluate(
    source: EnsembleSource,
    records: Sequence[Record],
    out: Path,
    split: str | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure what :func:`ldm.applications.segmentation.segment` wrote against the label maps, in the files' space.

    All images of a patient count as one volume; only surface and energy distances are measured image by image and
    averaged. Whether a volume lies between the members' is asked only where a member is one draw over all images.
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
    patients, everywhere, region, units = [], [], [], set()
    for subject, own in groups.items():
        results = [read_result(out, record, source) for record in own]
        truths = [read_truth(record, source) for record in own]
        seen = [_through_the_grid(record, source) for record in own]
        patient, bins = measure_patient(results, truths, seen, source.classes.names, source.joint)
        units |= {"pixels" if result.spacing is None else "mm" for result in results}
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
            "unit": " or ".join(sorted(units)),
            "split": split,
            "split_sha256": None if split is None else source.split_sha256,
        },
        "patients": patients,
        "summary": summarise(patients, source.classes.names, seed),
        "calibration": calibrate(patients, everywhere, region, seed),
    }


def measure_patient(
    results: Sequence[Result],
    truths: Sequence[np.ndarray],
    seen: Sequence[np.ndarray],
    classes: Sequence[str],
    joint: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers of one patient, and the bins of the reliability diagram.

    Args:
        results: of the patient's images.
        truths: class indices ``(*S)`` of each.
        seen: the same as a perfect answer on the model's grid would be written.
        classes: names of 1, 2, ...
        joint: whether member m of all images is one draw; of a single image it is anyway.
    """
    labels, truth = _flat([r.labels for r in results]), _flat(truths)
    members = np.concatenate([r.members.reshape(len(r.members), -1) for r in results], axis=1)  # (M, V)
    probability = np.clip(_flat([r.mean.sum(0) for r in results]), 0, 1)
    variance = _flat([r.variance for r in results])
    joint = joint or len(results) == 1
    of_classes = {
        name: _measure_class(results, truths, seen, index, joint) | _surfaces(results, truths, index)
        for index, name in enumerate(classes, 1)
    }
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
    results: Sequence[Result], truths: Sequence[np.ndarray], seen: Sequence[np.ndarray], index: int, joint: bool
) -> dict[str, Any]:
    """Overlap and volume of class ``index`` where the patient has it; without it what was found instead.

    The energy distance is that of an image, averaged over the patient's: whole patients would need members that are
    one draw. The interval of their volumes does need them; where there is none, NaN says so.
    """
    found, true, ceiling = ([one == index for one in arrays] for arrays in ([r.labels for r in results], truths, seen))
    overlap, volume = measures.dice(_flat(found), _flat(true)), _volume(found, results)
    if not any(one.any() for one in true):
        return {"present": False, "dice_or_empty": overlap, "false_volume": volume}
    each = [result.members == index for result in results]  # (M, *S) of an image
    members = list(zip(*each, strict=True))  # of each its masks of all images
    of_members = [measures.dice(_flat(one), _flat(true)) for one in members]
    low, high = interval_of([_volume(one, results) for one in members]) if joint else (None, None)
    distances = [measures.generalised_energy_distance(list(e), [t]) for e, t in zip(each, true, strict=True)]
    true_volume = _volume(true, results)
    return {
        "present": True,
        "dice": overlap,
        "dice_or_empty": overlap,
        "jaccard": measures.jaccard(_flat(found), _flat(true)),
        "ged": float(np.mean(distances)),
        "dice_of_members": of_members,
        "member_dice": float(np.mean(of_members)),
        "ceiling": measures.dice(_flat(ceiling), _flat(true)),
        "volume": volume,
        "true_volume": true_volume,
        "volume_error": volume - true_volume,
        "in_interval": float("nan") if low is None else float(low <= true_volume <= high),
    }


def _volume(masks: Sequence[np.ndarray], results: Sequence[Result]) -> float:
    """Volume of a patient's masks, one an image, each with the voxels of its own image."""
    return sum(float(mask.sum()) * result.voxel for mask, result in zip(masks, results, strict=True))


def _surfaces(results: Sequence[Result], truths: Sequence[np.ndarray], index: int) -> dict[str, Any]:
    """Mean distance over images in which both masks have a surface, and the number of those in which only one has."""
    pairs = [
        (r.labels == index, t == index, None if r.spacing is None else r.spacing[: t.ndim])
        for r, t in zip(results, truths, strict=True)
    ]
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


def _through_the_grid(record: Record, source: EnsembleSource) -> np.ndarray:
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
            measure: measures.mean_of_patients([row[measure] for row in rows if row["present"]], seed=seed)
            for measure in WHERE_PRESENT
        } | {
            "dice_or_empty": measures.mean_of_patients([row["dice_or_empty"] for row in rows], seed=seed),
            "false_volume": measures.mean_of_patients(absent, seed=seed),
            "false_positives": measures.mean_of_patients([float(volume > 0) for volume in absent], seed=seed),
            "one_surface": sum(row["one_surface"] for row in rows),
        }
    return {"classes": per_class} | {
        name: measures.mean_of_patients([patient[name] for patient in patients], seed=seed) for name in PER_PATIENT
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
        "rejection_dice": [measures.mean_of_patients(column, seed=seed) for column in curves.T],
    }


def paired_difference(metrics: Mapping[str, Any], other: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """Dice of one evaluation less that of another, class by class, paired over the patients who have it.

    Args:
        metrics, other: two of :func:`evaluate`, of the same patients in the same order.
        seed: of the bootstrap.
    """
    pairs = list(zip(metrics["patients"], other["patients"], strict=True))
    return {
        name: measures.mean_of_patients(
            [
                one["classes"][name]["dice"] - two["classes"][name]["dice"]
                for one, two in pairs
                if one["classes"][name]["present"]
            ],
            seed=seed,
        )
        for name in metrics["protocol"]["classes"]
    }
