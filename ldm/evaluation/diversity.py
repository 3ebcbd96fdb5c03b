"""Do samples at the same covariates differ from each other as different subjects do?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.metrics.similarity import ms_ssim, ms_ssim_protocol


def nearest_pairs(codes: np.ndarray) -> list[tuple[int, int]]:
    """Each subject with the one whose covariates are nearest.

    Args:
        codes: ``(N, K)`` encoded covariates; NaN counts as the column's mean.

    Returns:
        Pairs of positions, each once.
    """
    filled = np.where(np.isnan(codes), np.nanmean(codes, axis=0, keepdims=True), codes)
    scaled = (filled - filled.mean(0)) / np.maximum(filled.std(0), 1e-9)
    distance = np.linalg.norm(scaled[:, None] - scaled[None], axis=-1)  # (N, N)
    np.fill_diagonal(distance, np.inf)
    return sorted({tuple(sorted((i, int(j)))) for i, j in enumerate(distance.argmin(1))})


def spread(
    images: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]], value_range: tuple[float, float]
) -> dict[str, Any]:
    """How far apart the pairs are.

    Args:
        images: each ``(C, *S)``.
        pairs: positions to compare.
        value_range: of the images.

    Returns:
        ``ms_ssim`` and ``rms`` (root-mean-square difference over the range), each with ``mean``, ``std`` and ``n``.
    """
    low, high = value_range
    alike = [ms_ssim(images[i], images[j], high - low) for i, j in pairs]
    apart = [float(np.sqrt(np.mean((images[i] - images[j]) ** 2))) / (high - low) for i, j in pairs]
    summary = {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": len(values)}
        for name, values in (("ms_ssim", alike), ("rms", apart))
    }
    return {**summary, "protocol": ms_ssim_protocol(images[0].shape[1:])}
