"""The template anatomy: tissue maps of the MNI152 average brain, and the ventricles derived from them.

nilearn carries the skull-stripped T1-weighted ICBM 152 average (2009a, nonlinear, symmetric) and its grey-
and white-matter probability maps at 1 mm inside its wheel, so nothing is downloaded. It carries no map of the
ventricles: `ventricle_map` finds them as the deep CSF around fixed MNI coordinates.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

MARGIN_MM = 6  # air kept around the template brain, so that blurring does not meet the border
BRAINSTEM_END_MM = (
    -66.0
)  # the template cuts the medulla at z = -72 mm; cut here, as skull stripping may, it has a margin
# CSF in the sulci of the average brain, sharpened (gain) and shifted (offset) on the logit scale: the two ends
# between which a subject's atrophy mixes. They span a parenchymal fraction of the head mask of 0.91 to 0.76.
SULCAL_GAIN = 1.4
SULCAL_OFFSETS = (-0.2, 2.6)
VENTRICLE_SEEDS_MM = ((6, 10, 10), (-6, 10, 10), (25, -45, 10), (-25, -45, 10), (0, -10, -4))
TEXTURE_CLASSES = (0.66, 0.875, 0.28)  # T1 intensity of grey, white and CSF in the template (max = 1)


@dataclass(frozen=True)
class Grid:
    """A regular axis-aligned grid in world space: voxel (0, 0, 0) is at `origin` (mm), `step` mm apart."""

    origin: tuple[float, float, float]
    step: float
    shape: tuple[int, int, int]

    @property
    def affine(self) -> np.ndarray:
        affine = np.diag([self.step, self.step, self.step, 1.0])
        affine[:3, 3] = self.origin
        return affine

    def points(self) -> np.ndarray:
        """World coordinates of every voxel, (3, N) float32 in mm, in C order."""
        axes = [o + self.step * np.arange(n) for o, n in zip(self.origin, self.shape, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1).astype(np.float32)

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Which of the world `points` (3, N) lie inside the grid, (N,) bool."""
        low = np.asarray(self.origin, np.float32)[:, None]
        extent = np.float32(self.step) * (np.asarray(self.shape, np.float32)[:, None] - 1)
        return ((points >= low) & (points <= low + extent)).all(0)

    def sample(self, volume: np.ndarray, points: np.ndarray, mode: str = "constant") -> np.ndarray:
        """Linear interpolation of `volume` on this grid at world `points` (3, N); returns (N,) float32."""
        voxels = (points - np.asarray(self.origin, np.float32)[:, None]) / np.float32(self.step)
        return ndimage.map_coordinates(volume, voxels, order=1, mode=mode, output=np.float32)


@dataclass(frozen=True)
class Anatomy:
    """Tissue maps of the template on one grid, each (X, Y, Z) float32.

    `brain` is the head mask; `grey` and `white` hold the maps at the two ends of atrophy (index 0: narrow sulci,
    1: wide sulci); `ventricles` the ventricular CSF; `texture` what the T1 template shows beyond tissue class.
    Whatever of `brain` is neither grey, white nor ventricle is CSF outside the ventricles.
    """

    grid: Grid
    brain: np.ndarray
    grey: tuple[np.ndarray, np.ndarray]
    white: tuple[np.ndarray, np.ndarray]
    ventricles: np.ndarray
    texture: np.ndarray

    def at(self, blur_mm: float, factor: int) -> Anatomy:
        """Low-pass every map (Gaussian, standard deviation `blur_mm`) and keep every `factor`-th voxel."""
        grid = Grid(self.grid.origin, self.grid.step * factor, tuple(-(-n // factor) for n in self.grid.shape))

        def reduce(volume: np.ndarray) -> np.ndarray:
            if blur_mm > 0:
                volume = ndimage.gaussian_filter(volume, blur_mm / self.grid.step, mode="constant", truncate=3)
            return np.ascontiguousarray(volume[::factor, ::factor, ::factor], np.float32)

        return Anatomy(
            grid,
            reduce(self.brain),
            tuple(map(reduce, self.grey)),
            tuple(map(reduce, self.white)),
            reduce(self.ventricles),
            reduce(self.texture),
        )


def ventricle_map(csf: np.ndarray, origin: tuple[float, float, float]) -> np.ndarray:
    """Ventricular CSF fraction of a CSF map in MNI space on a 1 mm grid with `origin` (mm); same shape, float32.

    Lateral ventricles (frontal horns, bodies, atria) and third ventricle: the connected deep CSF (fraction > 0.5)
    around seeds in them, grown by 3 mm to take in its partial-volume rim, inside a region in MNI coordinates that
    leaves out the quadrigeminal, pericallosal and suprasellar cisterns. Temporal horns and fourth ventricle, which
    the average template blurs away or separates, are not part of it.
    """
    x, y, z = np.meshgrid(
        *(o + np.arange(n) for o, n in zip(origin, csf.shape, strict=True)), indexing="ij", sparse=True
    )
    x = np.abs(x)
    quadrigeminal = (y < -20) & (x < np.minimum(14, 3 + 0.6 * (-20 - y))) & ((z < 16) | (y < -36))
    pericallosal = ((x < 5) & (y > 22)) | ((x < 7) & (z > 25)) | ((x < 4) & (z > 19) & (y > 12))
    below_foramen = (x < 6) & (z < -2)
    lateral = (x < 42) & (y > -58) & (y < 34) & (z > -6) & (z < 32)
    third = (x < 6) & (y > -22) & (y < 6) & (z > -13) & (z < 18)
    region = (lateral & ~quadrigeminal & ~pericallosal & ~below_foramen) | third
    labels, _ = ndimage.label(region & (csf > 0.5))
    seeds = {
        int(labels[tuple(round(s - o) for s, o in zip(seed, origin, strict=True))]) for seed in VENTRICLE_SEEDS_MM
    } - {0}
    grown = ndimage.binary_dilation(np.isin(labels, list(seeds)), iterations=3) & region
    return np.where(grown, csf, 0).astype(np.float32)


@functools.lru_cache(maxsize=1)
def template() -> Anatomy:
    """The MNI152 anatomy at 1 mm from the files inside nilearn (about 4 s; kept for the process)."""
    from nilearn import datasets  # takes seconds to import, and only generation needs it

    image = datasets.load_mni152_template(resolution=1)
    loaders = (
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
        datasets.load_mni152_brain_mask,
    )
    t1, grey, white, brain = (i.get_fdata(dtype=np.float32) for i in (image, *(f(resolution=1) for f in loaders)))
    brain = ndimage.binary_fill_holes(brain > 0.5)
    brain[:, :, : round(BRAINSTEM_END_MM - image.affine[2, 3])] = False
    box = tuple(
        slice(max(s.start - MARGIN_MM, 0), s.stop + MARGIN_MM) for s in ndimage.find_objects(brain.astype(np.uint8))[0]
    )
    t1, grey, white, brain = (np.where(brain, v, 0)[box] for v in (t1, grey, white, brain.astype(np.float32)))
    corner = image.affine[:3, 3] + [s.start for s in box]
    grid = Grid(tuple(float(c) for c in corner), 1.0, brain.shape)

    tissue = np.clip(grey + white, 1e-6, 1.0)
    csf = np.clip(1 - grey - white, 0, 1) * brain
    raw = ventricle_map(csf, grid.origin)
    # The average over many brains blurs the ventricular wall; a single brain has a sharp one.
    ventricles = np.clip((raw - 0.2) / 0.6, 0, 1)
    texture = (t1 - TEXTURE_CLASSES[0] * grey - TEXTURE_CLASSES[1] * white - TEXTURE_CLASSES[2] * csf) * brain
    texture *= 1 - ventricles
    maps = []
    for offset in SULCAL_OFFSETS:
        clipped = np.clip(csf, 1e-4, 1 - 1e-4)
        odds = (clipped / (1 - clipped)) ** SULCAL_GAIN * np.exp(offset)
        fluid = np.where(raw > 0, ventricles, odds / (1 + odds))
        scale = (1 - fluid) / tissue * brain
        maps.append((grey * scale, white * scale))
    (grey_narrow, white_narrow), (grey_wide, white_wide) = maps
    return Anatomy(grid, brain, (grey_narrow, grey_wide), (white_narrow, white_wide), ventricles, texture)
