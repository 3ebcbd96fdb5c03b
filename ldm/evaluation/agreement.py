"""Agreement between what was asked for and what was measured: values, and levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ldm.errors import LdmError, nearest
from ldm.evaluation.repeats import percentiles, resampled_subjects


def agreement(
    asked: Sequence[float],
    measured: Sequence[float],
    seed: int = 0,
    resamples: int = 2000,
    subjects: Sequence[str] | None = None,
) -> dict:
    """How well `measured` follows `asked` (both (N,), same unit).

    Returns `r` (Pearson), `slope` and `intercept` of the least-squares line of measured on asked, `mae` (mean
    absolute difference, in the unit given), `bias` (mean of measured minus asked), `n`, and `r_interval`,
    `slope_interval` and `mae_interval`: 95 % percentile bootstrap intervals over subjects (Efron & Tibshirani, 1993,
    chapter 13), the same for the same `seed`. `subjects` (N,) says whose each pair is; None is another one each.

    Raises LdmError if the lengths differ, there are fewer than 3 pairs, a value is not finite, or one side is
    constant.
    """
    x, y = np.asarray(asked, np.float64), np.asarray(measured, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise LdmError(f"agreement: asked has shape {x.shape} and measured {y.shape}; they must be pairs, (N,) each.")
    if len(x) < 3:
        raise LdmError(f"agreement: {len(x)} pairs are too few; at least 3 are needed.")
    for name, values in (("asked", x), ("measured", y)):
        if not np.isfinite(values).all():
            raise LdmError(f"agreement: {name} holds {(~np.isfinite(values)).sum()} values that are not finite.")
        if np.ptp(values) == 0:
            raise LdmError(f"agreement: {name} is {values[0]:g} throughout; agreement needs values that differ.")
    r, slope, mae = (float(v[0]) for v in _statistics(x, y, np.ones((1, len(x)))))
    weights = resampled_subjects(range(len(x)) if subjects is None else subjects, resamples, seed)  # (R, N)
    intervals = [percentiles(values) for values in _statistics(x, y, weights)]
    return {
        "r": r,
        "slope": slope,
        "intercept": float(y.mean() - slope * x.mean()),
        "mae": mae,
        "bias": float((y - x).mean()),
        "n": len(x),
        "r_interval": intervals[0],
        "slope_interval": intervals[1],
        "mae_interval": intervals[2],
    }


def correlations(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and the least-squares slope of pairs (N,) with weights (R, N); (R,) each.

    NaN where all pairs of some weight have one x (or, for r, one y).
    """
    total = weights.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = x - (weights @ x / total)[:, None], y - (weights @ y / total)[:, None]  # (R, N)
        xx, yy, xy = ((weights * product).sum(1) for product in (x * x, y * y, x * y))
        return xy / np.sqrt(xx * yy), xy / xx


def _statistics(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r, slope and mean absolute error, (R,) each."""
    return *correlations(x, y, weights), weights @ np.abs(y - x) / weights.sum(1)


def level_agreement(
    asked: Sequence[str], found: Sequence[str], levels: Sequence[str], subjects: Sequence[str] | None = None
) -> dict:
    """How often `found` is the level that was `asked` (both (N,), each one of `levels`); `subjects` (N,) says whose.

    Returns `accuracy` (share of agreement), `interval` (95 %, Wilson, of as many independent images as those of one
    subject are worth), `n`; `levels`: the same three for each level
    that was asked; and `confusion`, counts (L, L) with a row for each asked level and a column for each found one, in
    the order of `levels`.

    Raises LdmError if the lengths differ, there is no pair, or a level is not one of `levels`.
    """
    if len(asked) != len(found) or not len(asked):
        raise LdmError(f"agreement: {len(asked)} levels were asked and {len(found)} found; they must be pairs, N > 0.")
    number = {level: index for index, level in enumerate(levels)}
    for level in (*asked, *found):
        if level not in number:
            raise LdmError(f"agreement: '{level}' is no level.{nearest(level, levels)} Levels: {', '.join(levels)}.")
    counts = np.zeros((len(levels), len(levels)), np.int64)
    np.add.at(counts, ([number[level] for level in asked], [number[level] for level in found]), 1)
    right = np.array([one == other for one, other in zip(asked, found, strict=True)])  # (N,)
    whose = np.unique(range(len(asked)) if subjects is None else subjects, return_inverse=True)[1]
    of = {level: np.array([one == level for one in asked]) for level in levels}
    shares = {level: _share(right[mine], whose[mine]) for level, mine in of.items() if mine.any()}
    return {**_share(right, whose), "levels": shares, "confusion": counts.tolist()}


def wilson(p: float, n: float, confidence: float = 0.95) -> list[float]:
    """Score interval of a share `p` of `n` (Wilson 1927): right also where all or none succeed, unlike p +- z s.e."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def _share(right: np.ndarray, whose: np.ndarray) -> dict:
    """Of right answers ``(n,)`` of images whose subjects are numbered ``(n,)``."""
    n, share = len(right), float(right.mean())
    return {"accuracy": share, "interval": wilson(share, independent(right, whose)), "n": n}


def independent(right: np.ndarray, whose: np.ndarray) -> float:
    """How many independent answers the ``(n,)`` ones of subjects are worth: between their number and that of images.

    n over the design effect (Kish 1965): the variance of the share when subjects vary, over that when images do. The
    number of subjects where all answers are alike, which tells no variance.
    """
    n, share, subjects = len(right), right.mean(), len(np.unique(whose))
    variance = np.square(np.bincount(whose, right - share)).sum() / n**2
    return float(np.clip(share * (1 - share) / variance, subjects, n)) if variance > 0 else float(subjects)
