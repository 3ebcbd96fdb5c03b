"""Distances between sets of features, against closed forms and other implementations."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.errors import LdmError
from ldm.metrics.frechet import frechet_distance, frechet_infinity, frechet_interval
from ldm.metrics.kernels import kernel_distance, kernel_interval, mmd, mmd_interval
from ldm.metrics.neighbours import neighbour_intervals, precision_recall_density_coverage


class Features(torch.nn.Module):
    """Lets torchmetrics take features for images."""

    num_features = 6

    def forward(self, x):
        return x.flatten(1)[:, :6]


def gaussian(n, features=6, shift=0.0, scale=1.0, seed=0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, features))


def correlated(n, features, seed):
    mix = np.random.default_rng(seed + 100).standard_normal((features, features))
    return gaussian(n, features, seed=seed) @ mix


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def by_sqrtm(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = sqrtm(cov_a @ cov_b).real
    return np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)


def with_torchmetrics(metric, a, b):
    for features, real in ((a, True), (b, False)):
        # (N, 1, 2, 3): to torchmetrics an image; float64 throughout
        metric.update(torch.from_numpy(features).reshape(-1, 1, 2, 3), real=real)
    return metric.compute()


# Fréchet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(80, 50), (20, 6), (5, 50)], ids=str)
def test_frechet_distance_is_that_of_the_covariances_whatever_the_number_of_images(n, m):
    a, b = correlated(n, 12, 0), correlated(m, 12, 1) + 1
    expected = by_sqrtm(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)  # sqrtm is the less exact for singular products
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b))


def test_frechet_distance_of_gaussians_is_the_closed_form():
    mean, std = np.array([1.0, -2.0, 0.5]), np.array([0.5, 2.0, 3.0])
    expected = (mean**2).sum() + ((std - 1) ** 2).sum()
    a, b = gaussian(20000, 3, seed=1), gaussian(20000, 3, mean, std, seed=2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n", [100, 5], ids=str)
def test_a_set_has_no_distance_from_itself(n):
    x = 100 * correlated(n, 12, 0)
    assert frechet_distance(x, x) <= 1e-12 * np.square(x).sum()
    assert frechet_distance(x, x[::-1]) <= 1e-12 * np.square(x).sum()


def test_frechet_and_kernel_distance_agree_with_torchmetrics():
    a, b = gaussian(60), gaussian(60, shift=0.5, scale=1.5, seed=1)
    fid = FrechetInceptionDistance(feature=Features(), input_img_size=(1, 2, 3)).set_dtype(torch.float64)
    assert frechet_distance(a, b) == pytest.approx(float(with_torchmetrics(fid, a, b)), rel=1e-5)
    kid = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=60)  # one block: all pairs
    assert kernel_distance(a, b) == pytest.approx(float(with_torchmetrics(kid, a, b)[0]), rel=1e-5)


def test_the_frechet_interval_holds_the_distance_and_narrows():
    widths = []
    for n in (30, 300):
        a, b = gaussian(n, 3, seed=1), gaussian(n, 3, shift=0.5, seed=2)
        low, high = frechet_interval(a, b, 100)
        assert low < frechet_distance(a, b) < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]  # 0.32 for a root-n law


def test_the_extrapolated_distance_is_free_of_the_bias_of_few_images():
    a, b = gaussian(200, 10, seed=1), gaussian(200, 10, seed=2)
    assert frechet_distance(a, b) > 0.2  # the true distance is 0
    assert abs(frechet_infinity(a, b)) < 0.1
    with pytest.raises(LdmError, match="20 subjects and 10 features"):
        frechet_infinity(a[:20], b[:20])


def test_the_extrapolation_counts_subjects_and_not_their_images():
    a, b = (np.repeat(gaussian(60, 4, seed=seed), 5, axis=0) for seed in (1, 2))  # five like images each
    whose = np.repeat(np.arange(60), 5)
    assert abs(frechet_infinity(a, b, whose_a=whose, whose_b=whose)) < 0.6 * frechet_distance(a, b)
    with pytest.raises(LdmError, match="8 subjects and 4 features"):
        frechet_infinity(a[:40], b[:40], whose_a=whose[:40], whose_b=whose[:40])


# kernels ------------------------------------------------------------------------------------------------


def test_kernel_distances_of_equal_distributions_are_zero_on_average():
    pairs = [(gaussian(20, seed=2 * i), gaussian(30, seed=2 * i + 1)) for i in range(200)]
    for distance in (kernel_distance, mmd):
        values = np.array([distance(a, b) for a, b in pairs])
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
        assert (values < 0).mean() > 0.3


def test_the_kernel_interval_holds_the_true_distance():
    # one feature: E k(x, y) = 1 + 3 E[xy] + 3 E[x^2] E[y^2] + E[x^3] E[y^3]; x has the mean 0 and y the mean 1
    true = (1 + 3) + (1 + 3 * 1 + 3 * 2**2 + 4**2) - 2 * (1 + 3 * 2)
    covered = 0
    for i in range(200):
        a, b = gaussian(60, 1, seed=2 * i), gaussian(80, 1, shift=1.0, seed=2 * i + 1)
        low, high = kernel_interval(a, b)
        assert low < kernel_distance(a, b) < high
        covered += low <= true <= high
    assert 0.87 <= covered / 200 <= 0.98


def test_the_intervals_of_mmd_and_of_neighbours_hold_what_such_sets_have_on_average():
    found, held = [], []
    whose = np.arange(60), np.arange(60)
    for i in range(120):
        a, b = gaussian(60, 2, seed=2 * i), gaussian(60, 2, shift=0.7, seed=2 * i + 1)
        values = {**precision_recall_density_coverage(a, b, 5), "mmd": mmd(a, b, 1.5)}
        found.append(values)
        held.append({**neighbour_intervals(a, b, 5, *whose), "mmd": mmd_interval(a, b, 1.5)})
    for name in found[0]:
        mean = np.mean([one[name] for one in found])
        share = np.mean([one[name][0] <= mean <= one[name][1] for one in held])
        assert share >= 0.88, (name, share)
        assert np.mean([np.ptp(one[name]) for one in held]) < 6 * np.std([one[name] for one in found]), name


def test_intervals_are_over_subjects():
    """Five copies of every image tell no more than the images: the interval must not become narrower by them."""
    a, b = gaussian(40, 2, seed=1), gaussian(50, 2, shift=0.5, seed=2)
    many = np.repeat(a, 5, axis=0), np.repeat(b, 5, axis=0)
    whose = np.repeat(np.arange(40), 5), np.repeat(np.arange(50), 5)
    for interval, places in ((kernel_interval, {}), (frechet_interval, {"resamples": 400})):
        names = ("whose_a", "whose_b")
        once = np.ptp(interval(a, b, **places))
        together = np.ptp(interval(*many, **dict(zip(names, whose, strict=True)), **places))
        apart = np.ptp(interval(*many, **places))
        assert together == pytest.approx(once, rel=0.15)
        assert apart < 0.6 * once
    with pytest.raises(LdmError, match="needs 3 of them"):
        kernel_interval(*many, np.zeros(200), whose[1])


def test_the_gaussian_kernel_grows_with_the_shift_and_takes_a_bandwidth():
    a = gaussian(100)
    values = [mmd(a, gaussian(100, shift=shift, seed=1), bandwidth=2.0) for shift in (0.0, 0.5, 1.0)]
    assert values == sorted(values)
    # for x ~ N(0, 1), y ~ N(d, 1) and bandwidth h: E k(x, y) = h exp(-d^2 / (2 (2 + h^2))) / sqrt(2 + h^2)
    a, b = gaussian(2000, 1, seed=3), gaussian(2000, 1, shift=1.0, seed=4)
    assert mmd(a, b, 1.0) == pytest.approx(2 / np.sqrt(3) * (1 - np.exp(-1 / 6)), rel=0.1)


# neighbours ---------------------------------------------------------------------------------------------


def test_neighbours_of_points_on_a_line():
    real, synthetic = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [2.5], [102.5]])
    # balls of the real points: [-1, 1], [0, 2], [1, 19]; of the synthetic ones: [-1.5, 2.5], [0.5, 4.5], [2.5, 202.5]
    result = precision_recall_density_coverage(real, synthetic, k=1)
    assert result == {
        "precision": pytest.approx(2 / 3),  # 0.5 and 2.5, not 102.5
        "recall": 1.0,
        "density": pytest.approx((2 + 1 + 0) / 3),
        "coverage": 1.0,
    }


def test_equal_distributions_have_density_one_and_full_coverage():
    result = precision_recall_density_coverage(gaussian(400, seed=1), gaussian(400, seed=2))
    assert result["density"] == pytest.approx(1, abs=0.1)
    assert result["coverage"] > 0.93  # 1 - 2^-5 in expectation for sets of equal size
    assert min(result["precision"], result["recall"]) > 0.85


def test_what_is_lost_is_told_apart():
    real = np.concatenate([gaussian(100, seed=1), gaussian(100, shift=50.0, seed=2)])
    one_mode = precision_recall_density_coverage(real, gaussian(200, seed=3))
    assert one_mode["precision"] > 0.85
    assert max(one_mode["recall"], one_mode["coverage"]) < 0.6
    elsewhere = precision_recall_density_coverage(real, gaussian(200, shift=-50.0, seed=3))
    assert max(elsewhere.values()) == 0


@pytest.mark.parametrize(
    ("function", "a", "b", "message"),
    [
        (frechet_distance, np.zeros((5, 3)), np.zeros((5, 4)), r"shapes \(5, 3\) and \(5, 4\)"),
        (kernel_distance, np.zeros((1, 3)), np.zeros((5, 3)), "set of 1 images"),
        (kernel_distance, np.full((3, 3), np.nan), np.zeros((5, 3)), "3 images are not finite"),
        (precision_recall_density_coverage, np.zeros((5, 3)), np.zeros((6, 3)), "k is 5"),
        (mmd, np.zeros((5, 3)), np.zeros((5, 3)), "equal features"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(function, a, b, message):
    with pytest.raises(LdmError, match=message):
        function(a, b)
