"""How alike two images are: MS-SSIM in 2-D and 3-D with scales that fit the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torch_ms_ssim

from ldm.errors import LdmError

# Wang et al. 2003, table of section 3.2: weights of the five scales
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
KERNEL = 7  # voxels; smaller than the usual 11, for volumes of 40 to 200 voxels a side


def ms_ssim_protocol(size: tuple[int, ...]) -> dict[str, Any]:
    """Scales and kernel used for images of this size.

    Every scale halves the image, and the smallest has to hold the kernel: a side of 40 voxels allows 3 scales.

    Raises:
        LdmError: a side is shorter than the kernel.
    """
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
        gaussian_kernel=False,
        kernel_size=protocol["kernel"],
        betas=tuple(protocol["weights"]),
        data_range=data_range,
        normalize="relu",
    )
    return float(value)
