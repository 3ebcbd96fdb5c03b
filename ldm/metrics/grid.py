"""Traces that the grid of a decoder leaves in its images: blocks and checkerboards."""

from __future__ import annotations

import itertools

from torch import Tensor


def pattern_share(error: Tensor, period: int) -> float:
    """Share of the squared error that repeats with the grid of the decoder: 0 for none, 1 for nothing else.

    The mean error of every phase of the grid is a picture of what repeats; the overall mean, a shift in brightness, is
    taken off first. Independent errors give about ``period**n / voxels`` by chance.

    Args:
        error: reconstruction minus image, ``(C, *S)`` with 2 or 3 spatial axes, any size of at least ``period``.
        period: voxels between two equal phases of the grid, e.g. the downsampling factor.
    """
    error = error.double() - error.double().mean()
    total = float(error.square().sum())
    if total == 0:
        return 0.0
    repeating = 0.0
    for start in itertools.product(range(period), repeat=error.ndim - 1):
        phase = error[(slice(None), *(slice(first, None, period) for first in start))]  # (C, *S / period)
        mean = phase.flatten(1).mean(1)  # (C,)
        repeating += float(mean.square().sum()) * phase[0].numel()
    return repeating / total


def blockiness(image: Tensor, period: int = 2) -> float:
    """Mean squared step between neighbours of different cells over that within cells; about 1 without a grid.

    Args:
        image: ``(C, *S)`` with 2 or 3 spatial axes.
        period: side of a cell in voxels.

    Returns:
        The ratio; 1 for a constant image.
    """
    across = within = 0.0
    counts = [0, 0]
    for axis in range(1, image.ndim):
        steps = image.double().diff(dim=axis).square().movedim(axis, 0)  # (S - 1, ...)
        between_cells = steps[period - 1 :: period]
        across += float(between_cells.sum())
        within += float(steps.sum() - between_cells.sum())
        counts[0] += between_cells.numel()
        counts[1] += steps.numel() - between_cells.numel()
    return (across / counts[0]) / (within / counts[1]) if within else 1.0
