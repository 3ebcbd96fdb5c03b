"""How alike two images are: MS-SSIM in 2-D and 3-D with scales that fit the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torch_ms_ssim

from ldm.errors import LdmError

# Wang et al. 2003, table of section 3.2: weights of the five scales
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Gaussian of 11 voxels with five scales, as published; the smallest scale has to be larger than the kernel
STANDARD = {"scales": 5, "kernel": 11, "window": "Gaussian", "sigma": 1.5}
STANDARD_FROM = 176  # voxels a side
KERNEL = 7  # voxels, uniform; for the smaller images


def ms_ssim_protocol(size: tuple[int, ...]) -> dict[str, Any]:
    """Scales and kernel used for images of this size.

    The published ones where every side has at least 176 voxels. Below, a uniform kernel of 7 voxels and as many
    scales as fit: every scale halves the image, and the smallest has to hold the kernel, so that a side of 40 voxels
    allows 3 scales.

    Raises:
        LdmError: a side is shorter than the kernel.
    """
    if min(size) >= STANDARD_FROM:
        return {**STANDARD, "weights": list(WEIGHTS)}
    scales = 1
    while scales < len(WEIGHTS) and min(size) // 2**scales >= KERNEL + 1:
        scales += 1
    if min(size) < KERNEL:
        raise LdmError(f"MS-SSIM needs sides of at least {KERNEL} voxels, got {'x'.join(map(str, size))}.")
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    return {"scales": scales, "kernel": KERNEL, "weights": weights, "window": "uniform"}


def ms_ssim(x: np.ndarray, y: np.ndarray, data_range: float = 1.0) -> float:
    """MS-SSIM of two images ``(C, *S)``; 1 for identical images."""
    protocol = ms_ssim_protocol(x.shape[1:])
    value = torch_ms_ssim(
        torch.from_numpy(np.ascontiguousarray(x))[None].float(),
        torch.from_numpy(np.ascontiguousarray(y))[None].float(),
        gaussian_kernel=protocol["window"] == "Gaussian",
        sigma=protocol.get("sigma", 1.5),
        kernel_size=protocol["kernel"],
        betas=tuple(protocol["weights"]),
        data_range=data_range,
        normalize="relu",
    )
    return float(value)
