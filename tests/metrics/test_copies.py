"""Numbers of an audit against answers that are known by other means."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ldm.errors import LdmError
from ldm.metrics.copies import (
    auc,
    authenticity,
    conformal_threshold,
    critical_count,
    distance_ratio,
    lower_prediction_bound,
    membership,
    nearest_of_others,
    pairwise,
    precedence_p_value,
    smallest_by_subject,
    tpr_at_fpr,
    upper_bound,
)


def test_a_distance_is_that_of_the_nearest_variant_and_of_an_image_from_itself_exactly_nothing():
    rng = np.random.default_rng(0)
    reference = rng.normal(1e4, 1, (3, 50))
    queries = np.stack([reference + 5, reference], axis=1)[[2, 0]]  # (2, 2, 50)
    found = pairwise(queries, reference)
    assert found.argmin(1).tolist() == [2, 0]
    assert found.min(1).tolist() == [0, 0]
    assert found[0, 0] == pytest.approx(np.sqrt(np.mean((reference[2] - reference[0]) ** 2)), rel=1e-3)


def test_the_threshold_is_an_order_statistic():
    values = np.random.default_rng(0).permutation(40) + 1.0
    assert conformal_threshold(values, 0.05) == (2.0, 2)  # floor(0.05 * 41)
    assert conformal_threshold(values[:19] * 0 + np.arange(19), 0.05) == (0.0, 1)  # exactly 1 in 20
    assert conformal_threshold([3.0, 2.0], 0.05) == (2.0, 1)  # too few for 5 %: 1 in 3
    with pytest.raises(LdmError, match="cannot be had"):
        conformal_threshold([], 0.05)


def test_the_p_value_counts_orders():
    n, m, k = 3, 4, 2
    counts = []
    for places in itertools.combinations(range(n + m), n):  # every order of the pooled is as likely
        kth = [place for place in range(n + m) if place not in places][k - 1]
        counts.append(sum(place < kth for place in places))
    for flagged in range(n + 1):
        assert precedence_p_value(flagged, n, k, m) == pytest.approx(np.mean(np.array(counts) >= flagged))
    assert precedence_p_value(1, 1, 1, 19) == pytest.approx(1 / 20)


def test_the_test_does_not_cry_wolf_and_a_plain_binomial_would():
    rng, n, m, alpha = np.random.default_rng(0), 100, 30, 0.05
    counts = []
    for _ in range(4000):
        held, drawn = rng.random(m), rng.random(n)
        threshold, k = conformal_threshold(held, 0.05)
        counts.append(int((drawn <= threshold).sum()))
    exact = np.array([precedence_p_value(flagged, n, k, m) for flagged in range(n + 1)])[counts]
    binomial = stats.binom.sf(np.array(counts) - 1, n, k / (m + 1))
    assert 0.02 < (exact <= alpha).mean() <= 0.061  # 0.05 plus three standard errors
    assert (binomial <= alpha).mean() > 0.1  # which takes the threshold for known


def test_a_further_scan_seldom_comes_below_the_bound():
    rng, n, m, below = np.random.default_rng(0), 50, 20, 0
    for _ in range(1000):
        held, drawn = np.exp(rng.normal(1, 0.3, m)), np.exp(rng.normal(1, 0.3, n))
        below += drawn.min() < lower_prediction_bound(held, n, 0.1)
    assert 0.04 < below / 1000 < 0.13  # at most 0.1, as n comparisons share the same m
    assert lower_prediction_bound([0.0, 1.0], 5, 0.05) == 0


def test_the_critical_count_is_where_the_p_value_falls_below_alpha():
    count = critical_count(100, 1, 30, 0.05)
    assert precedence_p_value(count, 100, 1, 30) <= 0.05 < precedence_p_value(count - 1, 100, 1, 30)
    assert critical_count(2, 1, 2, 0.05) is None


def test_the_rule_of_three():
    assert upper_bound(0, 300) == pytest.approx(0.01, rel=0.01)
    assert upper_bound(0, 10) == pytest.approx(1 - 0.05**0.1)
    assert upper_bound(1, 20) == pytest.approx(0.2161, abs=1e-4)  # Clopper-Pearson tables
    assert upper_bound(5, 5) == 1


def test_authenticity_of_copies_strangers_and_relatives():
    x = np.array([0.0, 10.0, 20.0, 20.5])  # of subjects a, b, c, c
    within, who = np.abs(x[:, None] - x), ["a", "b", "c", "c"]
    drawn = np.array([0.0, 9.0, -11.0, 21.5])
    to_train = np.abs(drawn[:, None] - x)
    every = np.arange(4)
    others = nearest_of_others(within, every, who)
    np.testing.assert_array_equal(others, [10, 10, 10, 10.5])
    assert authenticity(to_train, others) == 0.25  # the last is near c, whose own does not count
    assert authenticity(to_train, nearest_of_others(within, every, list("abcd"))) == 0.5
    nearest = np.array([0, 1, 3])  # of some image: nothing else is looked at
    some = nearest_of_others(within[nearest], nearest, who)
    np.testing.assert_array_equal(some, [10, 10, np.nan, 10.5])
    assert authenticity(to_train, some) == 0.25


def test_the_distance_ratio_is_of_as_many_scans():
    rng = np.random.default_rng(0)
    drawn, train, held = (rng.normal(size=(n, 1, 3)) for n in (60, 200, 20))
    names = [f"s{i}" for i in range(200)]
    to_held = pairwise(drawn, held[:, 0])
    assert distance_ratio(pairwise(drawn, train[:, 0]), to_held, names) == pytest.approx(1, abs=0.25)
    near = pairwise(drawn, np.concatenate([drawn[:, 0] + 1e-3, train[:5, 0]]))
    assert distance_ratio(near, to_held, [f"s{i}" for i in range(65)]) < 0.95


def test_auc_and_tpr_against_counting():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 30), rng.integers(2, 9, 25)
    pairs = a[:, None] - b[None]
    assert auc(a, b) == pytest.approx(((pairs < 0) + 0.5 * (pairs == 0)).mean())
    assert auc(np.zeros(3), np.ones(4)) == 1
    others = np.arange(200.0)
    assert tpr_at_fpr(np.array([0.0, 1.5, 2.0, 3.0]), others, 0.01) == 0.5  # 2 of 200 may be nearer: below 2
    assert smallest_by_subject(np.array([3.0, 1.0, 2.0]), ["b", "a", "b"]).tolist() == [1, 2]


def test_membership_has_an_interval_and_a_rate_only_with_enough_subjects():
    rng = np.random.default_rng(0)
    same = membership(rng.random(80), rng.random(40))
    assert same["interval"][0] < 0.5 < same["interval"][1]
    assert same["tpr_at_1_percent_fpr"] is None
    apart = membership(rng.random(300), rng.random(300) + 0.5, resamples=50)
    assert apart["interval"][0] > 0.8
    assert apart["tpr_at_1_percent_fpr"] == pytest.approx(0.5, abs=0.1)
