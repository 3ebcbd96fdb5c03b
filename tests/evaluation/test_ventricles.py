from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ldm.data.simulated import render
from ldm.errors import LdmError
from ldm.evaluation.agreement import agreement
from ldm.evaluation.ventricles import measure_brain, measure_ventricles, validate

SEED = 7  # a population that played no part in choosing the method's constants


def simulate(spacing_mm: float, n: int):
    grid = render.output_grid(spacing_mm)
    atlas = render.Atlas.build(spacing_mm)
    subjects = [render.render(atlas, grid, SEED, k) for k in range(n)]
    return [(s.image.astype(np.float32), grid.affine) for s in subjects], subjects


@pytest.fixture(scope="module")
def at_4mm():
    return simulate(4.0, 40)


def assert_follows(images, truths):
    result = validate(images, truths)
    assert result["r"] >= 0.97, result
    assert 0.9 <= result["slope"] <= 1.1, result
    assert result["mae_mm3"] < 4000
    assert result["n"] == len(truths)


def test_ventricles_follow_the_truth_at_4_mm_sharp_and_blurred(at_4mm):
    images, subjects = at_4mm
    truths = [s.ventricles_mm3 for s in subjects]
    assert_follows(images, truths)
    assert_follows([(ndimage.gaussian_filter(image, 0.5), affine) for image, affine in images], truths)


def test_ventricles_follow_the_truth_at_3_mm():
    images, subjects = simulate(3.0, 16)
    assert_follows(images, [s.ventricles_mm3 for s in subjects])


def test_brain_follows_the_truth(at_4mm):
    images, subjects = at_4mm
    result = agreement([s.brain_mm3 for s in subjects], [measure_brain(*pair) for pair in images])
    assert result["r"] > 0.95, result
    assert 0.9 < result["slope"] < 1.2, result


def test_intensity_scale_and_orientation_do_not_matter(at_4mm):
    image, affine = at_4mm[0][0]
    reference = measure_ventricles(image, affine)
    assert measure_ventricles(image * 2e-4 - 1, affine) == pytest.approx(reference, rel=1e-3)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = image.shape[0] - 1
    assert measure_ventricles(image[::-1], affine @ flip) == pytest.approx(reference, rel=1e-3)
    turned = affine[:, [2, 0, 1, 3]]
    assert measure_ventricles(image.transpose(2, 0, 1), turned) == pytest.approx(reference, rel=1e-3)


def test_what_is_no_brain_is_refused(at_4mm):
    image, affine = at_4mm[0][0]
    with pytest.raises(LdmError, match="brighter than its background"):
        measure_ventricles(np.zeros_like(image), affine)
    speck = np.zeros_like(image)
    speck[18:22, 20:24, 18:22] = 1
    with pytest.raises(LdmError, match="whole skull-stripped brain"):
        measure_ventricles(speck, affine)
    with pytest.raises(LdmError, match="not finite"):
        measure_ventricles(np.where(image > 0, image, np.nan), affine)


def test_agreement_of_a_known_line():
    asked = np.linspace(10, 20, 50)
    result = agreement(asked, 0.5 * asked + 3)
    assert result["r"] == pytest.approx(1)
    assert result["slope"] == pytest.approx(0.5)
    assert result["intercept"] == pytest.approx(3)
    assert result["mae"] == pytest.approx(np.mean(np.abs(0.5 * asked - 3)))
    noisy = asked + np.random.default_rng(0).normal(0, 2, 50)
    result = agreement(asked, noisy)
    assert result == agreement(asked, noisy)
    assert result != agreement(asked, noisy, seed=1)
    assert result["r_interval"][0] < result["r"] < result["r_interval"][1] < 1
    assert result["slope_interval"][0] < result["slope"] < result["slope_interval"][1]


@pytest.mark.parametrize(
    ("asked", "measured", "message"),
    [
        ([1, 2, 3], [1, 2], "pairs"),
        ([1, 2], [1, 2], "too few"),
        ([1, 2, np.nan], [1, 2, 3], "not finite"),
        ([1, 1, 1], [1, 2, 3], "throughout"),
    ],
)
def test_agreement_refuses_what_it_cannot_judge(asked, measured, message):
    with pytest.raises(LdmError, match=message):
        agreement(asked, measured)
