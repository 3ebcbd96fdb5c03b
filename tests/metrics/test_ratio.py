"""Ratios of Fréchet distances: known answers, and an interval that holds them."""

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.metrics.frechet import frechet_distance
from ldm.metrics.ratio import EXTRAPOLATED, FIXED, cross_validated, extrapolated, frechet_ratios, interval, numbered


def gaussian(rng, n, features=2, shift=0.0):
    return shift + rng.standard_normal((n, features))


def test_the_extrapolated_distance_is_the_closed_form_without_the_bias_of_few_images():
    rng = np.random.default_rng(0)
    halves = np.arange(40) % 2
    values = []
    for _ in range(100):
        a, b = gaussian(rng, 40, 4), gaussian(rng, 40, 4, shift=0.5)
        values.append((frechet_distance(a, b), extrapolated(a, b, halves, halves)))
    biased, free = np.mean(values, 0)
    assert biased > 1.2  # the true distance is 4 * 0.5^2 = 1
    assert free == pytest.approx(1.0, abs=0.1)


def test_the_ratio_is_extrapolated_where_the_floor_is_told_from_zero():
    rng = np.random.default_rng(1)
    sets = {"real": gaussian(rng, 400, shift=0.5), "samples": gaussian(rng, 400, shift=1.0)}
    result = frechet_ratios(gaussian(rng, 800), sets, "real")
    assert result["method"] == EXTRAPOLATED
    assert result["groups"] == 40
    low, high = result["ratios"]["samples"]["interval"]
    assert low < 4 < high  # (2 * 1.0^2) / (2 * 0.5^2)
    assert result["ratios"]["real"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert result["floor"]["interval"][0] > 2  # the held-out images are another distribution than the reference


def test_the_ratio_of_equal_distributions_is_one_at_a_fixed_number():
    rng = np.random.default_rng(2)
    sets = {"real": gaussian(rng, 40), "samples": gaussian(rng, 40), "worse": gaussian(rng, 40, shift=2.0)}
    result = frechet_ratios(gaussian(rng, 100), sets, "real")
    assert (result["method"], result["n"]) == (FIXED, 40)
    low, high = result["ratios"]["samples"]["interval"]
    assert low < 1 < high
    assert result["ratios"]["worse"]["interval"][0] > 1


def test_the_interval_holds_the_true_ratio_at_least_as_often_as_it_says():
    rng = np.random.default_rng(3)

    def draw():
        return gaussian(rng, 60), {"real": gaussian(rng, 20), "samples": gaussian(rng, 20, shift=0.6)}

    distances = []
    for _ in range(300):
        reference, sets = draw()
        distances.append([frechet_distance(one, reference) for one in sets.values()])
    floor, samples = np.mean(distances, 0)
    held = 0
    for _ in range(60):
        low, high = frechet_ratios(*draw(), "real")["ratios"]["samples"]["interval"]
        held += low <= samples / floor <= high
    assert held / 60 > 0.9


def test_the_cross_validated_floor_is_that_of_real_images_and_surer_than_one_set():
    rng = np.random.default_rng(6)
    single, many = [], []
    for _ in range(60):
        reference, real = gaussian(rng, 60, 1), gaussian(rng, 20, 1)
        single.append(frechet_distance(real, reference))
        many.append(cross_validated(real, reference, np.arange(20), np.arange(60))[0])
    # one feature: (mean - mean')^2 is 1/20 + 1/60 on average, (std - std')^2 half as much
    assert np.mean(many) == pytest.approx(1.5 * (1 / 20 + 1 / 60), rel=0.1)
    assert np.std(many) < 0.4 * np.std(single)


def test_clearly_worse_images_are_told_from_real_ones_even_where_one_set_is_near_by_chance():
    rng = np.random.default_rng(7)
    lows = []
    for _ in range(20):
        sets = {"real": gaussian(rng, 30, 1), "samples": gaussian(rng, 30, 1, shift=1.5)}
        lows.append(frechet_ratios(gaussian(rng, 90, 1), sets, "real")["ratios"]["samples"]["interval"][0])
    assert min(lows) > 3


def test_the_jackknife_of_a_mean_is_the_interval_of_students_t():
    x = np.random.default_rng(4).standard_normal(12)
    low, high = interval(x.mean(), np.array([np.delete(x, i).mean() for i in range(12)]))
    assert (high - low) / 2 == pytest.approx(2.201 * x.std(ddof=1) / np.sqrt(12), rel=1e-3)  # t of 11 degrees


def test_all_images_of_a_subject_are_left_out_together():
    subjects = ["b", "a", "b", "c", "a"]
    assert numbered(subjects, 5).tolist() == [1, 0, 1, 2, 0]
    rng = np.random.default_rng(5)
    reference, real, worse = gaussian(rng, 60), gaussian(rng, 15), gaussian(rng, 15, shift=1.0)
    repeated = {name: np.repeat(x, 3, 0) for name, x in (("real", real), ("worse", worse))}
    widths = [
        np.ptp(np.log(frechet_ratios(reference, repeated, "real", whose)["ratios"]["worse"]["interval"]))
        for whose in (None, np.repeat(np.arange(15), 3))
    ]
    assert widths[1] > 1.2 * widths[0]  # three images of one person are not three people


def test_two_scans_of_one_person_are_in_one_half():
    """In both halves they would make a half as good as the whole, and the distance would keep its bias."""
    rng, whose = np.random.default_rng(7), np.repeat(np.arange(60), 2)
    reference, real, samples = (np.repeat(gaussian(rng, 60, 2, s), 2, axis=0) for s in (0.0, 0.6, 0.9))
    apart, mixed = numbered(whose, 120) % 2, np.arange(120) % 2
    biased = extrapolated(real, reference, mixed, mixed)
    assert biased == pytest.approx(frechet_distance(real, reference), rel=0.02)  # no correction
    free = {name: extrapolated(one, reference, apart, apart) for name, one in (("real", real), ("samples", samples))}
    assert free["real"] < 0.98 * biased
    found = frechet_ratios(reference, {"real": real, "samples": samples}, "real", whose, whose)
    assert found["method"] == EXTRAPOLATED
    assert found["ratios"]["samples"]["value"] == pytest.approx(free["samples"] / free["real"])


@pytest.mark.parametrize("counts", [(4, 4, 4), (20, 20, 20), (1, 1, 1, 9), (12, 1, 12, 1)], ids=str)
def test_few_subjects_are_compared_without_extrapolation(counts):
    """Three groups empty a half when one of them is left out, and a half of few images has no covariance."""
    rng, whose = np.random.default_rng(8), np.repeat(np.arange(len(counts)), counts)
    real, worse = gaussian(rng, len(whose), shift=0.5), gaussian(rng, len(whose), shift=2.0)
    for few in ({"subjects": whose}, {"reference_subjects": np.arange(80) % 3}):
        found = frechet_ratios(gaussian(rng, 80), {"real": real, "worse": worse}, "real", **few)
        assert found["method"] == FIXED
        assert found["ratios"]["worse"]["value"] > 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LdmError, match="sets of one size"):
        frechet_ratios(np.zeros((9, 2)), {"real": np.zeros((5, 2)), "x": np.zeros((6, 2))}, "real")
    with pytest.raises(LdmError, match="at least 3 subjects in every set, not 2"):
        frechet_ratios(np.zeros((9, 2)), {"real": np.zeros((4, 2))}, "real", ["a", "a", "b", "b"])
    with pytest.raises(LdmError, match="2 subjects are given for 4 images"):
        frechet_ratios(np.zeros((9, 2)), {"real": np.zeros((4, 2))}, "real", ["a", "b"])
