"""One simulated subject: its map to the template, its true volumes, its image and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import ndimage

from ldm.data.simulated import lesions, population, warp
from ldm.data.simulated.anatomy import Anatomy, Grid, template
from ldm.data.simulated.sequences import Tissues, scan

FIELD_OF_VIEW_MM = (160.0, 192.0, 160.0)  # holds every simulated brain with a margin
CENTRE_MM = (0.0, -17.0, 6.0)  # of the field of view, in the MNI-like world space
MULTIPLE = 8  # default shapes divide by this along every axis
LABELS = ("background", "csf", "grey_matter", "white_matter", "ventricles")
LESION_LABELS = lesions.PARTS  # values 5, 6, 7
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
    mass: np.ndarray | None = None  # mass effect of a tumour: displacement (3, X, Y, Z) on lesions.PUSH_GRID

    def pose(self, points: np.ndarray) -> np.ndarray:
        """Mass effect and pose: subject points (3, N) to template points (3, N) float32, mm."""
        if self.mass is not None:
            points = points + warp.displacement_at(self.mass, lesions.PUSH_GRID, points)
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
    """A simulated subject: images and labels on the grid (X, Y, Z), and true covariates."""

    images: dict[str, np.ndarray]  # sequence -> (X, Y, Z) int16
    labels: np.ndarray  # (X, Y, Z) uint8: index in LABELS + LESION_LABELS
    age: float  # years
    sex: str
    ventricles_mm3: float
    brain_mm3: float  # without necrosis and rim of a tumour
    diseased: bool = False
    lesion_mm3: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LESION_LABELS, 0.0))
    lesion_centre: np.ndarray | None = None  # (3,) mm; of a healthy subject: where one could have been
    lesion_radius_mm: float | None = None

    @property
    def image(self) -> np.ndarray:
        """The T1-weighted image, (X, Y, Z) int16."""
        return self.images["T1"]


def render(
    atlas: Atlas,
    grid: Grid,
    seed: int,
    index: int,
    sequences: Sequence[str] = ("T1",),
    lesion_share: float | None = None,
) -> Rendered:
    """Make subject `index` of the population `seed` on `grid`, in these `sequences` of `sequences.SEQUENCES`.

    With a `lesion_share` (0 to 1) a subject has a tumour with that probability; the subject is else the same.
    """
    body = embody(atlas, seed, index, lesion_share)
    brain = _brain_volume(atlas, body)
    inside, points, tissues = _tissues(atlas, grid, body)
    images = {name: _filled(grid, inside, scan(name, points, tissues, seed, index)) for name in sequences}
    labels = _filled(grid, inside, _labels(tissues))
    facts = {} if body.lesion is None else {"diseased": True, "lesion_mm3": _lesion_volumes(atlas, body)}
    return Rendered(
        images,
        labels,
        body.subject.age,
        body.subject.sex,
        body.ventricles_mm3,
        brain,
        lesion_centre=body.lesion_centre,
        lesion_radius_mm=body.lesion_radius_mm,
        **facts,
    )


@dataclass(frozen=True)
class Body:
    """The anatomy of a subject, before any image."""

    subject: population.Subject
    deformation: Deformation
    ventricles_mm3: float
    lesion: lesions.Lesion | None = None
    lesion_centre: np.ndarray | None = None  # (3,) mm; of a healthy subject: where one could have been
    lesion_radius_mm: float | None = None


def embody(atlas: Atlas, seed: int, index: int, lesion_share: float | None = None) -> Body:
    """The anatomy of subject `index` of the population `seed`, with a tumour with the probability `lesion_share`."""
    rng = population.generator(seed, index, population.ANATOMY)
    subject = population.draw(rng, atlas.head_mm3)
    healthy = Body(subject, *deform(atlas, subject, warp.random_displacement(rng)))
    if lesion_share is None:
        return healthy
    rng = population.generator(seed, index, population.LESION)
    plan = lesions.draw(rng, lesion_share)
    tissue = _healthy_tissue(atlas, subject, healthy.deformation, BRAIN_LATTICE.points())
    centre = lesions.place(rng, plan, BRAIN_LATTICE, tissue)
    healthy = replace(healthy, lesion_centre=centre, lesion_radius_mm=plan.radius_mm)
    return _with_lesion(atlas, healthy, plan, lesions.Mass.draw(rng, plan, centre)) if plan.diseased else healthy


def _with_lesion(atlas: Atlas, body: Body, plan: lesions.Plan, mass: lesions.Mass) -> Body:
    """A healthy subject, pushed aside by `mass`, and with the whole tumour in it."""
    before = _healthy_tissue(atlas, body.subject, body.deformation, lesions.PUSH_GRID.points())
    deformation = replace(body.deformation, mass=lesions.push(plan, mass, before))
    after = _healthy_tissue(atlas, body.subject, deformation, mass.grid.points())
    lesion = lesions.spread(plan, mass, after)
    ventricles = _ventricular_volume(deformation, lesion)
    return replace(body, deformation=deformation, lesion=lesion, ventricles_mm3=ventricles)


def _filled(grid: Grid, inside: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(X, Y, Z) with `values` (N,) at the flat indices `inside` and 0 elsewhere."""
    volume = np.zeros(grid.shape, values.dtype)
    volume.flat[inside] = values
    return volume


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


def _healthy_tissue(
    atlas: Atlas, subject: population.Subject, deformation: Deformation, points: np.ndarray
) -> lesions.Tissue:
    """Tissue at subject `points` (3, N) as if a tumour replaced none, whatever the image's spacing."""
    fine = atlas.fine
    moved = deformation.without_ventricles(points)
    origins = deformation.grow(moved)
    maps = fine.brain, _mix(fine.grey, subject.atrophy), _mix(fine.white, subject.atrophy)
    brain, grey, white = (fine.grid.sample(volume, origins) for volume in maps)
    return lesions.Tissue(brain, grey, white, warp.FRACTION_GRID.sample(deformation.fraction, moved), origins)


def _ventricular_volume(deformation: Deformation, lesion: lesions.Lesion) -> float:
    """Integral of the ventricular fraction over the subject after the mass effect, mm3."""
    points = VENTRICLE_LATTICE.points()
    fraction = warp.FRACTION_GRID.sample(deformation.fraction, deformation.without_ventricles(points))
    core, _, _ = lesion.fractions(points, VENTRICLE_LATTICE.step)
    return float((fraction * (1 - core)).sum(dtype=np.float64)) * VENTRICLE_LATTICE.step**3


def _lesion_volumes(atlas: Atlas, body: Body) -> dict[str, float]:
    """Volumes of the parts of a tumour, integrated over its own lattice, mm3."""
    grid = body.lesion.grid
    tissue = _healthy_tissue(atlas, body.subject, body.deformation, grid.points())
    parts, _, _ = _lesion_parts(body.lesion, grid.points(), grid.step, tissue.grey, tissue.white)
    return {name: float(part.sum(dtype=np.float64)) * grid.step**3 for name, part in parts.items()}


def _lesion_parts(
    lesion: lesions.Lesion, points: np.ndarray, width_mm: float, grey: np.ndarray, white: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Fractions (N,) of a tumour's parts, and what is left of `grey` and `white` beside them."""
    core, necrosis, swollen = lesion.fractions(points, width_mm)
    grey, white = grey * (1 - core), white * (1 - core)
    wet_grey, wet_white = lesions.GREY_SHARE * swollen * grey, swollen * white
    parts = dict(zip(lesions.PARTS, (necrosis, wet_grey + wet_white, core - necrosis), strict=True))
    return parts, grey - wet_grey, white - wet_white


def _brain_volume(atlas: Atlas, body: Body) -> float:
    """Integral of grey and white matter over the subject, mm3, on a lattice of its own whatever the image's."""
    subject, deformation = body.subject, body.deformation
    fine = atlas.fine
    tissue = _mix(fine.grey, subject.atrophy) + _mix(fine.white, subject.atrophy)
    points = BRAIN_LATTICE.points()
    points = points[:, _near_brain(atlas, deformation, points)]
    fraction = fine.grid.sample(tissue, deformation(points))
    if body.lesion is not None:
        core, _, _ = body.lesion.fractions(points, BRAIN_LATTICE.step)
        fraction = fraction * (1 - core)
    return float(fraction.sum(dtype=np.float64)) * BRAIN_LATTICE.step**3


def _tissues(atlas: Atlas, grid: Grid, body: Body) -> tuple[np.ndarray, np.ndarray, Tissues]:
    """Voxels of `grid` in the head: flat indices (N,), points (3, N) in mm, and tissues."""
    subject, deformation, lesion = body.subject, body.deformation, body.lesion
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
    if lesion is None:
        return inside, points, Tissues(grey, white, csf, ventricles, texture, {})

    parts, grey, white = _lesion_parts(lesion, points, grid.step, grey, white)
    healthy = 1 - parts["necrotic_core"] - parts["enhancing"]
    csf, ventricles, texture = csf * healthy, ventricles * healthy, texture * healthy
    unrest = lesion.grid.sample(lesion.unrest, points, mode="nearest")
    return inside, points, Tissues(grey, white, csf, ventricles, texture, parts, unrest)


def _labels(tissues: Tissues) -> np.ndarray:
    """The tissue that fills most of each voxel, (N,) uint8: a tumour where its parts together fill half of it."""
    grey, white, csf, ventricles = tissues.grey, tissues.white, tissues.csf, tissues.ventricles
    tissue = np.where(white > grey, 3, 2)
    labels = np.where(csf + ventricles < grey + white, tissue, np.where(ventricles > csf, 4, 1))
    if tissues.lesion:
        parts = np.stack([tissues.lesion[name] for name in LESION_LABELS])
        labels = np.where(parts.sum(0) > 0.5, len(LABELS) + parts.argmax(0), labels)
    return labels.astype(np.uint8)
