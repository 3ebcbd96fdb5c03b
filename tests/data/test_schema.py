"""Covariates as vectors, and the distribution that stands in for the training rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm.data.distribution import MIN_SUBJECTS, CovariateDistribution
from ldm.data.schema import CovariateSchema, outward
from ldm.errors import LdmError

CONFIG = {
    "age": {"kind": "continuous", "unit": "years", "range": [40, 80]},
    "sex": {"kind": "categorical", "levels": ["F", "M"]},
    "ventricles": {"kind": "continuous", "unit": "mm3", "range": [1000, 5000], "scales_with": "volume"},
}


def test_encode_maps_range_to_unit_without_clipping_and_missing_to_nan():
    schema = CovariateSchema.from_config(CONFIG)
    vector = schema.encode({"age": "90", "sex": "M"})
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector[:2], [1.25, 1.0])
    assert np.isnan(vector[2])
    assert schema.decode(vector) == {"age": 90.0, "sex": "M", "ventricles": None}
    assert schema.out_of_range({"age": 90, "ventricles": 2000}) == ["age = 90 years is outside 40..80 years"]
    assert schema.encode_table([]).shape == (0, 3)
    assert schema.encode_table([{"age": 40}, {"age": 60}])[:, 0].tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"agee": 50}, "Did you mean 'age'"),
        ({"sex": "X"}, "Legal levels: F, M"),
        ({"age": "old"}, r"'old' is not a finite number \(in years\)"),
        ({"age": float("inf")}, "not a finite number"),
    ],
)
def test_encode_refuses_what_it_does_not_know(row, message):
    with pytest.raises(LdmError, match=message):
        CovariateSchema.from_config(CONFIG).encode(row)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "continous"}, "Did you mean 'continuous'"),
        ({"kind": "continuous", "rnage": [0, 1]}, "Did you mean 'range'"),
        ({"kind": "continuous", "range": [5, 5]}, "lower one first"),
        ({"kind": "categorical", "range": [0, 1]}, "has no 'range'"),
        ({"kind": "categorical", "levels": "FM"}, "list of names"),
        ({"kind": "categorical", "scales_with": "volume"}, "scales_with"),
    ],
)
def test_impossible_configuration_is_named(entry, message):
    with pytest.raises(LdmError, match=message):
        CovariateSchema.from_config({"age": entry})


def test_levels_match_as_numbers_too():
    schema = CovariateSchema.from_config({"cdr": {"kind": "categorical", "levels": [0, 0.5, 1]}})
    assert [schema.encode({"cdr": value})[0] for value in ("0.0", 0.5, "1")] == [0, 1, 2]


def test_fitted_range_encloses_the_values_and_publishes_no_extreme():
    for values in ([60, 71, 96], [2382.4, 4401.1], [0.0, 3.0], [-5, 5], [7.0, 7.0]):
        low, high = outward(values)
        assert low < min(values) or low == min(values) == 0
        assert high > max(values)
    assert outward([60, 71, 96]) == (59, 97)
    assert outward([0.0, 3.0]) == (0, 3.1)
    schema = CovariateSchema.from_config({"age": {"kind": "continuous"}, "site": {"kind": "categorical"}})
    with pytest.raises(LdmError, match="no range yet"):
        schema.encode({"age": 1})
    fitted = schema.fit([{"age": 60.0, "site": "b"}, {"age": 96.0, "site": "a"}, {"age": None, "site": None}])
    assert fitted["age"].range == (59, 97)
    assert fitted["site"].levels == ("a", "b")
    assert CovariateSchema.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_rescale_follows_the_power_of_the_quantity():
    schema = CovariateSchema.from_config(CONFIG)
    vector = schema.encode({"age": 50, "sex": "F", "ventricles": 2000})
    decoded = schema.decode(schema.rescale(vector, 1.1))
    assert decoded["ventricles"] == pytest.approx(2000 * 1.1**3, rel=1e-5)
    assert decoded["age"] == pytest.approx(50)
    assert np.isnan(schema.rescale(schema.encode({}), 1.1)).all()


def _population(n: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(n):
        age, male = rng.uniform(40, 80), rng.random() < 0.4
        ventricles = 1500 + 60 * (age - 40) + 600 * male + rng.normal(0, 200)
        rows.append({"age": age, "sex": "M" if male else "F", "ventricles": ventricles})
    rows[0]["age"] = None
    return rows


def test_distribution_reproduces_margins_and_dependence_and_holds_no_row():
    rows = _population(400)
    schema = CovariateSchema.from_config(CONFIG)
    fitted = CovariateDistribution.fit(schema, rows)
    content = json.dumps(fitted.to_dict())
    assert not any(repr(value) in content for row in rows for value in row.values() if isinstance(value, float))
    assert all(len(values) <= len(rows) // MIN_SUBJECTS for values in fitted.quantiles.values())

    restored = CovariateDistribution.from_dict(json.loads(content))
    drawn = restored.sample(4000, seed=3)
    assert drawn[:7] == fitted.sample(7, seed=3)
    given = [row for row in rows if row["age"] is not None]
    for name in ("age", "ventricles"):
        old, new = np.array([row[name] for row in given]), np.array([row[name] for row in drawn])
        assert new.mean() == pytest.approx(old.mean(), rel=0.03)
        assert new.std() == pytest.approx(old.std(), rel=0.1)
        assert old.min() < new.min()
        assert new.max() < old.max()

    def gap(table):
        return np.mean([r["ventricles"] for r in table if r["sex"] == "M"]) - np.mean(
            [r["ventricles"] for r in table if r["sex"] == "F"]
        )

    def correlation(table):
        return np.corrcoef([r["age"] for r in table], [r["ventricles"] for r in table])[0, 1]

    assert gap(drawn) == pytest.approx(gap(given), rel=0.2)
    assert correlation(drawn) == pytest.approx(correlation(given), abs=0.05)


def test_distribution_of_a_tiny_cohort_draws_over_the_public_range():
    schema = CovariateSchema.from_config(CONFIG)
    rows = [{"age": 50.0, "sex": "F", "ventricles": 2000.0}, {"age": 60.0, "sex": "M", "ventricles": 3000.0}]
    fitted = CovariateDistribution.fit(schema, rows)
    assert fitted.quantiles == {"age": (), "ventricles": ()}
    ages = [row["age"] for row in fitted.sample(200, seed=0)]
    assert 40 <= min(ages) < 45
    assert 75 < max(ages) <= 80
