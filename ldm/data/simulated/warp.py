"""Smooth invertible deformations: a random one for each subject, and the growth of the ventricles.

Both are flows of stationary velocity fields, which never fold (Arsigny et al., MICCAI 2006: exp(v) by scaling and
squaring). Maps are stored backward, as displacements in mm from a point in the subject to its origin in the
template, because that is the direction in which an image is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ldm.data.simulated.anatomy import Anatomy, Grid

RANDOM_GRID = Grid((-94.5, -131.0, -94.0), 7.0, (28, 33, 29))
# (smoothness: standard deviation of the Gaussian in mm, amplitude: standard deviation of each component in mm)
RANDOM_SCALES = ((22.0, 2.8), (12.0, 1.5), (7.5, 0.9))
VENTRICLE_GRID = Grid((-72.0, -108.0, -66.0), 3.0, (49, 65, 50))
FRACTION_GRID = Grid(VENTRICLE_GRID.origin, 2.0, (73, 97, 75))
FRACTION_BLUR_MM = 1.2  # so that lattices of 2 to 4 mm sample the ventricles without aliasing
PUSH_SCALES_MM = (3.5, 20.0)  # the push starts at the wall and has died out about 40 mm away
GROWTH_PER_STEP = 0.15
GROWTH_STEPS = (8, 21)  # shrinking, growing: 6 to 240 ml in the space of the template
SQUARINGS = 4  # steps of at most about 1 mm


def exponential(velocity: np.ndarray, grid: Grid) -> np.ndarray:
    """Displacement (3, X, Y, Z) in mm of the flow of `velocity` (3, X, Y, Z) mm over unit time."""
    points = grid.points()
    flow = (velocity / 2**SQUARINGS).reshape(3, -1).astype(np.float32)
    for _ in range(SQUARINGS):
        volume = flow.reshape(3, *grid.shape)
        flow = flow + displacement_at(volume, grid, points + flow)
    return flow.reshape(3, *grid.shape)


def displacement_at(displacement: np.ndarray, grid: Grid, points: np.ndarray) -> np.ndarray:
    """Displacement (3, N) in mm at world points (3, N); the border's value outside the grid."""
    return np.stack([grid.sample(component, points, mode="nearest") for component in displacement])


def random_displacement(rng: np.random.Generator) -> np.ndarray:
    """A random diffeomorphism on RANDOM_GRID: displacement (3, X, Y, Z) in mm, coarse to fine scales."""
    velocity = np.zeros((3, *RANDOM_GRID.shape), np.float32)
    for smoothness, amplitude in RANDOM_SCALES:
        sigma = smoothness / RANDOM_GRID.step
        # White noise after a Gaussian of sigma voxels has the standard deviation (2 sqrt(pi) sigma)^(-3/2) in 3-D.
        gain = amplitude * (2 * np.sqrt(np.pi) * sigma) ** 1.5
        for component in velocity:
            noise = rng.standard_normal(RANDOM_GRID.shape, dtype=np.float32)
            component += gain * ndimage.gaussian_filter(noise, sigma, mode="wrap", truncate=3)
    return exponential(velocity, RANDOM_GRID)


@dataclass(frozen=True)
class VentricleGrowth:
    """The template's ventricles at K sizes, small to large, and how the tissue moves to make room.

    `displacements` (K, 3, X, Y, Z): backward, mm, on VENTRICLE_GRID. `fractions` (K, X, Y, Z): ventricular fraction
    after the displacement, low-passed after it (not before: a blurred wall would lose volume when it is squeezed),
    on FRACTION_GRID in float16. `log_ratio` (K,): natural logarithm of the volume after over the volume before.
    """

    displacements: np.ndarray
    fractions: np.ndarray
    log_ratio: np.ndarray

    @classmethod
    def build(cls, full: Anatomy, fine: Anatomy) -> VentricleGrowth:
        """Grow and shrink the ventricles in small steps; `full` and `fine` are the template at 1 and 2 mm.

        Each step's velocity is driven by the ventricles as they are after the steps before it, so they swell
        evenly; the composition of steps that do not fold does not fold.
        """
        rest = np.zeros((3, *VENTRICLE_GRID.shape), np.float32)
        down = _steps(fine, rest, -GROWTH_PER_STEP, GROWTH_STEPS[0])
        up = _steps(fine, rest, GROWTH_PER_STEP, GROWTH_STEPS[1])
        displacements = np.stack([*reversed(down), rest, *up])
        fractions = _fractions(full, displacements)
        volumes = fractions.sum(axis=(1, 2, 3), dtype=np.float64)
        return cls(displacements, fractions, np.log(volumes / volumes[GROWTH_STEPS[0]]))

    def displacement(self, log_ratio: float) -> np.ndarray:
        """Displacement (3, X, Y, Z) in mm that changes the template's ventricles by exp(log_ratio)."""
        return self._between(self.displacements, log_ratio)

    def fraction(self, log_ratio: float) -> np.ndarray:
        """Ventricular fraction (X, Y, Z) float32 after that displacement, on FRACTION_GRID."""
        return self._between(self.fractions, log_ratio)

    def _between(self, table: np.ndarray, log_ratio: float) -> np.ndarray:
        position = np.interp(log_ratio, self.log_ratio, np.arange(len(self.log_ratio)))
        below = min(int(position), len(self.log_ratio) - 2)
        weight = np.float32(position - below)
        lower, upper = (table[k].astype(np.float32) for k in (below, below + 1))
        return (1 - weight) * lower + weight * upper


def _fractions(full: Anatomy, displacements: np.ndarray) -> np.ndarray:
    points = FRACTION_GRID.points()
    largest = _ventricles(full, displacements[-1])
    reached = VENTRICLE_GRID.sample(largest, points).reshape(FRACTION_GRID.shape) > 0
    reached = np.flatnonzero(ndimage.binary_dilation(reached, iterations=2))
    points = points[:, reached]
    fractions = np.zeros((len(displacements), *FRACTION_GRID.shape), np.float16)
    for target, displacement in zip(fractions, displacements, strict=True):
        sharp = np.zeros(FRACTION_GRID.shape, np.float32)
        origins = points + displacement_at(displacement, VENTRICLE_GRID, points)
        sharp.flat[reached] = full.grid.sample(full.ventricles, origins)
        target[:] = ndimage.gaussian_filter(sharp, FRACTION_BLUR_MM / FRACTION_GRID.step, mode="constant")
    return fractions


def _ventricles(anatomy: Anatomy, displacement: np.ndarray) -> np.ndarray:
    points = VENTRICLE_GRID.points() + displacement.reshape(3, -1)
    return anatomy.grid.sample(anatomy.ventricles, points).reshape(VENTRICLE_GRID.shape)


def _steps(anatomy: Anatomy, displacement: np.ndarray, growth: float, count: int) -> list[np.ndarray]:
    """Displacements after 1 ... `count` steps, each changing the ventricular volume by the fraction `growth`."""
    points, done = VENTRICLE_GRID.points(), []
    taper = _taper(VENTRICLE_GRID)
    for _ in range(count):
        ventricles = _ventricles(anatomy, displacement)
        velocity = _outward(ventricles, VENTRICLE_GRID.step) * taper
        divergence = sum(np.gradient(velocity[i], VENTRICLE_GRID.step, axis=i) for i in range(3))
        velocity *= growth * ventricles.sum() / (ventricles * divergence).sum()
        flow = -velocity  # less than a voxel and smooth: one step of Euler's does not fold
        moved = points + flow.reshape(3, -1)
        displacement = flow + displacement_at(displacement, VENTRICLE_GRID, moved).reshape(flow.shape)
        done.append(displacement)
    return done


def _outward(ventricles: np.ndarray, step: float) -> np.ndarray:
    """Velocity (3, X, Y, Z) that swells the ventricles and compresses the tissue around them.

    Its divergence is a source at the ventricles and an equal sink spread around them, div v = (G_s1 - G_s2) *
    ventricles, G_s a Gaussian of standard deviation s. Gaussians solve the heat equation, so the irrotational
    solution is v = -1/2 grad of the integral of (G_s * ventricles) over s^2 from s1^2 to s2^2: it points outwards
    and vanishes far away, so that the head does not grow.
    """
    widths = np.linspace(*PUSH_SCALES_MM, 6)  # d(s^2) = 2 s ds: each width counts in proportion to itself
    potential = sum(
        np.float32(s) * ndimage.gaussian_filter(ventricles, s / step, mode="constant", truncate=3) for s in widths
    )
    return -np.stack(np.gradient(potential, step))


def _taper(grid: Grid) -> np.ndarray:
    """1 inside the grid, falling to 0 over the last six voxels, (X, Y, Z): nothing moves at the border."""
    edges = [np.clip(np.minimum(np.arange(n), np.arange(n)[::-1]) / 6, 0, 1) for n in grid.shape]
    x, y, z = (0.5 - 0.5 * np.cos(np.pi * e) for e in edges)
    return (x[:, None, None] * y[:, None] * z).astype(np.float32)
