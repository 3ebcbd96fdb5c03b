"""Pairs and spread; and the instrument that a segmentation network is."""

import numpy as np
import pytest
import torch

from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.diversity import _mean_interval, nearest_pairs, pairs_within, spread, within_sets
from ldm.evaluation.instruments import find_instrument
from ldm.evaluation.repeats import resampled_subjects
from ldm.model.segmenter import Segmenter, build_segmenter


def test_nearest_pairs_are_nearest_in_standardised_covariates_and_of_different_subjects():
    schema = CovariateSchema(
        [
            Covariate("age", "continuous", "years", (0.0, 100.0)),
            Covariate("site", "categorical", levels=("a", "b", "c")),
            Covariate("weight", "continuous", "kg", (0.0, 100.0)),
        ]
    )
    rows = [{"age": 50, "site": "a"}, {"age": 51, "site": "a"}, {"age": 50, "site": "c"}, {"site": "c"}]
    assert nearest_pairs(schema, rows, list("abcd"))[0] == (0, 1)  # nobody's weight is known
    assert (2, 3) in nearest_pairs(schema, rows, list("abcd"))
    # of one person's two scans each has another partner; levels have no order: c is as far from a as b is
    sessions = nearest_pairs(schema, rows, list("aabc"))
    assert (0, 1) not in sessions
    ages, sites = (50, 51, 50, 80), "abca"
    levels = [{"age": age, "site": site} for age, site in zip(ages, sites, strict=True)]
    assert (0, 2) in nearest_pairs(schema, levels, list("abcd"))
    assert nearest_pairs(schema, rows, ["a"] * 4) == []


def test_of_subjects_equally_near_no_single_one_is_everybodys_partner():
    schema = CovariateSchema([Covariate("site", "categorical", levels=("a", "b"))])
    pairs = nearest_pairs(schema, [{"site": "ab"[i % 2]} for i in range(60)], [f"sub-{i}" for i in range(60)])
    assert all((i - j) % 2 == 0 for i, j in pairs)
    assert np.bincount(np.ravel(pairs)).max() < 10


def test_copies_have_no_spread():
    rng = np.random.default_rng(0)
    images = [rng.random((1, 24, 24), dtype=np.float32) for _ in range(2)]
    same = spread([images[0], images[0]], [(0, 1)], (0.0, 1.0))
    different = spread(images, [(0, 1)], (0.0, 1.0))
    assert same["ms_ssim"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert same["rms"]["mean"] == 0
    assert different["ms_ssim"]["mean"] < 0.5
    assert different["rms"]["mean"] == pytest.approx((1 / 6) ** 0.5, rel=0.1)  # of two uniform variables


def blends(n, share, seed):
    """Images that share a part: the larger it is, the more alike they are."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).random((1, 16, 16), dtype=np.float32)
    return [share * common + (1 - share) * rng.random((1, 16, 16), dtype=np.float32) for _ in range(n)]


def test_a_set_as_diverse_as_real_images_differs_by_nothing_and_a_collapsed_one_by_much():
    subjects = [f"sub-{i}" for i in range(12)]
    sets = {"real": blends(12, 0.5, 0), "reconstructed": blends(12, 0.5, 0), "samples": blends(12, 0.5, 1)}
    result = within_sets(sets, subjects, (0.0, 1.0), further={1: blends(12, 0.9, 2)})
    assert result["difference"]["reconstructed"] == {"value": 0, "interval": [0, 0]}
    low, high = result["difference"]["samples"]["interval"]
    assert low <= 0 <= high
    value = result["difference"]["samples"]["value"]
    assert value == pytest.approx(result["sets"]["samples"]["mean"] - result["sets"]["real"]["mean"])
    assert abs(value) < 0.02
    assert result["protocol"]["pairs"] == 66
    assert result["seeds"]["difference"]["values"][0] == value
    assert result["seeds"]["difference"]["values"][1] > 0.3  # nearly copies
    assert within_sets(sets, subjects[:2] * 6, (0.0, 1.0), most=5)["protocol"]["pairs"] == 5
    assert within_sets(sets, ["one"] * 12, (0.0, 1.0)) is None


def test_no_pair_is_of_one_subject():
    pairs = pairs_within(["a", "a", "b", "c"])
    assert pairs == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert set(pairs_within([str(i) for i in range(30)], 50, seed=1)) < set(
        pairs_within([str(i) for i in range(30)], 999)
    )


def test_the_interval_over_pairs_holds_the_mean_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    names = [str(i) for i in range(25)]
    pairs = pairs_within(names)
    counts = resampled_subjects(names, 400)
    first, second = np.array(pairs).T
    for _ in range(300):
        of_subject = rng.standard_normal(25)  # a pair's value is the mean of two subjects: the true mean is 0
        low, high = _mean_interval((of_subject[first] + of_subject[second]) / 2, counts[:, first] * counts[:, second])
        held += low <= 0 <= high
    assert 0.89 < held / 300 < 0.98


def segmenter(path):
    """A network that calls every voxel above 0.5 class 1."""
    config = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 4], "num_res_units": 0}

    class Threshold(torch.nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], dim=1)

    geometry = Geometry.plan((8, 8, 8), np.diag([2.0, 2.0, 3.0, 1.0]), "RAS", None).with_shape((8, 8, 8))
    preprocessing = Preprocessing(
        3, "RAS", None, (8, 8, 8), (1, 1, 1), IntensityRecipe(), ("image",), reference=geometry
    )
    made = Segmenter(build_segmenter(config), config, LabelClasses.from_config({"bright": [1]}), preprocessing)
    made.save(path)
    return made, Threshold()


def test_volumes_are_in_the_unit_of_the_covariate(tmp_path, monkeypatch):
    made, threshold = segmenter(tmp_path / "m.safetensors")
    made.network = threshold
    monkeypatch.setattr(Segmenter, "load", classmethod(lambda cls, path: made))
    schema = CovariateSchema(
        [Covariate("bright_ml", "continuous", "ml", (0.0, 1.0)), Covariate("age", "continuous", "years", (0.0, 1.0))]
    )
    config = {"kind": "segmenter", "path": tmp_path / "m.safetensors", "measures": {"bright_ml": ["bright"]}}
    image = np.zeros((1, 8, 8, 8), dtype=np.float32)
    image[0, :2, :2, :2] = 1.0
    measured = find_instrument(config, made.preprocessing, schema)(image)
    assert measured == {"bright_ml": pytest.approx(8 * 12e-3)}
    with pytest.raises(LdmError, match="no class 'brigth'.*Did you mean 'bright'"):
        find_instrument({**config, "measures": {"bright_ml": ["brigth"]}}, made.preprocessing, schema)
    with pytest.raises(LdmError, match="unit is 'years'"):
        find_instrument({**config, "measures": {"age": ["bright"]}}, made.preprocessing, schema)


def test_label_classes_follow_the_names():
    classes = LabelClasses.from_config({"a": 4, "b": [7, 9]})
    assert classes.classes(torch.tensor([0, 4, 5, 7, 9], dtype=torch.uint8)).tolist() == [0, 1, 0, 2, 2]
    with pytest.raises(LdmError, match="value 4 is in 'a' and in 'b'"):
        LabelClasses.from_config({"a": 4, "b": [4]})
