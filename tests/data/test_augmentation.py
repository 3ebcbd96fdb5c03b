"""Augmentation: reproducible, rigid, and honest about how much it enlarged the anatomy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.data.augmentation import Augmentation
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError


def ball(shape: tuple[int, ...], radius: float, spacing: tuple[float, ...] | None = None) -> torch.Tensor:
    """(1, *shape) with a soft edge, so that its sum measures its volume."""
    spacing = spacing or (1.0,) * len(shape)
    axes = [(torch.arange(n) - (n - 1) / 2) * d for n, d in zip(shape, spacing, strict=True)]
    distance = torch.linalg.norm(torch.stack(torch.meshgrid(*axes, indexing="ij")), dim=0)
    return (radius + 0.5 - distance).clamp(0, 1)[None]


@pytest.mark.parametrize(("shape", "power"), [((48, 40, 44), 3), ((64, 60), 2)])
def test_scale_changes_a_measured_volume_and_the_covariates_follow(shape: tuple[int, ...], power: int) -> None:
    schema = CovariateSchema.from_config(
        {
            "age": {"kind": "continuous", "unit": "years", "range": [20, 80]},
            "size": {
                "kind": "continuous",
                "range": [0, 9000],
                "scales_with": "volume" if power == 3 else "area",
            },
        }
    )
    image = ball(shape, 11)
    before = float(image.sum())
    augment = Augmentation(scale=0.3, rotate=10)
    factors = []
    for seed in range(6):
        changed, labels, s = augment(image, (image[0] > 0.5).to(torch.uint8), seed)
        assert float(changed.sum()) / before == pytest.approx(s**power, rel=0.02)
        assert int(labels.sum()) / int((image > 0.5).sum()) == pytest.approx(s**power, rel=0.06)
        vector = schema.rescale(schema.encode({"age": 50, "size": before}), s)
        assert schema.decode(vector) == pytest.approx({"age": 50, "size": float(changed.sum())}, rel=0.02)
        factors.append(s)
    assert min(factors) < 0.95
    assert max(factors) > 1.05


def test_the_seed_decides_everything() -> None:
    image = torch.rand(2, 12, 10, 9)
    augment = Augmentation((0, 2), scale=0.1, shift=2, rotate=8, gamma=0.2, brightness=0.1)
    first, again, other = augment(image, None, 7), augment(image, None, 7), augment(image, None, 8)
    assert torch.equal(first[0], again[0])
    assert first[2] == again[2]
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == image.shape
    assert first[0].min() >= 0
    assert first[0].max() <= 1


def test_a_rotation_is_rigid_on_anisotropic_voxels() -> None:
    spacing = (1.0, 1.0, 3.0)
    axes = [(torch.arange(n) - (n - 1) / 2) * d for n, d in zip((40, 40, 16), spacing, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    image = torch.exp(-(x**2 + y**2 + z**2) / (2 * 7**2))[None]
    changed, _, s = Augmentation(rotate=45)(image, None, 3, spacing)
    assert s == 1
    assert float((changed - image).abs().max()) < 0.04  # a ball is the same from every side
    sheared, _, _ = Augmentation(rotate=45)(image, None, 3)
    assert float((sheared - image).abs().max()) > 0.2


def test_a_shift_moves_towards_the_drawn_side_by_at_most_its_size() -> None:
    image = ball((30, 30), 5)
    axis = torch.arange(30.0)
    for seed in range(4):
        changed, _, _ = Augmentation(shift=3, scale=0.2, rotate=20)(image, None, seed)
        shift = -3 + 6 * torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[1:]
        rows = (changed[0].sum(1) * axis).sum() / changed.sum() - 14.5
        columns = (changed[0].sum(0) * axis).sum() / changed.sum() - 14.5
        assert (float(rows), float(columns)) == pytest.approx(tuple(shift.tolist()), abs=0.05)


def test_labels_go_with_the_image() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 4, (8, 8, 8), dtype=np.uint8)).repeat_interleave(4, 0)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = labels[None].float() / 3
    augment = Augmentation((0, 1, 2), scale=0.1, shift=2, rotate=15)
    for seed in range(3):
        moved, moved_labels, _ = augment(image, labels, seed)
        assert moved_labels.dtype == torch.uint8
        assert float((moved[0] * 3 - moved_labels).abs().mean()) < 0.25
        assert set(moved_labels.unique().tolist()) <= {0, 1, 2, 3}


def test_what_comes_from_outside_is_background() -> None:
    image = torch.full((1, 16, 16), 0.5)
    moved, _, _ = Augmentation(rotate=45)(image, None, 1, value_range=(-1.0, 1.0))
    assert float(moved.min()) == pytest.approx(-1.0)
    z_scored, _, _ = Augmentation(rotate=45)(torch.rand(1, 16, 16) - 3, None, 1, value_range=None)
    assert z_scored.min() >= -3.001


def test_nothing_changes_by_default_and_illegal_settings_are_named() -> None:
    image = torch.rand(1, 8, 8)
    assert torch.equal(Augmentation()(image, None, 0)[0], image)
    with pytest.raises(LdmError, match="Did you mean 'rotate'"):
        Augmentation.from_config({"rotat": 3})
    with pytest.raises(LdmError, match=r"augment\.scale"):
        Augmentation(scale=-0.1)
    with pytest.raises(LdmError, match="flip_axes"):
        Augmentation(flip_axes=(2,))(image, None, 0)
    with pytest.raises(LdmError, match=r"augment\.gamma"):
        Augmentation(gamma=0.1)(image, None, 0, value_range=None)


@pytest.mark.parametrize(("shape", "spacing"), [((40, 30), None), ((40, 36, 32), (1.0, 1.2, 1.5))])
def test_a_change_is_undone(shape, spacing) -> None:
    axes = [torch.exp(-((torch.arange(n) - 0.4 * n) ** 2) / 32) for n in shape]  # smooth, and off the centre
    image, augment = math.prod(torch.meshgrid(*axes, indexing="ij"))[None], Augmentation((0, 1), 0.2, 2, 20)
    for seed in range(4):
        change = augment.draw(shape, seed, spacing)
        moved = change.moved(image, "bilinear")
        assert (moved - image).abs().max() > 0.3
        assert (change.moved_back(moved) - image).abs().max() < 0.08  # interpolated twice


def test_a_seed_stands_for_the_change_that_it_always_stood_for() -> None:
    image = torch.arange(9 * 8 * 7).reshape(1, 9, 8, 7).remainder(97) / 96
    augment, labels = Augmentation((0, 2), 0.2, 2, 20, 0.3, 0.2), (image[0] > 0.5).to(torch.uint8)
    changed, moved, s = augment(image, labels, 3, (1, 1, 2))
    stored = 0.8437624864637189, 93.2221908569336, 115
    assert (s, float(changed.sum()), int(moved.sum())) == pytest.approx(stored, rel=1e-5)


def test_a_sequence_is_missing_as_often_as_asked_and_what_else_changes_is_the_same() -> None:
    channels, settings = ("T1", "FLAIR", "T1ce"), {"scale": 0.1, "brightness": 0.1}
    augment = Augmentation.from_config(
        settings | {"missing": {"T1": "FLAIR", "T1ce": "FLAIR"}, "missing_share": 0.3}, channels
    )
    image = torch.rand(3, 12, 12)
    counts = torch.zeros(3)
    for seed in range(400):
        plain, _, _ = Augmentation(**settings)(image, None, seed)
        changed, _, _ = augment(image, None, seed)
        assert torch.equal(changed[1], plain[1])
        for channel in (0, 2):
            replaced = torch.equal(changed[channel], plain[1])
            counts[channel] += replaced
            assert replaced or torch.equal(changed[channel], plain[channel])
    counts /= 400
    assert 0.22 < counts[0] < 0.38
    assert 0.22 < counts[2] < 0.38
    assert counts[1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"missing": {"T1": "FLAIR"}}, "missing and missing_share go together"),
        ({"missing_share": 0.1}, "missing and missing_share go together"),
        ({"missing": ["T1"], "missing_share": 0.1}, "not a mapping"),
        ({"missing": {"T1": "FLAIR"}, "missing_share": 1.5}, "1.5 is not a share"),
        ({"missing": {"T1": "FLIAR"}, "missing_share": 0.1}, r"no image 'FLIAR'. Did you mean 'FLAIR'"),
        ({"missing": {"T2": "FLAIR"}, "missing_share": 0.1}, r"no image 'T2'.* Legal: T1, FLAIR"),
    ],
)
def test_missing_sequences_that_cannot_be_are_named(settings, message) -> None:
    with pytest.raises(LdmError, match=message):
        Augmentation.from_config(settings, ("T1", "FLAIR"))
