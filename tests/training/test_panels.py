"""The conditioning test measures what it says, against a model whose obedience is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.schema import Covariate, CovariateSchema
from ldm.training.panels import conditioning_test


class HalfObedient:
    """Draws half the age that it is asked for, and shows the first sample of men as a woman."""

    schema = CovariateSchema(
        [Covariate("age", "continuous", "years", (0.0, 100.0)), Covariate("sex", "categorical", levels=("F", "M"))]
    )

    def __init__(self, **header):
        self.header, self.asked = header, []

    def sample(self, rows, seed, num_inference_steps):
        self.asked += rows
        row, n = rows[0], len(rows)
        value = 0.5 * row["age"] if "age" in row else float(row["sex"] == "M")
        images = np.full((n, 1, 4, 4), value) + 1e-6 * np.arange(n)[:, None, None, None]
        images[0] = min(images[0, 0, 0, 0], 0.0) if "sex" in row else images[0]
        return SimpleNamespace(images=images)


ROWS = [{"age": 20.0, "sex": "F"}] * 4


def test_measured_change_and_level_over_what_was_asked():
    def measure(image):
        return {"age": float(image.mean()), "sex": "M" if image.mean() > 0.5 else "F"}

    found = conditioning_test(HalfObedient(), ROWS, 1, measure)
    assert found["slope/age"] == pytest.approx(0.5)
    assert found["level/sex"] == pytest.approx(7 / 8)
    assert set(conditioning_test(HalfObedient(), ROWS, 1, lambda image: {"age": np.nan})) == {
        "response/age",
        "response/sex",
    }


def test_a_model_without_learned_nulls_is_asked_for_all_covariates():
    model = HalfObedient(learned_null=False)
    conditioning_test(model, ROWS, 1)
    assert all(set(row) == {"age", "sex"} for row in model.asked)
    assert {row["age"] for row in model.asked} == {20.0, 80.0}
