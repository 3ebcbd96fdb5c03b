"""A covariate asked from low to high: what is asked, what is measured, and where it is extrapolation."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.sweep import measure_sweep, read_sweep

SCHEMA = CovariateSchema(
    [Covariate("age", "continuous", "years", (0.0, 120.0)), Covariate("sex", "categorical", levels=("F", "M"))]
)
RECORDS = [SimpleNamespace(covariates={"age": age, "sex": sex}) for age, sex in ((40.3, "F"), (50.0, "M"), (69.7, "M"))]


def test_what_is_asked_and_what_the_others_are():
    (axis,) = read_sweep({"age": [30, 90, 7]}, None, SCHEMA, RECORDS)
    assert axis.values == (30, 40, 50, 60, 70, 80, 90)
    assert 39 < axis.training[0] <= 40.3
    assert 71 > axis.training[1] >= 69.7
    assert axis.outside.tolist() == [True, axis.training[0] > 40, False, False, axis.training[1] < 70, True, True]
    assert axis.row(50.0) == {"age": 50.0}
    (axis,) = read_sweep({"age": [30, 90, 7]}, "mean", SCHEMA, RECORDS)
    assert axis.row(50.0) == {"age": 50.0, "sex": "M"}
    assert axis.others["age"] == pytest.approx(160 / 3)
    assert read_sweep(None, None, SCHEMA, RECORDS) == []


@pytest.mark.parametrize(
    ("sweep", "others", "message"),
    [
        ({"agee": [1, 2, 3]}, None, "Did you mean 'age'"),
        ({"sex": [0, 1, 2]}, None, "only a continuous covariate"),
        ({"age": [90, 30, 7]}, None, "low < high"),
        ({"age": [30, 90]}, None, r"\[low, high, steps\]"),
        ({"age": [30, 90, 2.5]}, None, r"\[low, high, steps\]"),
        ("age", None, "legal: a mapping"),
        ({"age": [30, 90, 7]}, "median", "legal: null, mean"),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep, others, message):
    with pytest.raises(LdmError, match=message):
        read_sweep(sweep, others, SCHEMA, RECORDS)


def test_nulls_that_were_never_learned_are_not_asked_for():
    with pytest.raises(LdmError, match="sweep.age.*sex would be left out with sweep_others=null. Legal: .*mean"):
        read_sweep({"age": [30, 90, 7]}, None, SCHEMA, RECORDS, learned_nulls=False)
    assert read_sweep({"age": [30, 90, 7]}, "mean", SCHEMA, RECORDS, learned_nulls=False)
    assert read_sweep({"age": [30, 90, 7]}, None, CovariateSchema([SCHEMA["age"]]), RECORDS, learned_nulls=False)


def test_slopes_are_told_apart_inside_and_outside_the_training_range(tmp_path):
    """Measured as asked up to 70 years, and nothing more beyond: a model that does not extrapolate."""
    (axis,) = read_sweep({"age": [45, 105, 7]}, None, SCHEMA, RECORDS)
    images = [[np.full((1, 8, 8), min(value, 75) + noise) for noise in (0, 4, np.nan)] for value in axis.values]
    instruments = {"predictor": lambda image: {"age": float(image.mean())}, "other": lambda image: {"sex": "F"}}
    result = measure_sweep(axis, images, instruments, tmp_path, value_range=(0, 100))
    assert list(result["measured"]) == ["predictor"]
    assert result["measured"]["predictor"][1] == [55, 59, None]
    assert result["slope"]["predictor"]["inside"] == pytest.approx(1)
    assert result["slope"]["predictor"]["outside"] == pytest.approx(0)
    assert result["extrapolation"] == [False, False, False, True, True, True, True]
    pixels = np.asarray(PIL.Image.open(tmp_path / "sweep_age_predictor.png").convert("RGB")).astype(int)
    shaded = (pixels[..., 0] - pixels[..., 2] > 30).mean(0)  # share of each column that is orange
    assert shaded[int(0.9 * len(shaded))] > 0.5
    assert shaded[int(0.25 * len(shaded))] < 0.05
    assert (tmp_path / "sweep_age.png").is_file()
