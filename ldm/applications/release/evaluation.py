"""What ``ldm evaluate`` measured of the model's samples, for the model card: nothing else that its file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.applications.release.audit import WORDS, read_record
from ldm.applications.release.conditions import check_text
from ldm.errors import LdmError
from ldm.evaluation.distances import BETTER
from ldm.evaluation.goals import generated_row, verdicts
from ldm.evaluation.masks import OF_HELD_OUT, OF_SAMPLES
from ldm.evaluation.pages import METRICS
from ldm.model.provenance import drawn_otherwise

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError)
AGREEMENT = {"accuracy": "share of levels", "r": "r", "slope": "slope", "mae": "mean error"}
Row = tuple[str, Mapping[str, Any], Mapping[str, Any], str]  # name, numbers of samples and of real images, key in both


def read_evaluation(
    path: Path | None, model_sha256: str, sampling: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """What ``ldm evaluate`` found of samples that were drawn as a release will be.

    Args:
        path: its ``metrics.json``; None for none.
        model_sha256: hash of the model's tensors, from its header.
        sampling: all options that the release is drawn with; None where that does not matter.

    Returns:
        ``sha256`` of the file; ``verdicts``: each a ``goal``, its ``status`` and a ``text``; ``measured``: name ->
        ``samples`` and ``real`` (held-out images), each ``value`` and ``interval`` (95 %, or None); ``untrusted``:
        metrics that are left out, as they do not rank images that are known to be worse below real ones.

    Raises:
        LdmError: no such file, one of another model, of samples that were drawn otherwise, or not written by the verb.
    """
    if path is None:
        return None
    content, digest = read_record(Path(path), "evaluation", "ldm evaluate", model_sha256)
    differing = None if sampling is None else drawn_otherwise(content.get("sampling"), sampling)
    if differing:
        raise LdmError(
            f"evaluation={path} is of samples that were, or may have been, drawn otherwise than this release will be "
            f"({differing}). Run `ldm evaluate` with the same sampling settings, or leave the evaluation out."
        )
    try:
        return {"sha256": digest, **_found(content)}
    except LdmError:
        raise
    except MALFORMED as error:
        raise LdmError(f"evaluation={path} is not as `ldm evaluate` writes it ({error!r}).") from error


def _found(metrics: Mapping[str, Any]) -> dict[str, Any]:
    *judged, _ = verdicts(metrics)  # the last is that of an audit, which a release has by itself
    measured = {
        check_text(name, "evaluation: a name"): {"samples": _one(samples, key), "real": _one(real, key)}
        for name, samples, real, key in _rows(metrics)
        if _finite(samples.get(key))
    }
    for one in judged:
        for text in (one.goal, one.text):
            check_text(text, "evaluation: a verdict", WORDS)
    return {
        "verdicts": [asdict(one) for one in judged],
        "measured": measured,
        "untrusted": [name for name in BETTER if name in _untrusted(metrics)],
    }


def _rows(metrics: Mapping[str, Any]) -> Iterator[Row]:
    """All that was measured of samples and of real held-out images alike."""
    if "distances" in metrics:
        rows, distances = metrics["distances"]["rows"], metrics["distances"]
        for metric in (name for name in BETTER if name not in _untrusted(metrics)):
            yield METRICS.get(metric, metric), rows[generated_row(distances)], rows[distances["floor"]], metric
    if "ms_ssim" in metrics:
        sets = metrics["ms_ssim"]["sets"]
        yield "MS-SSIM of two images", sets["samples"], sets["real"], "mean"
    for name, entry in metrics.get("fidelity", {}).items():
        for key in AGREEMENT:
            unit = f" in {entry['unit']}" if key == "mae" and entry.get("unit") else ""
            yield f"{name}: {AGREEMENT[key]}{unit}", entry["samples"], entry["instrument_on_held_out"], key
    for name, rows in metrics.get("mask_dice", {}).get("labels", {}).items():
        yield f"{name}: Dice with the asked label map", rows.get(OF_SAMPLES, {}), rows.get(OF_HELD_OUT, {}), "mean"


def _untrusted(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    return metrics.get("distances", {}).get("untrusted", {})


def _one(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A number and its interval, each None where it is not there or not finite."""
    interval = row.get(f"{key}_interval", row.get("interval"))
    known = isinstance(interval, list) and len(interval) == 2 and all(map(_finite, interval))
    return {"value": row[key] if _finite(row.get(key)) else None, "interval": interval if known else None}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
