"""Precision, recall, density and coverage: do samples lie where real images lie, and the other way round?"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from ldm.errors import LdmError
from ldm.metrics.features import checked


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
    real, synthetic = checked(real, synthetic)
    if not 1 <= k < min(len(real), len(synthetic)):
        raise LdmError(f"k is {k}; legal for sets of {len(real)} and {len(synthetic)} images: 1 up to one less.")
    apart = cdist(real, synthetic)  # (N, M)
    in_real = apart <= _radii(real, k)[:, None]  # (N, M)
    in_synthetic = apart <= _radii(synthetic, k)[None]  # (N, M)
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float(in_synthetic.any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
    }


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each image to its k-th nearest neighbour in the set, ``(N,)``; number 0 is the image itself."""
    return np.partition(cdist(x, x), k, axis=1)[:, k]
