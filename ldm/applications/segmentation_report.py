"""What was measured of segmentations as a page, beside other evaluations of the same patients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.applications.segmentation import PANEL
from ldm.applications.segmentation_evaluation import paired_difference
from ldm.errors import LdmError
from ldm.evaluation.report import write_page
from ldm.training import figures

METRICS, REPORT = "metrics.json", "report.html"
WORDS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "hd95": "HD95",
    "ged": "energy distance",
    "member_dice": "Dice of one member",
    "ceiling": "Dice of the truth on the model's grid",
    "volume_error": "volume error",
    "in_interval": "volume in interval",
    "dice_or_empty": "Dice over all patients, 1 where neither has it",
    "false_volume": "volume found in patients without it",
    "false_positives": "share of these in whom any is found",
}


def read_others(folders: Mapping[str, str], kind: str) -> dict[str, Mapping[str, Any]]:
    """Evaluations of other folders, to stand beside one of a source of this kind.

    Raises:
        LdmError: a folder without one, or a name that is this evaluation's own.
    """
    others = {}
    for name, folder in folders.items():
        if name == kind:
            raise LdmError(f"beside.{name}: '{name}' is what this evaluation is called; give the other another name.")
        path = Path(folder) / METRICS
        if not path.is_file():
            raise LdmError(f"beside.{name}: there is no {path}; run ldm segment evaluate=true out={folder} first.")
        others[name] = _nan_for_null(json.loads(path.read_text()))
    return others


def expect_comparable(others: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Refuse to put evaluations of different things into one table.

    Raises:
        LdmError: other patients, images or classes, or another unit.
    """
    for name, other in others.items():
        if _about(other) != _about(metrics):
            raise LdmError(f"beside.{name} is about other patients, images, classes or units; they cannot be compared.")


def _about(metrics: Mapping[str, Any]) -> list[Any]:
    try:
        patients = [(p["subject"], p["images"], p["has_any"]) for p in metrics["patients"]]
        return [metrics["protocol"]["classes"], metrics["protocol"]["unit"], patients]
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
    """Null as a number that is none; an ``interval`` may be missing as a whole."""
    if isinstance(value, Mapping):
        return {name: None if one is None and name == "interval" else _nan_for_null(one) for name, one in value.items()}
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
    told = {"shown": shown, "differences": differences(metrics, others), "verdict": verdict(metrics, others)}
    told |= {"number": number, "interval": interval}
    return write_page(out / REPORT, "segmentation.html", pictures, metrics=metrics, words=WORDS, **told)


def differences(metrics: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Paired differences of Dice to each of the others, by name and class."""
    return {name: paired_difference(metrics, other) for name, other in others.items()}


def verdict(metrics: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say, in plain sentences."""
    kind, lines = metrics["protocol"]["kind"], []
    for name, one in {kind: metrics, **others}.items():
        for label, values in one["summary"]["classes"].items():
            dice, member = values["dice"], values["member_dice"]
            lines.append(
                f"{name}, {label}: Dice {_with_interval(dice)} over the {dice['n']} patients who have it; a single "
                f"member {number(member['value'], '.3f')}."
            )
        told = one["calibration"]["spearman_of_images"]
        lines.append(f"{name}: uncertainty and error of {told['n']} images go together by {_with_interval(told)}.")
    for name, classes in differences(metrics, others).items():
        for label, difference in classes.items():
            told = _with_interval(difference, "+.3f")
            lines.append(f"{label}: Dice of {kind} less that of {name}, patient by patient: {told}.")
    return lines


def number(value: float, form: str = ".3g") -> str:
    """A number as text, n/a where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else "n/a"


def interval(entry: Mapping[str, Any], form: str = ".3g") -> str:
    """The interval of a number as text, n/a where there is none."""
    ends = entry["interval"] or (math.nan, math.nan)
    return " to ".join(number(end, form) for end in ends) if all(map(math.isfinite, ends)) else "n/a"


def _with_interval(entry: Mapping[str, Any], form: str = ".3f") -> str:
    return f"{number(entry['value'], form)} (95 %: {interval(entry, form)})"
