"""What the distances between two sets of features ask of them."""

from __future__ import annotations

import numpy as np

from ldm.errors import LdmError


def checked(a: np.ndarray, b: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features, ``(N, F)`` and ``(M, F)``, in float64.

    Args:
        a, b: anything that NumPy turns into an array.
        least: number of images that each set needs.

    Raises:
        LdmError: another shape, another number of features, too few images, or values that are not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise LdmError(f"features have the shapes {a.shape} and {b.shape}; expected (N, F) and (M, F).")
    for x in (a, b):
        if len(x) < least:
            raise LdmError(f"a set of {len(x)} images is too small for this distance; it needs {least}.")
        if not np.isfinite(x).all():
            raise LdmError(f"features of {int((~np.isfinite(x)).any(1).sum())} images are not finite.")
    return a, b
