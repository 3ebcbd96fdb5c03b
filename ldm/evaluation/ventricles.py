"""Volume of the ventricles and of the brain, measured on an image alone.

The method is fixed beforehand and knows neither labels nor any model of this package. It is the classical one for
skull-stripped T1-weighted images: find the head; take the intensities of CSF and of the tissue around each voxel
from the image itself, so that neither gain nor bias field matters; turn each voxel into a fraction of CSF between
them (partial volume); and add the fractions up. For the ventricles the sum runs over the deep CSF connected with
the place where the template has its ventricles, inside a search region that is given in MNI space, aligned by the
position and the size of the head, and ends half-way to the cisterns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ldm.data.simulated.anatomy import Grid, template
from ldm.errors import LdmError
from ldm.evaluation.agreement import agreement

HEAD_THRESHOLD = 0.1  # of the range from background to bright tissue
SEARCH_MM = 14.0  # how far the walls may lie outside the template's ventricles
CISTERN_MM = 4.0  # how much nearer to a cistern than to the ventricles a voxel may lie and still count
SEED_MM = 1.5  # within this distance of the template's ventricles deep CSF is ventricular
CSF_NEAR_MM, CSF_DEPTH_MM, CSF_SAMPLE_MM3 = 8.0, 10.0, 500.0  # where, how deep and how much of the darkest is CSF
TISSUE_WIDTH_MM = 8.0  # standard deviation of the average that gives the tissue intensity around a voxel
# Apparent CSF fractions taken as 0 and 1, so that grey matter among white, and noise, count for nothing; the upper
# end allows for the smoothing of small ventricles. Chosen on simulated subjects kept out of the tests.
RAMP = (0.25, 0.6)


@dataclass(frozen=True)
class Atlas:
    """The template's search geometry: distances in mm on a 2 mm grid, and the head's centre and size in MNI space."""

    grid: Grid
    to_ventricles: np.ndarray  # (X, Y, Z) mm from the wall, 0 inside
    to_cisterns: np.ndarray  # (X, Y, Z) mm
    centre: np.ndarray  # (3,) mm
    size: np.ndarray  # (3,) standard deviation of the head's extent, mm


@dataclass(frozen=True)
class Segmented:
    """An image split by intensity, all (D, H, W): head mask, CSF fraction in [0, 1], distances scaled to this head."""

    head: np.ndarray
    csf: np.ndarray
    to_ventricles: np.ndarray
    to_cisterns: np.ndarray
    voxel_mm3: float


def measure_ventricles(image: np.ndarray, affine: np.ndarray) -> float:
    """Volume of the lateral and third ventricles in mm3.

    `image` is a skull-stripped T1-weighted brain (D, H, W), background constant and darkest, in any intensity
    scale; `affine` (4, 4) takes its voxels to RAS mm. Raises LdmError if the image holds no measurable head.
    """
    parts = segment(image, affine)
    region = (parts.to_ventricles < SEARCH_MM) & (parts.to_ventricles < parts.to_cisterns + CISTERN_MM)
    deep = region & (parts.csf > 0.5)
    neighbours = np.ones((3, 3, 3))
    labels, _ = ndimage.label(deep, neighbours)
    connected = np.isin(labels, np.setdiff1d(labels[deep & (parts.to_ventricles < SEED_MM)], 0))
    with_rim = ndimage.binary_dilation(connected, neighbours) & region
    return float(parts.csf[with_rim].sum(dtype=np.float64) * parts.voxel_mm3)


def measure_brain(image: np.ndarray, affine: np.ndarray) -> float:
    """Volume of grey and white matter in mm3; arguments and errors as for `measure_ventricles`.

    Coarser than the ventricles: the thin CSF of the sulci and the outer rim of the head are partial volume throughout.
    """
    parts = segment(image, affine)
    return float((1 - parts.csf)[parts.head].sum(dtype=np.float64) * parts.voxel_mm3)


def validate(images: Iterable[tuple[np.ndarray, np.ndarray]], truths_mm3: Iterable[float], seed: int = 0) -> dict:
    """Agreement of `measure_ventricles` with known volumes: see `agreement`, with `mae` as `mae_mm3`.

    `images` yields pairs (image (D, H, W), affine (4, 4)), one for each of `truths_mm3`.
    """
    measured = [measure_ventricles(image, affine) for image, affine in images]
    result = agreement(list(truths_mm3), measured, seed=seed)
    result["mae_mm3"] = result.pop("mae")
    return result


def segment(image: np.ndarray, affine: np.ndarray) -> Segmented:
    """Head and CSF fraction of a skull-stripped T1-weighted image; arguments as for `measure_ventricles`."""
    image, affine = np.asarray(image, np.float32), np.asarray(affine, np.float64)
    if image.ndim != 3 or affine.shape != (4, 4):
        raise LdmError(
            f"ventricles: image has shape {image.shape} and affine {affine.shape}; they must be (D, H, W) and (4, 4)."
        )
    if not np.isfinite(image).all():
        raise LdmError("ventricles: the image holds values that are not finite.")
    image = image - _background(image)
    head = _head(image)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    voxel_mm3 = float(np.prod(spacing))
    to_ventricles, to_cisterns = _distances(head, affine)
    csf_level = _csf_level(image, head, to_ventricles, spacing, voxel_mm3)
    tissue_level = _tissue_level(image, head, csf_level, spacing)
    apparent = (tissue_level - image) / np.maximum(tissue_level - csf_level, 1e-6)
    csf = np.clip((apparent - RAMP[0]) / (RAMP[1] - RAMP[0]), 0, 1) * head
    return Segmented(head, csf, to_ventricles, to_cisterns, voxel_mm3)


def _background(image: np.ndarray) -> float:
    return float(np.median(np.concatenate([image.take([0, -1], axis).ravel() for axis in range(3)])))


def _head(image: np.ndarray) -> np.ndarray:
    """The largest connected piece brighter than background, holes filled, (D, H, W) bool."""
    if image.max() <= 0:
        raise LdmError(
            "ventricles: nothing in the image is brighter than its background; it must be a "
            "skull-stripped T1-weighted brain with dark background."
        )
    bright = np.percentile(image[image > 0.25 * image.max()], 95)
    labels, count = ndimage.label(image > HEAD_THRESHOLD * bright)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return ndimage.binary_fill_holes(labels == sizes.argmax())


@functools.lru_cache(maxsize=1)
def _atlas() -> Atlas:
    anatomy = template()
    cisterns = anatomy.brain - anatomy.grey[0] - anatomy.white[0] - anatomy.ventricles > 0.5
    to_ventricles, to_cisterns = (
        ndimage.distance_transform_edt(~mask)[::2, ::2, ::2].astype(np.float32)
        for mask in (anatomy.ventricles > 0.5, cisterns)
    )
    grid = Grid(anatomy.grid.origin, 2.0, to_ventricles.shape)
    head = grid.points()[:, (anatomy.brain[::2, ::2, ::2] > 0.5).ravel()]
    return Atlas(grid, to_ventricles, to_cisterns, head.mean(1, keepdims=True), head.std(1, keepdims=True))


def _distances(head: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from the template's ventricles and cisterns, laid over this head."""
    atlas = _atlas()
    voxels = np.indices(head.shape, dtype=np.float32).reshape(3, -1)
    points = (affine[:3, :3] @ voxels + affine[:3, 3:]).astype(np.float32)
    inside = points[:, head.ravel()]
    size = np.maximum(inside.std(1, keepdims=True), 1.0)
    aligned = (points - inside.mean(1, keepdims=True)) / size * atlas.size + atlas.centre
    scale = float((size / atlas.size).mean())
    return tuple(
        scale * atlas.grid.sample(distance, aligned, mode="nearest").reshape(head.shape)
        for distance in (atlas.to_ventricles, atlas.to_cisterns)
    )


def _csf_level(
    image: np.ndarray, head: np.ndarray, to_ventricles: np.ndarray, spacing: np.ndarray, voxel_mm3: float
) -> float:
    """Intensity of CSF: the mean of the darkest half millilitre deep in the head, near the ventricles."""
    depth = ndimage.distance_transform_edt(head, sampling=spacing)
    values = image[(to_ventricles < CSF_NEAR_MM) & (depth > CSF_DEPTH_MM)]
    count = max(8, round(CSF_SAMPLE_MM3 / voxel_mm3))
    if len(values) < count:
        raise LdmError(
            f"ventricles: the head in the image has {int(head.sum() * voxel_mm3 / 1e3)} ml and hardly any "
            "deep part; it must be a whole skull-stripped brain, with an affine in mm."
        )
    return float(np.partition(values, count - 1)[:count].mean())


def _tissue_level(image: np.ndarray, head: np.ndarray, csf_level: float, spacing: np.ndarray) -> np.ndarray:
    """Mean intensity of the grey and white matter around each voxel, (D, H, W); follows the bias field."""
    width = TISSUE_WIDTH_MM / spacing
    threshold: float | np.ndarray = (csf_level + float(np.median(image[head]))) / 2
    for _ in range(2):  # the second time with a threshold that itself follows the bias field
        tissue = (head & (image > threshold)).astype(np.float32)
        weight = np.maximum(ndimage.gaussian_filter(tissue, width), 1e-3)
        level = ndimage.gaussian_filter(image * tissue, width) / weight
        threshold = csf_level + 0.6 * (level - csf_level)
    return level
