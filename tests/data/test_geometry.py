"""Geometry: what lies at a world coordinate stays there on the way in, and comes back on the way out."""

from __future__ import annotations

import functools
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm.data.geometry import Geometry, _antialiased, _first_centre, _resampled, check_shape, smallest_shape
from ldm.errors import LdmError


def scanner_affine(axcodes: str, spacing: tuple[float, ...], degrees: float = 0.0) -> np.ndarray:
    """Affine of a (possibly oblique) scan with these axis codes, off the world's origin."""
    ornt = nib.orientations.axcodes2ornt(axcodes)
    axes = np.zeros((3, 3))
    for voxel_axis, (world_axis, flip) in enumerate(ornt):
        axes[int(world_axis), voxel_axis] = flip * spacing[voxel_axis]
    rotation = Rotation.from_euler("xyz", [degrees, -degrees / 2, degrees / 3], degrees=True).as_matrix()
    return nib.affines.from_matvec(rotation @ axes, [31.5, -20.25, 7.0])


def world_image(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """(1, *shape) samples of one smooth function of the world coordinate."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    x, y, z = np.moveaxis(nib.affines.apply_affine(affine, index), -1, 0)
    return (np.sin(x / 14) + np.cos(y / 17 + 0.4) + np.sin(z / 11 - 0.2))[None].astype(np.float32)


def cut(array: np.ndarray, margin: int) -> np.ndarray:
    return array[(slice(None), *[slice(margin, -margin)] * 3)]


GRIDS = [
    ("RAS", (1.0, 1.0, 1.0), 0.0, (33, 40, 27)),
    ("LPS", (0.9, 0.9, 3.0), 0.0, (45, 51, 17)),
    ("PIR", (1.0, 1.2, 0.8), 0.0, (39, 33, 41)),
    ("ASL", (2.0, 1.0, 1.5), 17.0, (21, 37, 29)),
    ("IPL", (1.1, 1.3, 0.7), -25.0, (30, 29, 47)),
]


@pytest.mark.parametrize(("axcodes", "spacing", "degrees", "shape"), GRIDS)
@pytest.mark.parametrize("target", [None, 1.5])
def test_world_coordinates_survive_the_way_in(axcodes, spacing, degrees, shape, target) -> None:
    affine = scanner_affine(axcodes, spacing, degrees)
    natural = Geometry.plan(shape, affine, "RAS", target)
    # Crops the first axis, pads the others, by odd and even numbers.
    first, second, third = natural.resampled_shape
    geometry = natural.with_shape((first - 3, second + 5, third + 4))

    model = geometry.forward(world_image(shape, affine))

    assert model.shape == (1, *geometry.shape)
    assert "".join(nib.aff2axcodes(geometry.affine)) == "RAS"
    held = geometry.forward(np.ones((1, *shape), np.float32)) > 0.5
    inner = held & np.roll(held, 3, 2) & np.roll(held, -3, 2) & np.roll(held, 3, 3) & np.roll(held, -3, 3)
    inner[:, :3] = inner[:, -3:] = False
    expected = world_image(geometry.shape, geometry.affine)
    # Linear interpolation of a function with second derivative 1/11^2 over 3 mm voxels, and anti-aliasing.
    assert np.abs(model - expected)[inner].max() < (1e-5 if target is None else 0.02)


@pytest.mark.parametrize(("axcodes", "spacing", "degrees", "shape"), GRIDS)
@pytest.mark.parametrize("target", [None, 1.5])
def test_undo_returns_to_the_original_grid(axcodes, spacing, degrees, shape, target) -> None:
    affine = scanner_affine(axcodes, spacing, degrees)
    image = world_image(shape, affine)
    geometry = Geometry.plan(shape, affine, "RAS", target)
    geometry = geometry.with_shape(smallest_shape([geometry.resampled_shape], 8))

    back = geometry.undo(geometry.forward(image))

    assert back.shape == image.shape
    np.testing.assert_array_equal(np.array(geometry.original_affine), affine)
    if target is None:
        np.testing.assert_array_equal(back, image)
    else:
        assert np.abs(cut(back - image, 4)).max() < 0.03


def test_a_landmark_keeps_its_world_coordinate() -> None:
    affine = scanner_affine("PIL", (0.9, 1.1, 2.5), 12.0)
    shape, voxel = (50, 60, 31), (20, 33, 12)
    image = np.zeros((1, *shape), np.float32)
    image[(0, *voxel)] = 1.0
    geometry = Geometry.plan(shape, affine, "RAS", 1.0, (64, 48, 56))
    model = geometry.forward(image)[0]
    weights = np.stack(np.meshgrid(*[np.arange(n) for n in model.shape], indexing="ij"), -1)
    centre = (weights * model[..., None]).sum((0, 1, 2)) / model.sum()
    there = nib.affines.apply_affine(geometry.affine, centre)
    np.testing.assert_allclose(there, nib.affines.apply_affine(affine, voxel), atol=0.25)


def test_a_ball_keeps_its_volume_in_mm3() -> None:
    """Labels take the largest share, and field of view and spacing belong together."""
    affine = scanner_affine("LPS", (0.8, 0.8, 2.0))
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (80, 80, 32)], indexing="ij"), -1)
    centre = nib.affines.apply_affine(affine, (39.5, 39.5, 15.5))
    ball = np.linalg.norm(nib.affines.apply_affine(affine, index) - centre, axis=-1) < 20
    geometry = Geometry.plan(ball.shape, affine, "RAS", 1.25)
    model = geometry.forward(ball[None].astype(np.uint8) * 7, labels=True)
    assert set(np.unique(model)) == {0, 7}
    assert (model > 0).sum() * 1.25**3 == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.01)


def test_anti_aliasing_removes_what_the_new_voxels_cannot_hold() -> None:
    stripes = np.zeros((1, 32, 32, 32), np.float32)
    stripes[:, ::2] = 1.0
    coarse = Geometry.plan((32, 32, 32), np.eye(4), "RAS", 3.0).forward(stripes)
    assert np.abs(coarse[:, 2:-2] - 0.5).max() < 0.1


def test_two_dimensional_images_only_get_a_box() -> None:
    image = np.arange(5 * 9, dtype=np.float32).reshape(1, 5, 9) + 1
    geometry = Geometry.plan((5, 9), shape=(8, 4))
    model = geometry.forward(image, fill=-1.0)
    np.testing.assert_array_equal(model[0, 2:7], image[0, :, 2:6])
    back = geometry.undo(model, fill=-1.0)
    np.testing.assert_array_equal(back[0, :, 2:6], image[0, :, 2:6])
    assert (back[0, :, [0, 1, 6, 7, 8]] == -1).all()


def test_description_survives_json() -> None:
    affine = scanner_affine("PIR", (0.9, 1.1, 2.5), 12.0)
    for geometry in (
        Geometry.plan((9, 8, 7), affine, "ras", 1.3, (8, 16, 24), 4),
        Geometry.plan((5, 9), shape=(8, 8)),
    ):
        assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_illegal_settings_say_what_is_legal() -> None:
    with pytest.raises(LdmError, match=r"axis 1: 100 is not a multiple of 16, nearest legal: 96 or 112"):
        check_shape((80, 100, 80), 16)
    assert check_shape((80, 96, 40), (16, 16, 8)) == (80, 96, 40)
    for orientation in ("RAX", "RLS", "RA"):
        with pytest.raises(LdmError, match=r"data\.orientation"):
            Geometry.plan((4, 4, 4), np.eye(4), orientation)
    with pytest.raises(LdmError, match="spacing_mm"):
        Geometry.plan((4, 4, 4), np.eye(4), "RAS", (1.0, 0.0, 1.0))


def of_largest_share(labels, shape, ratio):
    """Every label resampled over the whole grid, in float64; and by how much the largest share wins."""
    offset = [_first_centre(old, new, r) for old, new, r in zip(labels.shape, shape, ratio, strict=True)]
    values = np.unique(labels)
    masks = (_antialiased((labels == value).astype(np.float64), ratio) for value in values)
    resample = functools.partial(ndimage.affine_transform, offset=offset, output_shape=shape, order=1, mode="nearest")
    shares = np.stack([resample(mask, np.array(ratio)) for mask in masks])
    ordered = np.sort(shares, axis=0)
    return values[shares.argmax(0)], ordered[-1] - ordered[-2]


@pytest.mark.parametrize(
    ("old", "new", "ratio"),
    [
        ((64, 60), (32, 30), (2.0, 2.0)),
        ((40, 41, 30), (50, 49, 21), (0.8, 0.83, 1.43)),
    ],
)
def test_a_label_map_takes_the_label_of_the_largest_share(old, new, ratio):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(5, *old)), [0] + [2.5] * len(old))
    labels = noise.argmax(0).astype(np.uint8)
    expected, lead = of_largest_share(labels, new, ratio)
    found = _resampled(labels[None], new, ratio, labels=True)[0]
    np.testing.assert_array_equal(found[lead > 1e-3], expected[lead > 1e-3])


def test_a_label_map_at_half_the_size_does_not_move():
    """The nearest of two pixels as near would always be the one on the same side."""
    rows, columns = np.indices((128, 128))
    disc = ((rows - 60.3) ** 2 + (columns - 70.8) ** 2 < 15**2).astype(np.uint8)
    half = _resampled(disc[None], (64, 64), (2.0, 2.0), labels=True)
    back = _resampled(half, (128, 128), (0.5, 0.5), labels=True)[0]
    np.testing.assert_allclose(np.argwhere(back).mean(0), np.argwhere(disc).mean(0), atol=0.1)
    assert back.sum(dtype=int) == pytest.approx(disc.sum(dtype=int), rel=0.03)
