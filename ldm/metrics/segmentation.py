"""How well label maps agree, and whether an ensemble knows where it is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy import stats

from ldm.errors import LdmError

#: shares that are left out, most uncertain first, of the voxels in which some member has a class
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks of one shape; 1 if both are empty, for then they agree."""
    _expect_alike(found, truth)
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def jaccard(found: np.ndarray, truth: np.ndarray) -> float:
    """|A and B| / |A or B| of two masks of one shape; 1 if both are empty."""
    _expect_alike(found, truth)
    union = int((found | truth).sum())
    return int((found & truth).sum()) / union if union else 1.0


def hd95(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """95th percentile of the distances between two surfaces, the larger of both directions (MONAI).

    Args:
        found, truth: masks ``(*S)``.
        spacing: voxel size in mm; None measures in pixels.

    Returns:
        NaN if one of them is empty, for there is no surface to measure to.
    """
    _expect_alike(found, truth)
    if not found.any() or not truth.any():
        return float("nan")
    a, b = (torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))[None, None] for mask in (found, truth))
    sizes = None if spacing is None else list(spacing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MONAI's about its own arguments
        return float(compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=sizes))


def generalised_energy_distance(members: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    """Squared distance of two sets of masks: 2 E d(S, Y) - E d(S, S') - E d(Y, Y'), d = 1 - Jaccard.

    Kohl et al. 2018 (A Probabilistic U-Net), eq. 4; expectations are over all pairs, those of one with itself included.
    0 if both sets are distributed alike.

    Args:
        members: masks of the ensemble.
        truths: masks of the raters, or the only one.
    """

    def expected(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
        return float(np.mean([1 - jaccard(a, b) for a in one for b in other]))

    return 2 * expected(members, truths) - expected(members, members) - expected(truths, truths)


def reliability(probability: np.ndarray, truth: np.ndarray, bins: int = 10) -> dict[str, list]:
    """How often voxels are inside of which that is said to be so probable; bins of equal width.

    Args:
        probability: in [0, 1], any shape.
        truth: mask of that shape.

    Returns:
        ``count``, mean ``probability`` and ``frequency`` of every bin; NaN for an empty one.
    """
    _expect_alike(probability, truth)
    index = np.minimum((probability.ravel() * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    sums = [np.bincount(index, weights.ravel(), bins) for weights in (probability.astype(np.float64), truth)]
    with np.errstate(invalid="ignore"):
        said, found = (total / count for total in sums)
    return {"count": count.tolist(), "probability": said.tolist(), "frequency": found.tolist()}


def pooled(diagrams: Sequence[dict[str, list]]) -> dict[str, list]:
    """Several diagrams of :func:`reliability` with the same bins as the one of all their voxels."""
    counts = np.array([one["count"] for one in diagrams], np.float64)  # (N, bins)
    total = counts.sum(0)
    with np.errstate(invalid="ignore"):
        said, found = (
            np.nansum(counts * np.array([one[name] for one in diagrams]), axis=0) / total
            for name in ("probability", "frequency")
        )
    return {"count": total.astype(int).tolist(), "probability": said.tolist(), "frequency": found.tolist()}


def expected_calibration_error(bins: dict[str, list]) -> float:
    """Mean of |frequency - probability| over voxels, of :func:`reliability` (Guo et al. 2017, eq. 3)."""
    count = np.array(bins["count"], np.float64)
    gap = np.abs(np.array(bins["frequency"]) - np.array(bins["probability"]))
    return float(np.nansum(count * gap) / count.sum()) if count.sum() else float("nan")


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; NaN where one is constant or there are fewer than three pairs."""
    first, second = np.ravel(first), np.ravel(second)
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second.astype(np.float64)) == 0:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


def clustered_spearman(
    groups: Sequence[Sequence[tuple[float, float]]], seed: int = 0, resamples: int = 2000
) -> dict[str, float | list[float] | int | None]:
    """Rank correlation of pairs, with a 95 % bootstrap interval over the groups that they come in.

    Args:
        groups: the pairs of each patient.
        seed, resamples: of the bootstrap; a draw in which one side is constant is left out.

    Returns:
        ``value``, NaN where there is none; ``interval``, None of fewer than two patients; ``n``, the number of pairs.
    """
    arrays = [np.array(group, np.float64) for group in groups if len(group)]  # (n_i, 2)
    pairs, random = np.concatenate([np.empty((0, 2)), *arrays]), np.random.default_rng(seed)
    found = {"value": spearman(*pairs.T), "interval": None, "n": len(pairs)}
    if len(arrays) < 2:
        return found
    draws = (
        np.concatenate([arrays[i] for i in random.integers(len(arrays), size=len(arrays))]) for _ in range(resamples)
    )
    values = np.array([spearman(*draw.T) for draw in draws])
    known = values[np.isfinite(values)]
    return found | {"interval": np.percentile(known, [2.5, 97.5]).tolist() if len(known) else None}


def rejection_curve(
    found: np.ndarray, truth: np.ndarray, uncertainty: np.ndarray, count: int, shares: Sequence[float] = SHARES
) -> list[float]:
    """Dice of what is left when the most uncertain voxels are left out.

    An ensemble that knows where it is wrong gains; one that does not, loses nothing or loses.

    Args:
        found, truth: masks.
        uncertainty: of that shape.
        count: voxels that ``shares`` are of: of all it would soon be the whole of a small lesion.
        shares: that are left out.

    Returns:
        A value a share; NaN where nothing found and nothing true is left.
    """
    order = np.argsort(-uncertainty.ravel(), kind="stable")
    found, truth = found.ravel()[order], truth.ravel()[order]
    starts = [round(share * count) for share in shares]
    return [
        dice(found[start:], truth[start:]) if found[start:].any() or truth[start:].any() else float("nan")
        for start in starts
    ]


def mean_of_patients(
    values: Sequence[float], seed: int = 0, resamples: int = 2000
) -> dict[str, float | list[float] | int | None]:
    """Mean over patients with its 95 % percentile interval (Efron & Tibshirani 1993, chapter 13).

    Args:
        values: one a patient; NaN are left out.
        seed, resamples: of the bootstrap.

    Returns:
        ``value``, NaN of no patient; ``interval``, None of fewer than two, whose spread nobody knows; ``n`` patients.
    """
    array = np.asarray(values, np.float64)
    array = array[np.isfinite(array)]
    found = {"value": float(array.mean()) if len(array) else float("nan"), "interval": None, "n": len(array)}
    if len(array) < 2:
        return found
    drawn = array[np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))]  # (R, N)
    return found | {"interval": np.percentile(drawn.mean(1), [2.5, 97.5]).tolist()}


def _expect_alike(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise LdmError(f"Masks of shapes {first.shape} and {second.shape} cannot be compared; bring them to one grid.")
