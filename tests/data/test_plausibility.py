"""Covariates that nobody can have are told with row, column, value and remedy; real distributions raise no alarm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm.data.draft import draft_cohort
from ldm.data.faults import Fault
from ldm.data.plausibility import implausible_values

AGES = [45 + i % 40 for i in range(40)]


def _warnings(root: Path, values, kind: str = "continuous", **covariate) -> list[Fault]:
    lines = ["participant_id\tx", *(f"s{index}\t{value}" for index, value in enumerate(values))]
    (root / "t.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    covariates = {"x": {"kind": kind, **covariate}}
    config = {"root": str(root), "table": "t.tsv", "image": "{participant_id}.nii.gz", "covariates": covariates}
    return implausible_values(draft_cohort(config))


@pytest.mark.parametrize("value", [99952.8, -200, 1e9, 600])
def test_an_impossible_value_is_told_with_row_column_value_and_remedy(tmp_path, value):
    (warning,) = _warnings(tmp_path, [*AGES, value], unit="years")
    assert (warning.kind, warning.where, warning.record) == ("covariate-outlier", "t.tsv:42", "s40")
    assert f"x = {value:.10g} years is far from all others; the median is 6" in warning.reason
    assert "data.covariates.x.range: [low, high]" in warning.remedy
    assert "leave the cell empty" in warning.remedy


@pytest.mark.parametrize("value", [-9, -99, -999, 999, 9999])
@pytest.mark.parametrize("count", [1, 30])
def test_codes_of_missing_values_are_told_however_many(tmp_path, value, count):
    warnings = _warnings(tmp_path, [*AGES[:20], *[value] * count])
    assert [warning.kind for warning in warnings] == ["covariate-code-of-missing"] * count
    assert warnings[0].where == "t.tsv:22"
    assert f"x = {value} looks like a code" in warnings[0].reason


def test_a_configured_range_and_values_among_the_others_raise_no_alarm(tmp_path):
    assert _warnings(tmp_path, [*AGES, 99952.8], range=[0, 1e6]) == []
    assert _warnings(tmp_path, [*range(-60, 61, 3), -9, -9]) == []
    assert _warnings(tmp_path, [*range(500, 3000, 50), 999]) == []
    assert _warnings(tmp_path, [*[12] * 40, 16, 8, 20]) == []
    assert _warnings(tmp_path, [50, 51, 52, 400]) == []


@pytest.mark.parametrize("seed", range(3))
def test_skewed_and_zero_inflated_quantities_raise_no_alarm(tmp_path, seed):
    rng = np.random.default_rng(seed)
    volumes = np.exp(rng.normal(7, 1, 500)).round(1)
    assert _warnings(tmp_path, volumes) == []
    assert _warnings(tmp_path, np.where(rng.random(500) < 0.5, 0, volumes)) == []
    assert _warnings(tmp_path, np.where(rng.random(500) < 0.9, 0, volumes)) == []
    assert _warnings(tmp_path, rng.normal(0, 1, 500).round(4)) == []


def test_levels_that_differ_in_writing_only_are_told_once(tmp_path):
    (warning,) = _warnings(tmp_path, [*["F", "M"] * 10, "f", "f"], "categorical")
    assert (warning.kind, warning.where) == ("covariate-twin-level", "t.tsv:22")
    assert "x is 'f' in 2 of the rows, first in this one, and 'F' in 10:" in warning.reason
    assert len(_warnings(tmp_path, ["left hand"] * 5 + ["Left  hand", "right hand"], "categorical")) == 1
    assert len(_warnings(tmp_path, ["1", "1", "1.0", "0"], "categorical")) == 1
    assert _warnings(tmp_path, ["F", "M", "A", "AB"], "categorical") == []
    assert _warnings(tmp_path, ["F", "M"] * 3, "categorical", levels=["F", "M"]) == []


def test_a_group_of_its_own_is_no_slip(tmp_path):
    children, adults = [6 + i % 8 for i in range(900)], [40 + i % 30 for i in range(100)]
    assert _warnings(tmp_path, [*children, *adults], unit="years") == []
