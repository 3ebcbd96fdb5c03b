"""Covariates that a table holds and nobody can have: codes for "missing", slips of the keyboard, levels spelt twice.

Only what the configuration leaves open is judged: a configured range or list of levels decides by itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from ldm.data.draft import Draft, Record
from ldm.data.faults import Fault
from ldm.data.schema import Covariate

SENTINELS = (-9.0, -99.0, -999.0, -9999.0, 999.0, 9999.0)
"""Numbers that tables write for "not known"."""
MAX_DEVIATION = 6.0
"""Robust standard deviations from the median, beyond which a value is told."""
MAX_SHARE = 0.02
"""Where more of the rows are far from the median, they are a group of their own and no slips."""
MIN_ROWS, MIN_ROWS_OF_SENTINELS = 20, 8
"""Rows with a value, below which quartiles say nothing about a single one."""

_HALF_IQR = 0.6745  # of the standard normal distribution
_FENCE = 1.5  # Tukey's: interquartile ranges beyond the quartiles


def implausible_values(draft: Draft) -> list[Fault]:
    """Return warnings for continuous values far from all others, for codes of missing values, and for twin levels."""
    warnings: list[Fault] = []
    for covariate in draft.schema:
        rows = [record for record in draft.kept if record.covariates[covariate.name] is not None]
        if covariate.fitted or not rows:
            continue
        judge = _numbers if covariate.kind == "continuous" else _levels
        warnings += judge(covariate, _column(draft, covariate), rows)
    return warnings


def _column(draft: Draft, covariate: Covariate) -> str:
    """The covariate's name, and what of the table it is made of if that is something else."""
    text = draft.config["covariates"][covariate.name].get("column") or covariate.name
    return covariate.name if text == covariate.name else f"{covariate.name} ({text})"


# continuous -------------------------------------------------------------------------------------------


def _numbers(covariate: Covariate, column: str, rows: Sequence[Record]) -> Iterator[Fault]:
    values = np.array([record.covariates[covariate.name] for record in rows], dtype=np.float64)
    code = _codes(values)
    others = values[~code]
    far = ~code & _far(values, others)
    if not (code.any() or far.any()):
        return
    unit = f" {covariate.unit}" if covariate.unit else ""
    low, middle, high = np.quantile(others, (0.25, 0.5, 0.75))
    usual = f"the median is {middle:g}{unit}, half of the rows lie in {low:g}..{high:g}{unit}"
    leave = "leave the cell empty if the value is not known"
    give = f"give data.covariates.{covariate.name}.range: [low, high] if it is right"
    for record, value, is_code, is_far in zip(rows, values, code, far, strict=True):
        if is_code:
            reason = f"{column} = {value:.10g}{unit} looks like a code for a missing value; {usual}"
            yield Fault(record.place, "covariate-code-of-missing", reason, f"{leave}; {give}", record.id)
        elif is_far:
            reason = f"{column} = {value:.10g}{unit} is far from all others; {usual}"
            yield Fault(record.place, "covariate-outlier", reason, f"correct the cell, or {leave}; {give}", record.id)


def _codes(values: np.ndarray) -> np.ndarray:
    """Which of (N,) values are sentinels outside Tukey's fences around all that are none."""
    code = np.isin(values, SENTINELS)
    others = values[~code]
    if not code.any() or len(others) < MIN_ROWS_OF_SENTINELS:
        return np.zeros_like(code)
    low, high = np.quantile(others, (0.25, 0.75))
    # Where most values are equal, e.g. zeros of lesions, the quartiles fall together and the extremes stand in.
    below, above = (low, high) if high > low else (others.min(), others.max())
    return code & ((values < below - _FENCE * (high - low)) | (values > above + _FENCE * (high - low)))


def _far(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of (N,) values lie more than `MAX_DEVIATION` robust standard deviations from the median of ``others``.

    Volumes are skewed, so that a positive value has to be far among the logarithms of the positive ones too.
    """
    if len(others) < MIN_ROWS:
        return np.zeros(len(values), dtype=bool)
    far = _beyond(values, others)
    positive = values > 0
    if (others > 0).sum() >= MIN_ROWS:
        far[positive] &= _beyond(np.log(values[positive]), np.log(others[others > 0]))
    return far if far.mean() <= max(MAX_SHARE, 1 / len(values)) else np.zeros_like(far)


def _beyond(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The spread of each side is its own: the distance of the quartile from the median."""
    low, middle, high = np.quantile(others, (0.25, 0.5, 0.75))
    spread = np.where(values < middle, middle - low, high - middle) / _HALF_IQR
    # Where a quartile is the median, most values are equal and there is no spread to compare with.
    return (spread > 0) & (np.abs(values - middle) > MAX_DEVIATION * spread)


# categorical ------------------------------------------------------------------------------------------


def _levels(covariate: Covariate, column: str, rows: Sequence[Record]) -> Iterator[Fault]:
    """One warning a level that another, more frequent one is but for case, blanks or digits."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in rows:
        found[str(record.covariates[covariate.name])].append(record)
    twins: dict[str, list[str]] = defaultdict(list)
    for level in sorted(found, key=lambda level: -len(found[level])):
        twins[_canonical(level)].append(level)
    for usual, *variants in twins.values():
        for level in variants:
            first, count = found[level][0], len(found[level])
            reason = (
                f"{column} is {level!r} in {count} of the rows, first in this one, and {usual!r} in "
                f"{len(found[usual])}: a model takes them for two levels"
            )
            remedy = f"write it in one way, or give data.covariates.{covariate.name}.levels: [...]"
            yield Fault(first.place, "covariate-twin-level", reason, remedy, first.id)


def _canonical(level: str) -> str:
    """``f`` for ``F``, ``left hand`` for ``Left  hand``, ``1.0`` for ``1``."""
    try:
        number = float(level)
    except ValueError:
        number = math.nan
    return repr(number) if math.isfinite(number) else " ".join(level.casefold().split())
