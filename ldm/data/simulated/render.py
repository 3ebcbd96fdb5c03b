"""One simulated subject: its map to the template, its true volumes, its image and its labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ldm.data.simulated import population, warp
from ldm.data.simulated.anatomy import Anatomy, Grid, template

FIELD_OF_VIEW_MM = (160.0, 192.0, 160.0)  # holds every simulated brain with a margin
CENTRE_MM = (0.0, -17.0, 6.0)  # of the field of view, in the MNI-like world space
MULTIPLE = 8  # default shapes divide by this along every axis
LABELS = ("background", "csf", "grey_matter", "white_matter", "ventricles")
VENTRICLE_LATTICE = Grid((-66.0, -102.0, -60.0), 3.0, (45, 59, 43))
BRAIN_LATTICE = Grid((-80.0, -112.0, -77.0), 4.0, (41, 48, 41))
TOLERANCE = 0.002  # of the ventricular volume, in the search for its displacement
REACH_MM = 15.0  # more than the largest individual displacement
SHARP_MM = 1.5  # images up to this spacing show the template unblurred
MEAN_SHRINK = 0.9  # typical size of a simulated brain over the template's


def output_grid(spacing_mm: float, shape: tuple[int, int, int] | None = None) -> Grid:
    """The grid all images of a cohort share; the smallest multiple of 8 that holds the field of view by default."""
    if shape is None:
        shape = tuple(int(MULTIPLE * np.ceil(f / spacing_mm / MULTIPLE - 1e-9)) for f in FIELD_OF_VIEW_MM)
    origin = tuple(c - spacing_mm * (n - 1) / 2 for c, n in zip(CENTRE_MM, shape, strict=True))
    return Grid(origin, float(spacing_mm), tuple(shape))


@dataclass(frozen=True)
class Atlas:
    """All that subjects have in common: `fine` for measuring, `display` low-passed for the output spacing."""

    fine: Anatomy
    display: Anatomy
    sharp: bool  # whether `display` is the template as it is
    growth: warp.VentricleGrowth
    head: np.ndarray  # the head mask on warp.RANDOM_GRID
    surface: np.ndarray  # points (3, N) on the surface of the template's head, mm
    near_head: np.ndarray  # 1 where an individual displacement can still reach the head, on warp.RANDOM_GRID
    near_ventricles: np.ndarray  # the same for the ventricles at their largest, on warp.FRACTION_GRID
    head_mm3: float
    ventricles_mm3: float

    @classmethod
    def build(cls, spacing_mm: float) -> Atlas:
        """Prepare the template for images `spacing_mm` apart (about 10 s)."""
        full = template()
        fine = full.at(1.2, 2)
        # A voxel averages over its own extent; a Gaussian of 0.35 voxels stands for that average.
        blur = 0.35 * spacing_mm / MEAN_SHRINK
        sharp = spacing_mm <= SHARP_MM
        display = full.at(0.0 if sharp else blur, 2 if blur > 1 else 1)
        growth = warp.VentricleGrowth.build(full, fine)
        head = fine.grid.sample(fine.brain, warp.RANDOM_GRID.points()).reshape(warp.RANDOM_GRID.shape)
        largest = growth.fractions[-1].astype(np.float32)
        volumes = (float(v.sum(dtype=np.float64)) for v in (full.brain, full.ventricles))
        return cls(
            fine,
            display,
            sharp,
            growth,
            head,
            _surface(full),
            _within_reach(head, warp.RANDOM_GRID),
            _within_reach(largest, warp.FRACTION_GRID),
            *volumes,
        )


def _surface(anatomy: Anatomy) -> np.ndarray:
    brain = anatomy.brain > 0.5
    shell = np.argwhere(brain & ~ndimage.binary_erosion(brain))[::60]
    return (shell * anatomy.grid.step + anatomy.grid.origin).T.astype(np.float32)


def _within_reach(fraction: np.ndarray, grid: Grid) -> np.ndarray:
    distance = ndimage.distance_transform_edt(fraction < 0.01, grid.step)
    return (distance <= REACH_MM).astype(np.float32)


@dataclass(frozen=True)
class Deformation:
    """Where each point of the subject comes from in the template."""

    inverse: np.ndarray  # (3, 3) subject mm -> template mm
    offset: np.ndarray  # (3,) mm
    individual: np.ndarray  # displacement (3, X, Y, Z) on warp.RANDOM_GRID
    ventricular: np.ndarray  # displacement (3, X, Y, Z) on warp.VENTRICLE_GRID
    fraction: np.ndarray  # ventricular fraction (X, Y, Z) after that displacement, on warp.FRACTION_GRID

    def pose(self, points: np.ndarray) -> np.ndarray:
        """Pose alone: subject points (3, N) to template points (3, N) float32, mm."""
        inverse, offset = self.inverse.astype(np.float32), self.offset.astype(np.float32)
        return inverse @ (points - offset[:, None])

    def without_ventricles(self, points: np.ndarray) -> np.ndarray:
        """Pose and individual anatomy: subject points (3, N) to template points (3, N), mm."""
        posed = self.pose(points)
        return posed + warp.displacement_at(self.individual, warp.RANDOM_GRID, posed)

    def grow(self, moved: np.ndarray) -> np.ndarray:
        """From where `without_ventricles` leads to the template, (3, N) mm."""
        moved = moved.copy()
        central = np.flatnonzero(warp.VENTRICLE_GRID.contains(moved))
        moved[:, central] += warp.displacement_at(self.ventricular, warp.VENTRICLE_GRID, moved[:, central])
        return moved

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The whole map: subject points (3, N) to template points (3, N), mm."""
        return self.grow(self.without_ventricles(points))


@dataclass(frozen=True)
class Rendered:
    """A simulated subject: image (X, Y, Z) int16, labels (X, Y, Z) uint8 (index in LABELS) and true covariates."""

    image: np.ndarray
    labels: np.ndarray
    age: float  # years
    sex: str
    ventricles_mm3: float
    brain_mm3: float


def render(atlas: Atlas, grid: Grid, seed: int, index: int) -> Rendered:
    """Make subject `index` of the population `seed` on `grid`."""
    rng = population.generator(seed, index, population.ANATOMY)
    subject = population.draw(rng, atlas.head_mm3)
    deformation, ventricles = deform(atlas, subject, warp.random_displacement(rng))
    brain = _brain_volume(atlas, subject, deformation)
    image, labels = _draw_images(
        atlas, grid, subject, deformation, population.generator(seed, index, population.RENDERING)
    )
    return Rendered(image, labels, subject.age, subject.sex, ventricles, brain)


def deform(atlas: Atlas, subject: population.Subject, individual: np.ndarray) -> tuple[Deformation, float]:
    """The map of a subject with the `individual` displacement, its head and its ventricles at their drawn sizes.

    Returns the map and the ventricular volume in mm3: the integral of the warped ventricle map over the subject.
    The ventricular displacement is searched by Newton's method on the logarithm of the volume, which is close to
    linear in the logarithmic growth of the template's own ventricles.
    """
    start = _place(atlas, subject, individual)
    lattice = VENTRICLE_LATTICE.points()
    lattice = lattice[:, warp.FRACTION_GRID.sample(atlas.near_ventricles, start.pose(lattice)) > 0]
    moved = start.without_ventricles(lattice)

    strength = np.log(subject.ventricles_mm3 * np.linalg.det(start.inverse)) - np.log(atlas.ventricles_mm3)
    for _ in range(8):
        fraction = atlas.growth.fraction(strength)
        inside = warp.FRACTION_GRID.sample(fraction, moved)
        reached = float(inside.sum(dtype=np.float64)) * VENTRICLE_LATTICE.step**3
        error = np.log(subject.ventricles_mm3 / reached)
        if abs(error) < TOLERANCE:
            break
        strength += error
    return replace(start, ventricular=atlas.growth.displacement(strength), fraction=fraction), reached


def _near_brain(atlas: Atlas, deformation: Deformation, points: np.ndarray) -> np.ndarray:
    """Indices of the subject `points` (3, N) that may lie in the brain."""
    return np.flatnonzero(warp.RANDOM_GRID.sample(atlas.near_head, deformation.pose(points)) > 0)


def _place(atlas: Atlas, subject: population.Subject, individual: np.ndarray) -> Deformation:
    """The map without ventricular growth: the head at its drawn volume, its bounding box in the field of view."""
    grid = warp.RANDOM_GRID
    warped = grid.sample(atlas.head, grid.points() + individual.reshape(3, -1))
    change = float(warped.sum(dtype=np.float64) / atlas.head.sum(dtype=np.float64))
    matrix = subject.matrix / np.cbrt(change)
    surface = atlas.surface
    for _ in range(8):  # fixed point of x + u(x) = p: where the template's surface goes
        surface = atlas.surface - warp.displacement_at(individual, grid, surface)
    surface = matrix @ surface
    low, high = surface.min(1), surface.max(1)
    offset = subject.offset + CENTRE_MM - (low + high) / 2
    return Deformation(
        np.linalg.inv(matrix), offset, individual, atlas.growth.displacement(0.0), atlas.growth.fraction(0.0)
    )


def _mix(ends: tuple[np.ndarray, np.ndarray], atrophy: float) -> np.ndarray:
    return np.float32(1 - atrophy) * ends[0] + np.float32(atrophy) * ends[1]


def _brain_volume(atlas: Atlas, subject: population.Subject, deformation: Deformation) -> float:
    """Integral of grey and white matter over the subject, mm3, on a lattice of its own whatever the image's."""
    fine = atlas.fine
    tissue = _mix(fine.grey, subject.atrophy) + _mix(fine.white, subject.atrophy)
    points = BRAIN_LATTICE.points()
    points = points[:, _near_brain(atlas, deformation, points)]
    fraction = fine.grid.sample(tissue, deformation(points))
    return float(fraction.sum(dtype=np.float64)) * BRAIN_LATTICE.step**3


def _draw_images(
    atlas: Atlas, grid: Grid, subject: population.Subject, deformation: Deformation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    points = grid.points()
    near = _near_brain(atlas, deformation, points)
    moved = deformation.without_ventricles(points[:, near])
    origins = deformation.grow(moved)
    maps, lattice = atlas.display, atlas.display.grid
    covered = lattice.sample(maps.brain, origins)
    head = np.flatnonzero(covered > 0.5)
    inside = near[head]
    points, moved, origins, covered = points[:, inside], moved[:, head], origins[:, head], covered[head]
    tissues = _mix(maps.grey, subject.atrophy), _mix(maps.white, subject.atrophy), maps.texture
    grey, white, texture = (lattice.sample(volume, origins) / covered for volume in tissues)
    if atlas.sharp:
        ventricles = lattice.sample(maps.ventricles, origins)
    else:
        ventricles = warp.FRACTION_GRID.sample(deformation.fraction, moved)
    room = np.minimum(1, (1 - ventricles) / np.maximum(grey + white, 1e-6))
    grey, white = grey * room, white * room
    csf = np.clip(1 - grey - white - ventricles, 0, 1)

    image = np.zeros(grid.shape, np.int16)
    image.flat[inside] = _scan(points, grey, white, csf + ventricles, texture, rng)
    labels = np.zeros(grid.shape, np.uint8)
    tissue = np.where(white > grey, 3, 2)
    labels.flat[inside] = np.where(csf + ventricles < grey + white, tissue, np.where(ventricles > csf, 4, 1))
    return image, labels


def _scan(
    points: np.ndarray,
    grey: np.ndarray,
    white: np.ndarray,
    csf: np.ndarray,
    texture: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """T1-weighted intensities (N,) int16 of tissue fractions at world `points`: contrast, bias field, noise, gain."""
    grey_level, csf_level = rng.uniform(0.66, 0.82), rng.uniform(0.18, 0.36)
    signal = grey_level * grey + white + csf_level * csf + rng.uniform(0.8, 1.3) * texture
    bias = np.zeros_like(signal)
    for _ in range(4):  # a few long waves, in every direction
        direction = rng.standard_normal(3)
        wave = 2 * np.pi / rng.uniform(150, 350) * direction / np.linalg.norm(direction)
        bias += rng.normal(0, 0.04) * np.cos(wave.astype(np.float32) @ points + rng.uniform(0, 2 * np.pi))
    signal = signal * np.exp(bias)
    noise = rng.uniform(0.008, 0.028)
    real, imaginary = rng.standard_normal((2, signal.size), dtype=np.float32) * np.float32(noise)
    magnitude = np.hypot(signal + real, imaginary)  # Rician, as in a magnitude image
    return np.clip(np.rint(magnitude * rng.uniform(500, 1100)), 1, np.iinfo(np.int16).max).astype(np.int16)
