"""Agreement between what was asked for and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.errors import LdmError


def agreement(asked: Sequence[float], measured: Sequence[float], seed: int = 0, resamples: int = 2000) -> dict:
    """How well `measured` follows `asked` (both (N,), same unit).

    Returns `r` (Pearson), `slope` and `intercept` of the least-squares line of measured on asked, `mae` (mean
    absolute difference, in the unit given), `n`, and `r_interval` and `slope_interval`: 95 % percentile bootstrap
    intervals over subjects (Efron & Tibshirani, 1993, chapter 13), the same for the same `seed`.

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
    r, slope = (float(v[0]) for v in _line(x[None], y[None]))
    rows = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    intervals = [_interval(values) for values in _line(x[rows], y[rows])]
    return {
        "r": r,
        "slope": slope,
        "intercept": float(y.mean() - slope * x.mean()),
        "mae": float(np.abs(y - x).mean()),
        "n": len(x),
        "r_interval": intervals[0],
        "slope_interval": intervals[1],
    }


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and least-squares slope along the last axis of (R, N); NaN where a row is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    xx, yy, xy = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return xy / np.sqrt(xx * yy), xy / xx


def _interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.nanpercentile(values, [2.5, 97.5])]
