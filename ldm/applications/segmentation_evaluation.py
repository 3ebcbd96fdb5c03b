"""How good written segmentations are, and whether their uncertainty is right, with intervals over patients."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.applications.segmentation import PANEL, Result, Source, read_result, read_truth
from ldm.data.draft import Record
from ldm.errors import LdmError
from ldm.evaluation.report import write_page
from ldm.metrics import segmentation as measures
from ldm.training import figures

METRICS, REPORT = "metrics.json", "report.html"
#: of a class and patient; what stands in the table
PER_CLASS = ("dice", "jaccard", "hd95", "ged", "member_dice", "ceiling", "volume_error", "in_interval")
PER_PATIENT = ("ece", "spearman", "uncertainty")
WORDS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95": "HD95",
    "ged": "energy distance",
    "member_dice": "Dice of one member",
    "ceiling": "Dice of the truth on the model's grid",
    "volume_error": "volume error",
    "in_interval": "volume in interval",
}


def evaluate(
    source: Source,
    records: Sequence[Record],
    out: Path,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure what :func:`ldm.applications.segmentation.segment` wrote against the label maps, in the files' space.

    All images of a patient count as one volume; only surface distances are measured image by image and averaged.
    Calibration is that of "any class" against background; its region is where some member or the truth has a class.

    Args:
        source: what segmented.
        records: subjects with label maps.
        out: folder of the results.
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
        patient, bins = _patient(results, truths, seen, source)
        patients.append({"subject": subject, "images": len(own), **patient})
        everywhere.append(bins["everywhere"])
        region.append(bins["region"])
        if progress is not None:
            progress(1)
    spacing = results[0].spacing
    return {
        "protocol": {
            **source.facts,
            "classes": {name: list(values) for name, values in source.classes.values.items()},
            "images": len(records),
            "patients": len(groups),
            "unit": "pixels" if spacing is None else "mm",
            "split_sha256": source.split_sha256,
        },
        "patients": patients,
        "summary": _summary(patients, source.classes.names, seed),
        "calibration": _calibration(patients, everywhere, region, seed),
    }


def _patient(
    results: Sequence[Result], truths: Sequence[np.ndarray], seen: Sequence[np.ndarray], source: Source
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers of one patient, and the bins of the reliability diagram."""
    labels, truth, ceiling = (_flat(arrays) for arrays in ([r.labels for r in results], truths, seen))
    members = np.concatenate([r.members.reshape(len(r.members), -1) for r in results], axis=1)  # (M, V)
    probability = np.clip(_flat([r.mean.sum(0) for r in results]), 0, 1)
    variance = _flat([r.variance for r in results])
    voxel = float(np.prod(results[0].spacing)) if results[0].spacing else 1.0
    classes = {}
    for index, name in enumerate(source.classes.names, 1):
        found, true, each = labels == index, truth == index, members == index
        distances = [
            measures.hd95(r.labels == index, t == index, r.spacing) for r, t in zip(results, truths, strict=True)
        ]
        low, high = np.percentile(each.sum(1), (2.5, 97.5))
        classes[name] = {
            "dice": measures.dice(found, true),
            "jaccard": measures.jaccard(found, true),
            "hd95": float(np.nanmean(distances)) if np.isfinite(distances).any() else float("nan"),
            "ged": measures.generalised_energy_distance(list(each), [true]),
            "member_dice": float(np.mean([measures.dice(one, true) for one in each])),
            "ceiling": measures.dice(ceiling == index, true),
            "volume": float(found.sum()) * voxel,
            "true_volume": float(true.sum()) * voxel,
            "volume_error": float(found.sum() - true.sum()) * voxel,
            "in_interval": float(low <= true.sum() <= high),
        }
    inside, wrong = truth > 0, labels != truth
    region = inside | (members > 0).any(0)
    bins = {
        "everywhere": measures.reliability(probability, inside),
        "region": measures.reliability(probability[region], inside[region]),
    }
    patient = {
        "classes": classes,
        "ece": measures.expected_calibration_error(bins["region"]),
        "spearman": measures.spearman(variance[region], wrong[region]),
        "uncertainty": float(variance[region].mean()) if region.any() else 0.0,
        "rejection": measures.rejection_curve(labels > 0, inside, variance),
    }
    return patient, bins


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])


def _through_the_grid(record: Record, source: Source) -> np.ndarray:
    """The label map ``(*S)`` as class indices as a perfect answer on the model's grid would be written."""
    recipe = source.preprocessing
    _, geometry = recipe.load(record)
    stored = geometry.undo(recipe.load_labels(record)[None], labels=True)[0]
    return source.classes.classes(torch.from_numpy(stored)).numpy()


def _summary(patients: Sequence[Mapping[str, Any]], classes: Sequence[str], seed: int) -> dict[str, Any]:
    per_class = {
        name: {
            measure: measures.bootstrap([patient["classes"][name][measure] for patient in patients], seed=seed)
            for measure in PER_CLASS
        }
        for name in classes
    }
    return {"classes": per_class} | {
        name: measures.bootstrap([patient[name] for patient in patients], seed=seed) for name in PER_PATIENT
    }


def _calibration(
    patients: Sequence[Mapping[str, Any]], everywhere: Sequence[dict], region: Sequence[dict], seed: int
) -> dict[str, Any]:
    error = [1 - np.mean([one["dice"] for one in patient["classes"].values()]) for patient in patients]
    pooled, near = measures.pooled(everywhere), measures.pooled(region)
    curves = np.array([patient["rejection"] for patient in patients])  # (N, shares)
    return {
        "reliability": pooled,
        "reliability_region": near,
        "ece": measures.expected_calibration_error(pooled),
        "ece_region": measures.expected_calibration_error(near),
        "spearman_of_patients": measures.spearman(np.array([p["uncertainty"] for p in patients]), np.array(error)),
        "rejected_share": list(measures.SHARES),
        "rejection_dice": [measures.bootstrap(column, seed=seed) for column in curves.T],
    }


# report -----------------------------------------------------------------------------------------------


def beside(folders: Mapping[str, str], metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Evaluations of other folders, to stand in the same table.

    Raises:
        LdmError: a folder without one, or of other patients or classes.
    """
    others = {}
    for name, folder in folders.items():
        path = Path(folder) / METRICS
        if not path.is_file():
            raise LdmError(f"beside.{name}: there is no {path}; run ldm segment evaluate=true out={folder} first.")
        others[name] = _nan_for_null(json.loads(path.read_text()))
        if _about(others[name]) != _about(metrics):
            raise LdmError(
                f"beside.{name}: {path} is about other patients, images or classes; they cannot be compared."
            )
    return others


def _about(metrics: Mapping[str, Any]) -> list[Any]:
    try:
        return [metrics["protocol"]["classes"], [(p["subject"], p["images"]) for p in metrics["patients"]]]
    except (KeyError, TypeError):
        return []


def null_for_nan(value: Any) -> Any:
    """Plain values as JSON has them: a number that is none is null."""
    if isinstance(value, Mapping):
        return {name: null_for_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _nan_for_null(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_nan_for_null(one) for one in value]
    return math.nan if value is None else value


def report(out: Path, metrics: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> Path:
    """``report.html``: a table of what was measured, reliability, rejection, and the panel of the first subjects."""
    shown = {metrics["protocol"]["kind"]: metrics, **others}
    folder = out / "figures"
    figures.lines(
        {
            f"{name}, {where}": (one["calibration"][key]["probability"], one["calibration"][key]["frequency"])
            for name, one in shown.items()
            for where, key in (("all voxels", "reliability"), ("region", "reliability_region"))
        },
        "probability of a class",
        "share of voxels that have it",
        folder / "reliability.png",
        diagonal=True,
    )
    figures.lines(
        {
            name: (
                [100 * share for share in one["calibration"]["rejected_share"]],
                [point["value"] for point in one["calibration"]["rejection_dice"]],
            )
            for name, one in shown.items()
        },
        "most uncertain voxels left out (%)",
        "Dice of the rest",
        folder / "rejection.png",
    )
    pictures = {"panel": out / PANEL, "reliability": folder / "reliability.png", "rejection": folder / "rejection.png"}
    return write_page(
        out / REPORT, "segmentation.html", pictures, metrics=metrics, shown=shown, verdict=verdict(shown), words=WORDS
    )


def verdict(shown: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in plain sentences."""
    lines = []
    for name, one in shown.items():
        for label, values in one["summary"]["classes"].items():
            dice, member = values["dice"], values["member_dice"]
            low, high = dice["interval"]
            lines.append(
                f"{name}, {label}: Dice {dice['value']:.3f} (95 %: {low:.3f} to {high:.3f}) over {dice['n']} patients; "
                f"a single member {member['value']:.3f}."
            )
    return lines
