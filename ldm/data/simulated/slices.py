"""Axial slices of simulated brains, for 2-D models: which slices, and what each of them shows.

A slice is not a file of its own: its row says which volume and which number (``T1w.nii.gz::axial[17]``).
"""

from __future__ import annotations

import numpy as np

from ldm.data.simulated import population
from ldm.data.simulated.anatomy import Grid
from ldm.data.simulated.render import LABELS, Rendered

MOST = 8  # slices a subject
REACH = 0.7  # of the radius of the tumour's mass: slices lie within it, so that each shows the mass


def rows(subject: Rendered, grid: Grid, seed: int, index: int, count: int) -> list[dict[str, float | int | str]]:
    """Choose `count` axial slices of a rendered subject, and describe each, from below upwards.

    They lie around the centre of the tumour; in a healthy subject around a place drawn in the same way, so that healthy
    and diseased slices come from the same heights of the head.
    """
    centre = (subject.lesion_centre[2] - grid.origin[2]) / grid.step
    reach = max(REACH * subject.lesion_radius_mm / grid.step, count / 2)
    near = np.arange(grid.shape[2])
    near = near[np.argsort(np.abs(near - centre), kind="stable")][: max(count, int(2 * reach))]
    chosen = population.generator(seed, index, population.SLICES).choice(near, count, replace=False)
    return [_row(subject, grid, int(number)) for number in sorted(chosen)]


def _row(subject: Rendered, grid: Grid, number: int) -> dict[str, float | int | str]:
    area = float((subject.labels[:, :, number] >= len(LABELS)).sum()) * grid.step**2
    return {
        "axial": number,
        "z_mm": round(grid.origin[2] + grid.step * number, 2),
        "diseased": "diseased" if area > 0 else "healthy",
        "lesion_mm2": area,
    }
