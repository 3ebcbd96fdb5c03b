"""Precision, recall, density and coverage: do samples lie where real images lie, and the other way round?"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from ldm.errors import LdmError
from ldm.metrics.features import checked
from ldm.metrics.ratio import GROUPS, interval


def precision_recall_density_coverage(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> dict[str, float]:
    """The four from balls that reach to the k-th nearest neighbour within the own set.

    * ``precision``: share of synthetic images in the ball of any real one; ``recall``: share of real images in the ball
      of any synthetic one (Kynkäänniemi et al. 2019, eq. 2).
    * ``density``: number of real balls that a synthetic image lies in, over k: 1 on average for equal distributions,
      larger where samples crowd in dense regions; ``coverage``: share of real balls with a synthetic image inside, near
      1 for equal distributions and sets of equal size (Naeem et al. 2020).

    Args:
        real: features ``(N, F)``.
        synthetic: features ``(M, F)``.
        k: neighbours, itself not counted.

    Raises:
        LdmError: k is not between 1 and the size of the smaller set minus 1.
    """
    return _shares(*_apart(real, synthetic), k)


def neighbour_intervals(
    real: np.ndarray, synthetic: np.ndarray, k: int, whose_real: np.ndarray, whose_synthetic: np.ndarray
) -> dict[str, list[float]]:
    """95 % intervals of :func:`precision_recall_density_coverage`, by the jackknife over subjects.

    At most :data:`ldm.metrics.ratio.GROUPS` groups are left out, of both sets at once. A bootstrap would draw images
    twice, and an image is its own nearest neighbour.

    Args:
        real, synthetic, k: of which the four are taken.
        whose_real, whose_synthetic: number of each image's subject, ``(N,)`` and ``(M,)``, from 0 without gaps.

    Raises:
        LdmError: fewer than 3 subjects, or without a group too few images for k.
    """
    within_real, within_synthetic, apart = _apart(real, synthetic)
    groups = min(GROUPS, int(whose_real.max()) + 1, int(whose_synthetic.max()) + 1)
    if groups < 3:
        raise LdmError(f"an interval over subjects needs 3 of them in each set; there are {groups}.")
    without = []
    for group in range(groups):
        rows, columns = whose_real % groups != group, whose_synthetic % groups != group
        kept = within_real[np.ix_(rows, rows)], within_synthetic[np.ix_(columns, columns)], apart[np.ix_(rows, columns)]
        without.append(_shares(*kept, k))
    intervals = {}
    for name, value in _shares(within_real, within_synthetic, apart, k).items():
        low, high = interval(value, np.array([one[name] for one in without]))
        intervals[name] = [max(low, 0.0), high if name == "density" else min(high, 1.0)]
    return intervals


def _apart(real: np.ndarray, synthetic: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances within each set, ``(N, N)`` and ``(M, M)``, and between them, ``(N, M)``."""
    real, synthetic = checked(real, synthetic)
    return cdist(real, real), cdist(synthetic, synthetic), cdist(real, synthetic)


def _shares(within_real: np.ndarray, within_synthetic: np.ndarray, apart: np.ndarray, k: int) -> dict[str, float]:
    """The four from distances ``(N, N)``, ``(M, M)`` and ``(N, M)``."""
    if not 1 <= k < min(apart.shape):
        raise LdmError(f"k is {k}; legal for sets of {apart.shape[0]} and {apart.shape[1]} images: 1 up to one less.")
    in_real = apart <= _radii(within_real, k)[:, None]  # (N, M)
    in_synthetic = apart <= _radii(within_synthetic, k)[None]  # (N, M)
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float(in_synthetic.any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
    }


def _radii(within: np.ndarray, k: int) -> np.ndarray:
    """Distance of each image to its k-th nearest neighbour in the set, ``(N,)``; number 0 is the image itself."""
    return np.partition(within, k, axis=1)[:, k]
