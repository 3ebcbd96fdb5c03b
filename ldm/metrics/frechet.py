"""Fréchet distance of two Gaussians that are fitted to features (Heusel et al. 2017), without complex numbers.

``|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2))`` with the sample covariances A and B. The last trace is the
sum of the square roots of the eigenvalues of ``A^(1/2) B A^(1/2)``, which is symmetric and positive semi-definite, also
when there are fewer images than features.
"""

from __future__ import annotations

import numpy as np

from ldm.errors import LdmError
from ldm.metrics.features import checked


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of features ``(N, F)`` and ``(M, F)``; any N and M of at least 2.

    With centred features X (a row an image), ``A = X^T X / (N - 1)``; the eigenvalues of ``A B`` are then the squared
    singular values of ``X Y^T / sqrt((N - 1)(M - 1))``. No covariance is formed and no root is taken of a number that
    rounding made negative, so that the distance of a set from itself is 0 to rounding.
    """
    a, b = checked(a, b)
    x, y = _root(a), _root(b)
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * shared
    return max(float(distance), 0.0)


def _root(x: np.ndarray) -> np.ndarray:
    """R with ``R^T R`` the covariance of ``x`` ``(N, F)``; at most F rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)  # (N, F)
    return np.linalg.qr(centred, mode="r") if len(x) > x.shape[1] else centred


def frechet_interval(
    a: np.ndarray,
    b: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
    whose_a: np.ndarray | None = None,
    whose_b: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`frechet_distance` at these N and M; the subjects of both sets are resampled.

    A resample repeats images, which adds to the distance what a smaller set adds. The percentiles are therefore those
    of the resampled distances minus their mean, put around the distance itself. The bias of small N is in the distance
    and in the interval alike: compare distances at equal N only.

    Args:
        a, b: features ``(N, F)`` and ``(M, F)``.
        resamples, seed: of the bootstrap.
        whose_a, whose_b: number of each image's subject, ``(N,)`` and ``(M,)``; None is another subject each.
    """
    a, b = checked(a, b)
    images_a, images_b = _of_subjects(len(a), whose_a), _of_subjects(len(b), whose_b)
    rng = np.random.default_rng(seed)
    drawn = [frechet_distance(a[_resample(images_a, rng)], b[_resample(images_b, rng)]) for _ in range(resamples)]
    low, high = np.percentile(np.array(drawn) - np.mean(drawn), [2.5, 97.5]) + frechet_distance(a, b)
    return max(float(low), 0.0), float(high)


def _of_subjects(count: int, whose: np.ndarray | None) -> list[np.ndarray]:
    """Positions of each subject's images."""
    if whose is None:
        return list(np.arange(count)[:, None])
    return [np.flatnonzero(np.asarray(whose) == one) for one in np.unique(whose)]


def _resample(images: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Positions of the images of as many subjects, drawn with replacement; of at least two images."""
    while True:
        rows = np.concatenate([images[i] for i in rng.integers(len(images), size=len(images))])
        if len(rows) > 1:
            return rows


def frechet_infinity(
    a: np.ndarray,
    b: np.ndarray,
    points: int = 15,
    seed: int = 0,
    whose_a: np.ndarray | None = None,
    whose_b: np.ndarray | None = None,
) -> float:
    """The distance that infinitely many subjects would have: intercept of a line in 1/n (Chong & Forsyth 2020).

    The distance of n subjects from n others has a bias that falls as 1/n. It is taken at ``points`` sizes from a half
    of the smaller set to all of it, drawn without replacement, each with all of its images. Both sets are thinned, so
    that the intercept is free of the bias of either (the paper thins the generated one and has a reference that is as
    good as infinite). May be negative.

    Args:
        a, b: features ``(N, F)`` and ``(M, F)``.
        points, seed: of the thinning.
        whose_a, whose_b: number of each image's subject, ``(N,)`` and ``(M,)``; None is another subject each.

    Raises:
        LdmError: fewer than 8 images, or not more than twice as many subjects as features: the line has not begun.
    """
    a, b = checked(a, b, 8)
    images_a, images_b = _of_subjects(len(a), whose_a), _of_subjects(len(b), whose_b)
    largest = min(len(images_a), len(images_b))
    if largest <= 2 * a.shape[1]:
        raise LdmError(
            f"{largest} subjects and {a.shape[1]} features do not tell the distance at infinity; "
            f"more than {2 * a.shape[1]} subjects do, or fewer features."
        )
    rng = np.random.default_rng(seed)
    sizes = np.unique(np.linspace(largest // 2, largest, points).round().astype(int))
    distances = [frechet_distance(a[_some(images_a, size, rng)], b[_some(images_b, size, rng)]) for size in sizes]
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


def _some(images: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of the images of ``size`` subjects, drawn without replacement."""
    return np.concatenate([images[i] for i in rng.permutation(len(images))[:size]])
