"""Copies of training scans that are planted on purpose: what an audit has to find, or its silence means nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.ndimage

KINDS = ("unchanged", "flipped", "shifted", "contrast", "blended", "noised")
RECONSTRUCTED = "reconstructed"
SHIFT = 0.04  # of each side, at least one voxel
GAMMA = 1.4
BLEND = 0.2
NOISE = 0.05  # standard deviation, of the value range
Change = Callable[[np.ndarray, np.ndarray, tuple[float, float], np.random.Generator], np.ndarray]


def unchanged(image, other, value_range, rng) -> np.ndarray:
    """The scan itself."""
    return image


def flipped(image, other, value_range, rng) -> np.ndarray:
    """Along one axis."""
    return np.flip(image, 1 + int(rng.integers(image.ndim - 1)))


def shifted(image, other, value_range, rng) -> np.ndarray:
    """By 4 % of each side, forth or back; what comes from outside is background, the lowest value there is."""
    voxels = [rng.choice((-1, 1)) * max(1, round(SHIFT * side)) for side in image.shape[1:]]
    return scipy.ndimage.shift(image, (0, *voxels), order=0, cval=image.min())


def contrast(image, other, value_range, rng) -> np.ndarray:
    """Intensities to the power of 1.4 or 1 / 1.4, within the value range."""
    low, high = value_range
    unit = ((image - low) / (high - low)).clip(0, 1)
    return unit**GAMMA ** float(rng.choice((-1, 1))) * (high - low) + low


def blended(image, other, value_range, rng) -> np.ndarray:
    """0.8 of the scan and 0.2 of another."""
    return (1 - BLEND) * image + BLEND * other


def noised(image, other, value_range, rng) -> np.ndarray:
    """With Gaussian noise of 5 % of the value range."""
    low, high = value_range
    return (image + rng.normal(0, NOISE * (high - low), image.shape)).clip(low, high)


CHANGES: dict[str, Change] = {
    "unchanged": unchanged,
    "flipped": flipped,
    "shifted": shifted,
    "contrast": contrast,
    "blended": blended,
    "noised": noised,
}


def plant(
    kind: str,
    images: Sequence[np.ndarray],
    sources: Sequence[int],
    others: Sequence[int],
    value_range: tuple[float, float],
    reconstruct: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Copies ``(C, *S)`` of ``images[source]``, changed as ``kind`` says.

    Args:
        kind: of :data:`KINDS`, or :data:`RECONSTRUCTED`.
        images: training scans, each ``(C, *S)``.
        sources: which are copied.
        others: of another subject each, for blending.
        value_range: black and white.
        reconstruct: through the first stage, for :data:`RECONSTRUCTED`.
        seed: of the changes.
    """
    for source, other in zip(sources, others, strict=True):
        if kind == RECONSTRUCTED:
            yield reconstruct(images[source])
        else:
            # Named by kind and source, so that one kind more or less leaves the others as they are.
            rng = np.random.default_rng((seed, KINDS.index(kind), source))
            copy = CHANGES[kind](images[source], images[other], value_range, rng)
            yield np.ascontiguousarray(copy, np.float32)
