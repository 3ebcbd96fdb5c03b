"""Kernel distances of two sets of features: squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3)."""

from __future__ import annotations

import functools

import numpy as np
from scipy.spatial.distance import cdist, pdist

from ldm.errors import LdmError
from ldm.metrics.features import checked


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID of features ``(N, F)`` and ``(M, F)`` with the kernel ``(x.y / F + 1)^3`` (Bińkowski et al. 2018).

    Over all pairs at once, not the mean over random blocks. Unbiased: 0 on average for equal distributions, so that it
    may be negative.
    """
    return _unbiased(*_sums(*_kernels(*checked(a, b), _cubic)))


def kernel_interval(
    a: np.ndarray, b: np.ndarray, whose_a: np.ndarray | None = None, whose_b: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % interval of :func:`kernel_distance`: plus and minus 1.96 standard errors of the jackknife of both sets.

    The jackknife (Arvesen 1969) leaves out one subject at a time. A bootstrap would draw images twice, and pairs of
    equal images are what the unbiased estimate has to do without.

    Args:
        a, b: features ``(N, F)`` and ``(M, F)``.
        whose_a, whose_b: number of each image's subject, ``(N,)`` and ``(M,)``; None is another subject each.

    Raises:
        LdmError: a set has fewer than 3 images or subjects.
    """
    return _interval(a, b, whose_a, whose_b, _cubic)


def _interval(a, b, whose_a, whose_b, kernel) -> tuple[float, float]:
    a, b = checked(a, b, 3)
    owners = []
    for features, whose in ((a, whose_a), (b, whose_b)):
        whose = np.arange(len(features)) if whose is None else np.asarray(whose)
        owners.append((whose[:, None] == np.unique(whose)).astype(np.float64))  # (N, subjects)
        if owners[-1].shape[1] < 3:
            raise LdmError(f"an interval over subjects needs 3 of them in each set; there are {owners[-1].shape[1]}.")
    return _jackknife(*_kernels(a, b, kernel), *owners)


def mmd(a: np.ndarray, b: np.ndarray, bandwidth: float | None = None) -> float:
    """Squared MMD with the Gaussian kernel ``exp(-|x - y|^2 / (2 bandwidth^2))``, unbiased; may be negative.

    Args:
        a, b: features ``(N, F)`` and ``(M, F)``.
        bandwidth: None is the median distance between any two images of both sets. Give one to compare several sets.
    """
    a, b = checked(a, b)
    bandwidth = median_distance(np.concatenate([a, b])) if bandwidth is None else bandwidth
    return _unbiased(*_sums(*_kernels(a, b, functools.partial(_gaussian, bandwidth=bandwidth))))


def mmd_interval(
    a: np.ndarray,
    b: np.ndarray,
    bandwidth: float,
    whose_a: np.ndarray | None = None,
    whose_b: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % interval of :func:`mmd`, as :func:`kernel_interval` is one of :func:`kernel_distance`."""
    return _interval(a, b, whose_a, whose_b, functools.partial(_gaussian, bandwidth=bandwidth))


def median_distance(x: np.ndarray) -> float:
    """Median distance between two images of ``x`` ``(N, F)``, a common bandwidth of Gaussian kernels.

    Raises:
        LdmError: it is 0, as more than half of the pairs are equal.
    """
    median = float(np.median(pdist(np.asarray(x, np.float64))))
    if median == 0:
        raise LdmError("most images have equal features: there is no bandwidth for a Gaussian kernel.")
    return median


def _gaussian(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    return np.exp(cdist(x, y, "sqeuclidean") / (-2 * bandwidth**2))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernels(a, b, kernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernel within ``a`` and within ``b`` without the diagonal, and between them."""
    within = [kernel(x, x) for x in (a, b)]
    for matrix in within:
        np.fill_diagonal(matrix, 0)
    return within[0], within[1], kernel(a, b)


def _sums(aa, bb, ab) -> tuple[float, float, float, int, int]:
    return aa.sum(), bb.sum(), ab.sum(), *ab.shape


def _unbiased(aa, bb, ab, n, m):
    """U-statistic from the sums of the kernel over pairs of different images; scalars or arrays."""
    return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2 * ab / (n * m)


def _jackknife(aa, bb, ab, owners_a, owners_b) -> tuple[float, float]:
    """From kernels ``(N, N)``, ``(M, M)``, ``(N, M)``, and which image is of which subject ``(N, G)``, ``(M, H)``."""
    total_aa, total_bb, total_ab, n, m = _sums(aa, bb, ab)
    rest_a, left_n = _without(aa, owners_a)
    rest_b, left_m = _without(bb, owners_b)
    without_a = _unbiased(rest_a, total_bb, total_ab - ab.sum(1) @ owners_a, left_n, m)  # (G,)
    without_b = _unbiased(total_aa, rest_b, total_ab - ab.sum(0) @ owners_b, n, left_m)  # (H,)
    groups = [(len(one) - 1) * one.var() for one in (without_a, without_b)]
    error, value = np.sqrt(sum(groups)), _unbiased(total_aa, total_bb, total_ab, n, m)
    return float(value - 1.96 * error), float(value + 1.96 * error)


def _without(kernel: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of a kernel ``(N, N)`` over pairs without each subject ``(G,)``, and the number of images that are left."""
    own = ((kernel @ owners) * owners).sum(0)  # (G,) pairs within a subject, which both subtractions take
    return kernel.sum() - 2 * kernel.sum(1) @ owners + own, len(kernel) - owners.sum(0)
