"""Known answers of the measures of label maps and of their uncertainty."""

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.metrics import segmentation as measures


def disc(radius, centre=(16, 16), size=32):
    rows, columns = np.indices((size, size))
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


HALF = np.arange(8) < 4  # of a line of eight voxels
FIRST = np.arange(8) < 2
NOTHING = np.zeros(8, bool)


@pytest.mark.parametrize(
    ("found", "truth", "dice", "jaccard"),
    [
        (HALF, HALF, 1, 1),
        (FIRST, HALF, 4 / 6, 2 / 4),
        (~HALF, HALF, 0, 0),
        (NOTHING, HALF, 0, 0),
        (NOTHING, NOTHING, 1, 1),
    ],
)
def test_overlap(found, truth, dice, jaccard):
    assert measures.dice(found, truth) == pytest.approx(dice)
    assert measures.jaccard(found, truth) == pytest.approx(jaccard)
    with pytest.raises(LdmError, match=r"\(8,\) and \(7,\)"):
        measures.dice(found, truth[1:])


def test_surface_distance_is_in_mm():
    moved = disc(6, (16, 19))
    assert measures.hd95(disc(6), disc(6)) == 0
    assert measures.hd95(moved, disc(6)) == pytest.approx(3, abs=0.3)
    assert measures.hd95(moved, disc(6), (2.0, 2.0)) == pytest.approx(2 * measures.hd95(moved, disc(6)))
    nothing = np.zeros((32, 32), bool)
    assert np.isnan(measures.hd95(nothing, disc(6)))
    assert np.isnan(measures.hd95(nothing, nothing))  # there is no surface: 0 would be earned by finding nothing


def test_energy_distance():
    """Two members, one truth: 2 (0 + 1/2) / 2 - (0 + 1/2 + 1/2 + 0) / 4 - 0."""
    assert measures.generalised_energy_distance([HALF, HALF], [HALF]) == 0
    assert measures.generalised_energy_distance([HALF, FIRST], [HALF]) == pytest.approx(0.25)
    assert measures.generalised_energy_distance([HALF, FIRST], [FIRST, HALF]) == pytest.approx(0)
    assert measures.generalised_energy_distance([~HALF], [HALF]) == pytest.approx(2)


def test_calibration():
    """Voxels of which 0.9 is said are inside in half of the cases: off by 0.4, those of 0.1 by 0.1."""
    probability = np.array([0.9] * 4 + [0.1] * 4)
    truth = np.array([1, 1, 0, 0, 0, 0, 0, 0], bool)
    bins = measures.reliability(probability, truth)
    assert bins["count"] == [0, 4, 0, 0, 0, 0, 0, 0, 0, 4]
    assert bins["frequency"][9] == pytest.approx(0.5)
    assert measures.expected_calibration_error(bins) == pytest.approx((0.4 + 0.1) / 2)
    said = np.random.default_rng(0).random(200_000)
    honest = measures.reliability(said, np.random.default_rng(1).random(200_000) < said)
    assert measures.expected_calibration_error(honest) < 0.01
    assert measures.reliability(np.ones(3), np.ones(3, bool))["count"][-1] == 3


def test_rank_correlation_and_rejection():
    """An error that is the most uncertain voxel goes first; one that is the least, last."""
    truth, found = HALF.copy(), HALF.copy()
    found[7] = True
    knows, does_not = np.arange(8.0), -np.arange(8.0)
    shares = (0.0, 1 / 4, 1 / 2)  # of four voxels
    assert measures.rejection_curve(found, truth, knows, 4, shares) == pytest.approx([8 / 9, 1, 1])
    assert measures.rejection_curve(found, truth, does_not, 4, shares) == pytest.approx([8 / 9, 6 / 7, 4 / 5])
    gone = measures.rejection_curve(FIRST, FIRST, does_not, 4, (0.0, 1 / 2))
    assert gone == pytest.approx([1, np.nan], nan_ok=True)  # nothing is left that could agree
    assert measures.spearman(knows, knows**3) == pytest.approx(1)
    assert measures.spearman(does_not, knows) == pytest.approx(-1)
    assert np.isnan(measures.spearman(np.zeros(8), knows))


def test_the_interval_is_over_patients():
    values = np.random.default_rng(0).normal(0.7, 0.1, 100)
    found = measures.mean_of_patients([*values, np.nan])
    half = (found["interval"][1] - found["interval"][0]) / 2
    assert found["n"] == 100
    assert found["value"] == pytest.approx(values.mean())
    assert half == pytest.approx(1.96 * values.std() / 10, rel=0.1)
    assert np.isnan(measures.mean_of_patients([np.nan])["value"])
    assert measures.mean_of_patients([0.7, np.nan]) == {"value": 0.7, "interval": None, "n": 1}  # nobody knows a spread


def test_the_interval_of_a_rank_correlation_is_over_patients():
    """Eight patients: within each all images say the same, so that many images make the interval no narrower."""
    random = np.random.default_rng(0)
    pairs = [(random.normal(), random.normal()) for _ in range(8)]
    few, many = (measures.clustered_spearman([[pair] * count for pair in pairs]) for count in (1, 50))
    assert few["value"] == pytest.approx(many["value"])
    assert many["interval"] == pytest.approx(few["interval"], abs=0.05)
    assert (few["n"], many["n"]) == (8, 400)
    monotone = measures.clustered_spearman([[(x, x**3)] for x in range(9)])
    assert (monotone["value"], monotone["interval"]) == (pytest.approx(1), pytest.approx([1, 1]))
    assert np.isnan(measures.clustered_spearman([])["value"])
    alone = measures.clustered_spearman([pairs, []])  # all images of one patient
    assert (alone["value"], alone["interval"], alone["n"]) == (pytest.approx(few["value"]), None, 8)
