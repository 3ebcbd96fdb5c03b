"""Mosaics of real and generated images."""

from __future__ import annotations

from pathlib import Path

from ldm.evaluation.fidelity import ImageSet
from ldm.model.generative import Generative
from ldm.training import figures
from ldm.training.panels import describe

SHOWN = 16
PAIRS_3D = 8  # a volume takes three planes


def pictures(
    model: Generative, real: ImageSet, samples: ImageSet, folder: Path, value_range: tuple[float, float]
) -> None:
    """Mosaics of held-out images, of samples at the same covariates, and of both side by side.

    Cases are evenly spaced: a table is often sorted.
    """
    rgb, volumes, count = (
        model.preprocessing.is_rgb,
        model.preprocessing.spatial_dims == 3,
        min(len(real), len(samples)),
    )
    for name, one in (("real", real), ("samples", samples)):
        shown = [one.images[case] for case in evenly(count, SHOWN)]
        titles = [describe(one.rows[case]) for case in evenly(count, SHOWN)]
        figures.mosaic(shown, folder / f"{name}.png", titles, value_range, rgb=rgb)
    cases, columns = (evenly(count, PAIRS_3D), 2) if volumes else (evenly(count, SHOWN), 8)
    pairs = [image for case in cases for image in (real.images[case], samples.images[case])]
    titles = [title for case in cases for title in (f"real: {describe(real.rows[case])}", "generated")]
    figures.mosaic(pairs, folder / "pairs.png", titles, value_range, columns, rgb)


def evenly(count: int, most: int) -> list[int]:
    """Positions evenly spaced over ``count``: all, or ``most`` of them."""
    shown = min(count, most)
    return [case * count // shown for case in range(shown)]
