"""What is told by repeating: resamples of subjects, and generation with several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def resampled_subjects(subjects: Sequence[Any], resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each row counts in bootstrap resamples of subjects (Efron & Tibshirani 1993, chapter 8.3).

    As many subjects as there are are drawn with replacement, each with all of its rows.

    Args:
        subjects: whose each of N rows is.
        resamples: R.
        seed: the same seed and the same subjects give the same resamples, however many rows each has.

    Returns:
        ``(R, N)`` whole numbers as float64.
    """
    names, numbers = np.unique([str(subject) for subject in subjects], return_inverse=True)  # (N,)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    counts = np.apply_along_axis(np.bincount, 1, drawn, minlength=len(names))  # (R, subjects)
    return counts[:, numbers].astype(np.float64)


def percentiles(values: np.ndarray) -> list[float]:
    """95 % percentile interval of resampled values ``(R,)``; resamples without a value (NaN) are left out."""
    return [float(value) for value in np.nanpercentile(values, [2.5, 97.5])]


def spread_over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The values of several seeds, their mean and their standard deviation (of a sample: over N - 1)."""
    std = 0.0 if np.ptp(values) == 0 else float(np.std(values, ddof=1))  # no trace of rounding where all agree
    return {"values": list(values), "mean": float(np.mean(values)), "std": std}
