"""Agreement of levels against numbers worked out by hand, and what the report makes of them."""

import numpy as np
import pytest

from ldm.commands.evaluate import fidelity
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.agreement import level_agreement, wilson


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [(9, 10, (0.5958, 0.9821)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_against_published_intervals(successes, n, interval):
    assert wilson(successes, n) == pytest.approx(interval, abs=1e-4)


def test_levels_are_counted_by_what_was_asked():
    asked, found = ["a", "a", "a", "a", "b", "b"], ["a", "a", "a", "b", "b", "c"]
    result = level_agreement(asked, found, ("a", "b", "c"))
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["n"] == 6
    assert result["confusion"] == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert {name: (share["accuracy"], share["n"]) for name, share in result["levels"].items()} == {
        "a": (0.75, 4),
        "b": (0.5, 2),  # c was never asked for
    }
    assert result["levels"]["a"]["interval"] == wilson(3, 4)
    with pytest.raises(LdmError, match="'bb' is no level. Did you mean 'b'"):
        level_agreement(["a"], ["bb"], ("a", "b"))
    with pytest.raises(LdmError, match="they must be pairs"):
        level_agreement(["a"], [], ("a", "b"))


class Model:
    schema = CovariateSchema(
        [
            Covariate("sex", "categorical", levels=("F", "M")),
            Covariate("stage", "categorical", levels=("0", "1")),
            Covariate("age", "continuous", "years", (0.0, 100.0)),
        ]
    )


def test_fidelity_of_levels_and_values(tmp_path):
    """The images are the numbers that the instrument finds: sex, stage, age."""

    def instrument(image):
        sex, stage, age = image
        return {"sex": "FM"[int(sex)], "stage": str(int(stage)), "age": float(age), "height": 1.0}

    rows = [{"sex": "FM"[i % 2], "stage": None if i == 0 else 1.0, "age": 40.0 + i} for i in range(6)]
    real = [np.array([i % 2, 1, 40 + i]) for i in range(6)]
    samples = [np.array([0, 1, 50 + 2 * i if i else np.nan]) for i in range(6)]
    result = fidelity(instrument, Model, real, rows, samples, rows, tmp_path)
    assert set(result) == {"sex", "stage", "age"}
    assert result["sex"]["instrument_on_held_out"]["accuracy"] == 1
    assert result["sex"]["samples"]["accuracy"] == 0.5
    assert result["sex"]["samples"]["confusion"] == [[3, 0], [3, 0]]
    assert result["stage"]["samples"]["n"] == 5  # nothing was asked of the first, and level 1.0 is level 1
    assert result["age"]["samples"]["slope"] == pytest.approx(2)
    assert result["age"]["unmeasurable_samples"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"measured_real_age.png", "measured_samples_age.png"}
