"""A tumour in a simulated brain: who has one, where it sits, how it pushes the brain aside, what each point of it is.

The mass is a necrotic core with an enhancing rim; its outline is a level set of a distance times a smooth random field.
It grows from a smaller seed and pushes the brain before it: a flow inside the closed skull from the mass towards the
cerebrospinal fluid around it, which gives way. Oedema spreads from the mass as far as it travels in a given time, fast
in white matter, slowly in grey matter, and hardly through fluid. Everything is defined in the subject's space in mm and
does not depend on the spacing of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import cg

from ldm.data.simulated import warp
from ldm.data.simulated.anatomy import Grid

PARTS = ("necrotic_core", "oedema", "enhancing")  # BraTS: NCR, ED, ET
CORE_MEDIAN_MM3, CORE_SD, CORE_RANGE_MM3 = 20e3, 0.75, (3e3, 70e3)  # necrosis and rim: log-normal, cut off
OEDEMA_RATIO, OEDEMA_SD, OEDEMA_RANGE_MM3 = 1.6, 0.5, (3e3, 100e3)  # oedema over core: log-normal, cut off
# Of the oedema: what it adds to the displaced volume. More than real oedema does, because the flow escapes to the sides
# more easily than real tissue: chosen so that large tumours move the midline by several mm.
SWELLING = 1.0
LOWEST_MM = -8.0  # in the template: above the brain stem and the cerebellum
PUSH_GRID = Grid((-83.0, -116.0, -77.0), 6.0, (29, 34, 29))
PUSH_STEPS = 10
PUSH_REACH_MM = 60.0  # standard deviation of how far away fluid still gives way
BOX_STEP_MM, BOX_HALF = 3.0, 21  # the tumour's own lattice: 63 mm to each side of its centre
FAR_MM = BOX_STEP_MM * BOX_HALF  # oedema does not spread further
GREY_SHARE = 0.3  # oedema in grey matter, relative to white
SPEED = {"white": 1.0, "grey": 0.25, "fluid": 0.02}  # of spreading oedema
MIDLINE_MM, MIDLINE_SPEED = 5.0, 0.3  # it seldom crosses: within this distance of the template's midline, times so much
HALF_NEIGHBOURHOOD = [(x - 1, y - 1, z - 1) for x, y, z in np.ndindex(3, 3, 3) if (x, y, z) > (1, 1, 1)]


@dataclass(frozen=True)
class Plan:
    """A tumour as drawn, before it meets a brain; healthy subjects have one too, which only says where to look."""

    diseased: bool
    core_mm3: float  # necrosis and rim
    oedema_mm3: float
    displaced: float  # share of the core that has pushed tissue aside; the rest has replaced it
    rim_mm: float

    @property
    def radius_mm(self) -> float:
        """Radius of a ball as large as the core, mm."""
        return (3 / (4 * np.pi) * self.core_mm3) ** (1 / 3)


@dataclass(frozen=True)
class Tissue:
    """Healthy tissue at N points: fractions (N,) float32, and where the points lie in the template (3, N), mm."""

    brain: np.ndarray  # the head mask
    grey: np.ndarray
    white: np.ndarray
    ventricles: np.ndarray
    origins: np.ndarray

    @property
    def fluid(self) -> np.ndarray:
        return np.clip(self.brain - self.grey - self.white, 0, 1)


@dataclass(frozen=True)
class Lesion:
    """A tumour in a brain: level maps in mm on `grid`, positive inside."""

    grid: Grid
    core: np.ndarray
    necrosis: np.ndarray
    oedema: np.ndarray
    unrest: np.ndarray  # smooth random field of unit variance

    def fractions(self, points: np.ndarray, width_mm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fractions (N,) float32 of core, of necrosis and of the oedema around, at world `points` (3, N).

        An edge is a ramp of `width_mm`: the partial volume of a voxel of that size.
        """
        core, necrosis, oedema = (
            self._ramp(level, points, width_mm) for level in (self.core, self.necrosis, self.oedema)
        )
        return core, np.minimum(necrosis, core), oedema * (1 - core)

    def _ramp(self, level: np.ndarray, points: np.ndarray, width_mm: float) -> np.ndarray:
        return np.clip(0.5 + self.grid.sample(level, points, mode="nearest") / np.float32(width_mm), 0, 1)


def draw(rng: np.random.Generator, share: float) -> Plan:
    """Draw who has a tumour and of which size; the `share` of diseased subjects changes nothing else."""
    diseased = bool(rng.random() < share)
    size, ratio = np.clip(rng.standard_normal(2), -2.5, 2.5)
    core = float(np.clip(CORE_MEDIAN_MM3 * np.exp(CORE_SD * size), *CORE_RANGE_MM3))
    oedema = float(np.clip(core * OEDEMA_RATIO * np.exp(OEDEMA_SD * ratio), *OEDEMA_RANGE_MM3))
    return Plan(diseased, core, oedema, rng.uniform(0.6, 0.85), rng.uniform(3.0, 5.5))


def place(rng: np.random.Generator, plan: Plan, lattice: Grid, tissue: Tissue) -> np.ndarray:
    """Choose the centre (3,) mm of a tumour in deep white matter of either side; `tissue` is that of all of `lattice`.

    The seed from which the mass grows needs room: a point counts by how much white matter, and how little else than
    brain tissue, there is in the seed's neighbourhood.
    """
    seed_mm = plan.radius_mm * (1 - plan.displaced) ** (1 / 3)

    def around(fraction: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(fraction.reshape(lattice.shape), seed_mm / lattice.step, mode="constant").ravel()

    lateral, height = np.abs(tissue.origins[0]), tissue.origins[2]
    legal = (height > LOWEST_MM) & (lateral > 12) & (tissue.brain > 0.9)
    weight = legal * around(tissue.white).astype(np.float64) ** 2 * around(tissue.white + tissue.grey) ** 8
    index = rng.choice(len(weight), p=weight / weight.sum())
    jitter = rng.uniform(-0.5, 0.5, 3) * lattice.step
    return lattice.points()[:, index] + jitter


@dataclass(frozen=True)
class Mass:
    """Necrosis and rim, as levels (X, Y, Z) in mm on `grid`, positive inside; and the random fields of the tumour."""

    grid: Grid
    centre: np.ndarray
    core: np.ndarray
    necrosis: np.ndarray
    hindrance: np.ndarray  # random field of unit variance that makes oedema irregular
    unrest: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, plan: Plan, centre: np.ndarray) -> Mass:
        side = 2 * BOX_HALF + 1
        grid = Grid(tuple(float(c) - BOX_STEP_MM * BOX_HALF for c in centre), BOX_STEP_MM, (side,) * 3)
        lobes, bumps, thickness, hindrance, unrest = (_field(rng, grid, s) for s in (13.0, 6.0, 8.0, 9.0, 5.0))
        rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        axes = np.exp(0.15 * np.clip(rng.standard_normal(3), -2, 2))
        axes /= axes.prod() ** (1 / 3)
        offsets = (axes[:, None] * rotation).astype(np.float32) @ (grid.points() - centre.astype(np.float32)[:, None])
        distance = np.linalg.norm(offsets, axis=0).reshape(grid.shape)
        distance = distance * np.exp(0.26 * lobes + 0.12 * bumps)
        radius = _threshold(distance, np.ones_like(distance), plan.core_mm3)
        core = radius - distance
        necrosis = core - plan.rim_mm * np.exp(0.6 * np.clip(thickness, -2, 2))
        return cls(grid, centre, _closed(core), _closed(necrosis), hindrance, unrest)

    def share(self, points: np.ndarray, scale: float, width_mm: float) -> np.ndarray:
        """Fraction (N,) of the mass, shrunk towards its centre by `scale`, at world `points` (3, N)."""
        centre = self.centre.astype(np.float32)[:, None]
        level = self.grid.sample(self.core, centre + (points - centre) / np.float32(scale), mode="nearest")
        return np.clip(0.5 + level * np.float32(scale / width_mm), 0, 1)


def _field(rng: np.random.Generator, grid: Grid, smoothness_mm: float) -> np.ndarray:
    """Smooth random field of zero mean and unit variance on `grid`, (X, Y, Z) float32."""
    field = ndimage.gaussian_filter(
        rng.standard_normal(grid.shape, dtype=np.float32), smoothness_mm / grid.step, mode="wrap", truncate=3
    )
    return (field - field.mean()) / field.std()


def _threshold(values: np.ndarray, share: np.ndarray, volume_mm3: float) -> float:
    """The value below which `share` of the box adds up to `volume_mm3`."""
    order = np.argsort(values, axis=None, kind="stable")
    volume = np.cumsum(share.ravel()[order], dtype=np.float64) * BOX_STEP_MM**3
    return float(values.ravel()[order[min(np.searchsorted(volume, volume_mm3), values.size - 1)]])


def _closed(level: np.ndarray) -> np.ndarray:
    """`level` (X, Y, Z) with a border that is outside, so that nothing beyond the box is inside."""
    closed = np.full_like(level, -BOX_STEP_MM)
    inner = (slice(1, -1),) * 3
    closed[inner] = level[inner]
    return closed.astype(np.float32)


# the push -------------------------------------------------------------------------------------------------------------


def push(plan: Plan, mass: Mass, tissue: Tissue) -> np.ndarray:
    """Displacement (3, X, Y, Z) in mm on PUSH_GRID from points of the subject with the tumour to those without.

    Steps of a flow v = grad p with div v = source - sink inside the head and no flow through its surface: the source is
    the growing mass and the swelling around it, the sink is fluid, the nearer the more. Each step is small and smooth,
    so that it does not fold, and neither does their composition.
    """
    points, voxel = PUSH_GRID.points(), PUSH_GRID.step**3
    inside = (tissue.brain > 0.5).reshape(PUSH_GRID.shape)
    laplacian = _laplacian(inside)
    fluid = tissue.fluid.reshape(PUSH_GRID.shape)
    squared = ((points - mass.centre.astype(np.float32)[:, None]) ** 2).sum(0).reshape(PUSH_GRID.shape)
    near = np.exp(-squared / (2 * PUSH_REACH_MM**2))
    swelling_mm = (3 / (4 * np.pi) * (plan.core_mm3 + plan.oedema_mm3)) ** (1 / 3) / 1.5
    halo = np.exp(-squared / (2 * swelling_mm**2)) * inside
    displacement = np.zeros((3, *PUSH_GRID.shape), np.float32)
    for step in range(1, PUSH_STEPS + 1):
        grown = 1 - plan.displaced * (1 - step / PUSH_STEPS)  # share of the final volume
        ball = mass.share(points, grown ** (1 / 3), 2 * PUSH_GRID.step).reshape(PUSH_GRID.shape) * inside
        source = _per_step(ball, plan.displaced * plan.core_mm3 / voxel)
        source += _per_step(halo, SWELLING * plan.oedema_mm3 / voxel)
        moved = points + displacement.reshape(3, -1)
        yielding = PUSH_GRID.sample(fluid, moved).reshape(PUSH_GRID.shape) * near * inside * (1 - ball)
        flow = -_flow(laplacian, inside, source - yielding * (source.sum() / yielding.sum()))
        moved = points + flow.reshape(3, -1)
        displacement = flow + warp.displacement_at(displacement, PUSH_GRID, moved).reshape(flow.shape)
    return displacement


def _per_step(shape: np.ndarray, voxels: float) -> np.ndarray:
    """`shape` scaled so that all steps together displace that many voxels."""
    return shape * np.float32(voxels / PUSH_STEPS / shape.sum(dtype=np.float64))


def _laplacian(inside: np.ndarray) -> sparse.csr_matrix:
    """Negative Laplacian (M, M), per voxel^2, of the M voxels `inside` (X, Y, Z), without flow through their border."""
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    pairs = [_neighbours(number, axis) for axis in range(3)]
    first, second = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    links = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(inside.sum(),) * 2).tocsr()
    links = links + links.T
    return sparse.diags(np.asarray(links.sum(1)).ravel()) - links


def _neighbours(number: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all pairs of neighbours along `axis` that both have one (-1: none)."""
    lower, upper = (np.take(number, np.arange(a, number.shape[axis] - 1 + a), axis).ravel() for a in (0, 1))
    both = (lower >= 0) & (upper >= 0)
    return lower[both], upper[both]


def _flow(laplacian: sparse.csr_matrix, inside: np.ndarray, divergence: np.ndarray) -> np.ndarray:
    """Velocity (3, X, Y, Z) in mm, v = grad p with div v = `divergence`, zero outside the head."""
    demand = divergence[inside].astype(np.float64)
    demand -= demand.mean()  # what rounding leaves; a closed head has no solution otherwise
    solution, _ = cg(laplacian, -demand, rtol=1e-4, maxiter=400)
    potential = np.zeros(inside.shape)
    potential[inside] = solution
    velocity = np.zeros((3, *inside.shape), np.float32)
    for axis in range(3):
        lower, upper = _halves(inside, axis)
        below, above = _halves(potential, axis)
        faces = np.where(lower & upper, above - below, 0)  # the head's surface lets nothing through
        # A voxel's velocity is the mean of its two faces'.
        before, after = _halves(np.pad(faces, [(int(a == axis),) * 2 for a in range(3)]), axis)
        velocity[axis] = ndimage.gaussian_filter(0.5 * PUSH_GRID.step * (before + after), 0.7, mode="constant")
    return velocity


def _halves(volume: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """All but the last, and all but the first, plane along `axis`."""
    count = volume.shape[axis]
    return np.take(volume, np.arange(count - 1), axis), np.take(volume, np.arange(1, count), axis)


# oedema ---------------------------------------------------------------------------------------------------------------


def spread(plan: Plan, mass: Mass, tissue: Tissue) -> Lesion:
    """The whole tumour: `tissue` is that on `mass.grid` after the push. Fluid and what is outside stay free of it."""
    grid = mass.grid
    room = np.clip(tissue.brain - tissue.ventricles, 0, 1).reshape(grid.shape)
    level = np.minimum(mass.core, (room - 0.5) * 2 * BOX_STEP_MM)  # no mass in the ventricles or outside the brain
    core = np.clip(0.5 + level / BOX_STEP_MM, 0, 1)
    time = _travel_time(core > 0.5, tissue, mass)
    susceptible = (tissue.white + GREY_SHARE * tissue.grey).reshape(grid.shape) * (1 - core)
    limit = min(_threshold(time, susceptible, plan.oedema_mm3), FAR_MM - BOX_STEP_MM)  # beyond: not reached at all
    return Lesion(grid, level, mass.necrosis, _closed(limit - time), mass.unrest)


def _travel_time(core: np.ndarray, tissue: Tissue, mass: Mass) -> np.ndarray:
    """How far oedema has to go from `core` (X, Y, Z) bool to each voxel, in mm of white matter; float32."""
    speed = SPEED["fluid"] + SPEED["white"] * tissue.white + SPEED["grey"] * tissue.grey
    speed = speed * np.where(np.abs(tissue.origins[0]) < MIDLINE_MM, MIDLINE_SPEED, 1)
    slowness = np.exp(0.4 * mass.hindrance) / speed.reshape(core.shape)
    time = csgraph.dijkstra(_paths(slowness), indices=np.flatnonzero(core), min_only=True, limit=FAR_MM)
    time = np.minimum(time, FAR_MM).astype(np.float32).reshape(core.shape)
    return ndimage.gaussian_filter(time, 0.6)  # the facets of paths along a lattice


def _paths(slowness: np.ndarray) -> sparse.csr_matrix:
    """Travel times between all voxels and their 26 neighbours, (M, M)."""
    number = np.arange(slowness.size).reshape(slowness.shape)
    ends, times = [], []
    for shift in HALF_NEIGHBOURHOOD:
        here = tuple(slice(max(-s, 0), n - max(s, 0)) for s, n in zip(shift, slowness.shape, strict=True))
        there = tuple(slice(max(s, 0), n - max(-s, 0)) for s, n in zip(shift, slowness.shape, strict=True))
        length = BOX_STEP_MM * np.linalg.norm(shift)
        times.append((length * 0.5 * (slowness[here] + slowness[there])).ravel())
        ends.append((number[here].ravel(), number[there].ravel()))
    first, second = (np.concatenate(side) for side in zip(*ends, strict=True))
    paths = sparse.coo_matrix((np.concatenate(times), (first, second)), shape=(slowness.size,) * 2).tocsr()
    return paths + paths.T
