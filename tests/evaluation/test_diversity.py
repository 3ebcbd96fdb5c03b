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
from ldm.evaluation.diversity import nearest_pairs, spread
from ldm.evaluation.instruments import find_instrument
from ldm.model.segmenter import Segmenter, build_segmenter


def test_nearest_pairs_are_nearest_in_standardised_covariates():
    codes = np.array([[0.0, 0.0], [0.001, 0.0], [0.0, 1.0], [0.0, np.nan], [0.001, 1.0]])
    assert (0, 1) in nearest_pairs(codes)
    assert (2, 4) in nearest_pairs(codes)


def test_copies_have_no_spread():
    rng = np.random.default_rng(0)
    images = [rng.random((1, 24, 24), dtype=np.float32) for _ in range(2)]
    same = spread([images[0], images[0]], [(0, 1)], (0.0, 1.0))
    different = spread(images, [(0, 1)], (0.0, 1.0))
    assert same["ms_ssim"]["mean"] == pytest.approx(1.0, abs=1e-5)
    assert same["rms"]["mean"] == 0
    assert different["ms_ssim"]["mean"] < 0.5
    assert different["rms"]["mean"] == pytest.approx((1 / 6) ** 0.5, rel=0.1)  # of two uniform variables


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
