"""Agreement of levels against numbers worked out by hand, and what the report makes of them."""

import numpy as np
import pytest

from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.agreement import agreement, level_agreement, wilson
from ldm.evaluation.fidelity import ImageSet, Pairs, _correlation, fidelity, share_of_real
from ldm.evaluation.instruments import OfAnotherSplit


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [(9, 10, (0.5958, 0.9821)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_against_published_intervals(successes, n, interval):
    assert wilson(successes / n, n) == pytest.approx(interval, abs=1e-4)


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
    assert result["levels"]["a"]["interval"] == wilson(3 / 4, 4)
    with pytest.raises(LdmError, match="'bb' is no level. Did you mean 'b'"):
        level_agreement(["a"], ["bb"], ("a", "b"))
    with pytest.raises(LdmError, match="they must be pairs"):
        level_agreement(["a"], [], ("a", "b"))


def test_images_of_one_subject_are_worth_less_than_as_many_of_several():
    """Ten subjects of eight images that are right or wrong together tell as much as ten images."""
    found = [level for level in "aaaaaaaabb" for _ in range(8)]
    subjects = [subject for subject in range(10) for _ in range(8)]
    together = level_agreement(["a"] * 80, found, ("a", "b"), subjects)
    assert together["interval"] == pytest.approx(wilson(0.8, 10))
    assert level_agreement(["a"] * 80, found, ("a", "b"))["interval"] == pytest.approx(wilson(0.8, 80))
    shuffled = list(np.random.default_rng(0).permutation(subjects))
    low, high = level_agreement(["a"] * 80, found, ("a", "b"), shuffled)["interval"]
    assert high - low < 0.7 * np.ptp(together["interval"])
    certain = level_agreement(["a"] * 80, ["a"] * 80, ("a", "b"), subjects)
    assert certain["interval"] == pytest.approx(wilson(1.0, 10))


def test_agreement_is_that_of_the_line_and_its_intervals_narrow():
    x = np.arange(40.0)
    result = agreement(x, 2 * x + 3)
    assert (result["r"], result["slope"], result["intercept"]) == pytest.approx((1, 2, 3))
    assert result["mae"] == result["bias"] == pytest.approx(x.mean() + 3)
    noise = np.random.default_rng(0).standard_normal(40)
    few, many = agreement(x[:10], x[:10] + 5 * noise[:10]), agreement(x, x + 5 * noise)
    for name in ("r_interval", "slope_interval", "mae_interval"):
        assert np.ptp(many[name]) < np.ptp(few[name])
        assert many[name][0] < many[name.removesuffix("_interval")] < many[name][1]


def test_images_of_one_subject_do_not_make_an_interval_narrower():
    x, noise = np.arange(12.0), np.random.default_rng(0).standard_normal(12)
    five, found = np.repeat(x, 5), np.repeat(x + noise, 5)
    once, copied = agreement(x, x + noise), agreement(five, found, subjects=five)
    assert copied["r"] == pytest.approx(once["r"])
    width = np.ptp(once["slope_interval"])
    assert np.ptp(copied["slope_interval"]) == pytest.approx(width, rel=0.15)
    assert np.ptp(agreement(five, found)["slope_interval"]) < 0.6 * width


SCHEMA = CovariateSchema(
    [
        Covariate("sex", "categorical", levels=("F", "M")),
        Covariate("stage", "categorical", levels=("0", "1")),
        Covariate("age", "continuous", "years", (0.0, 100.0)),
    ]
)


def instrument(image):
    """The images are the numbers that the instrument finds: sex, stage, age."""
    sex, stage, age = image
    return {"sex": "FM"[int(sex)], "stage": str(int(stage)), "age": float(age), "height": 1.0}


def test_fidelity_of_levels_and_values(tmp_path):
    rows = [{"sex": "FM"[i % 2], "stage": None if i == 0 else 1.0, "age": 40.0 + i} for i in range(6)]
    subjects = [f"sub-{i}" for i in range(6)]
    real = ImageSet([np.array([i % 2, 1, 40 + i]) for i in range(6)], rows, subjects)
    samples = ImageSet([np.array([0, 1, 50 + 2 * i if i else np.nan]) for i in range(6)], rows, subjects)
    result = fidelity({"fixed": instrument}, SCHEMA, real, samples, tmp_path)
    assert set(result) == {"sex", "stage", "age"}
    assert result["sex"]["instrument_on_held_out"]["accuracy"] == 1
    assert result["sex"]["samples"]["accuracy"] == 0.5
    assert result["sex"]["share"]["value"] == 0.5
    assert result["sex"]["samples"]["confusion"] == [[3, 0], [3, 0]]
    assert result["stage"]["samples"]["n"] == 5  # nothing was asked of the first, and level 1.0 is level 1
    assert result["age"]["samples"]["slope"] == pytest.approx(2)
    assert result["age"]["share"]["value"] == pytest.approx(1)
    assert result["age"]["unmeasurable_samples"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"measured_real_age.png", "measured_samples_age.png"}


def test_several_instruments_and_seeds_stand_side_by_side(tmp_path):
    rows, subjects = [{"age": 40.0 + i} for i in range(6)], list("abcdef")
    images = [np.array([0, 0, 40.0 + i + i % 2]) for i in range(6)]
    one = ImageSet(images, rows, subjects)
    instruments = {"segmenter": instrument, "predictor": OfAnotherSplit(lambda image: {"age": 2 * float(image[2])})}
    found = fidelity(instruments, SCHEMA, one, one, tmp_path, {7: ImageSet(images[::-1], rows, subjects)})
    assert list(found) == ["age", "age (predictor)"]
    assert found["age (predictor)"]["samples"]["slope"] == pytest.approx(2 * found["age"]["samples"]["slope"])
    assert found["age (predictor)"]["covariate"] == "age"
    assert found["age (predictor)"]["trained_on_split"] is False
    assert "trained_on_split" not in found["age"]
    r = found["age"]["samples"]["r"]
    assert found["age"]["seeds"]["r"]["values"] == pytest.approx([r, -r], abs=0.1)


def of(rng, n, noise):
    """Values of n subjects and what is measured of them; r is (1 + noise^2)^(-1/2)."""
    x = rng.standard_normal(n)
    return Pairs(list(x), list(x + noise * rng.standard_normal(n)), [str(i) for i in range(n)])


def test_the_share_of_the_real_agreement_is_held_by_its_interval():
    rng, held, true = np.random.default_rng(0), 0, np.sqrt(1.25 / 2)
    for _ in range(100):
        real = of(rng, 60, 0.5)
        found = np.array(real.asked) + rng.standard_normal(60)
        low, high = share_of_real(real, Pairs(real.asked, list(found), real.subjects), _correlation)["interval"]
        held += low <= true <= high
    assert 0.88 <= held / 100 <= 0.99


def test_only_real_images_that_samples_were_asked_as_count_for_the_share():
    real = of(np.random.default_rng(0), 20, 0.3)
    samples = Pairs(real.asked[:10], real.found[:10], real.subjects[:10])
    result = share_of_real(real, samples, _correlation)
    assert result["value"] == pytest.approx(1)
    assert result["interval"] == pytest.approx([1, 1])  # paired: the same images
    assert result["subjects"] == 10
