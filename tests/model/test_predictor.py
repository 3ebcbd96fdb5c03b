"""A predictor file: what comes back, what its outputs mean, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.first_stage import FirstStage
from ldm.model.predictor import Predictor, Targets, build_predictor

SCHEMA = CovariateSchema(
    [
        Covariate("site", "categorical", levels=("a", "b", "c")),
        Covariate("age", "continuous", "years", (0.0, 100.0)),
        Covariate("sex", "categorical", levels=("F", "M")),
    ]
)
ROWS = [{"age": 40.0, "sex": "F", "site": "a"}, {"age": 60.0, "sex": None, "site": "b"}, {"age": None, "sex": "M"}]


def predictor(names=("age", "sex"), in_channels=2, spatial_dims=2):
    torch.manual_seed(0)
    targets = Targets.fit(SCHEMA, ROWS, names)
    config = {"spatial_dims": spatial_dims, "in_channels": in_channels, "out_channels": sum(targets.sizes.values())}
    config |= {"channels": [8, 16], "norm_num_groups": 4}
    shape = (12, 8, 8)[:spatial_dims]
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if spatial_dims == 3 else None
    recipe = Preprocessing(
        spatial_dims,
        orientation="RAS" if spatial_dims == 3 else None,
        shape=shape,
        multiple=(1,) * spatial_dims,
        intensity=IntensityRecipe("window", 0, 255),
        channels=tuple(f"c{i}" for i in range(in_channels)),
        reference=Geometry.plan(shape, affine, "RAS" if spatial_dims == 3 else None, None, shape),
    )
    facts = {"cohort": "test", "split_sha256": "0" * 64, "steps": 1}
    return Predictor(build_predictor(config).eval(), config, targets, recipe, {"predictor/val/r/age": 0.5}, facts)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_saved_predictor_predicts_the_same_whatever_the_batch(tmp_path, spatial_dims):
    made = predictor(spatial_dims=spatial_dims)
    made.save(tmp_path / "model.safetensors")
    loaded = Predictor.load(tmp_path / "model.safetensors")
    images = torch.rand(5, *made.preprocessing.image_shape)
    for name, values in made.predict(images).items():
        assert torch.equal(loaded.predict(images.numpy())[name], values)
    features = loaded.features(images)
    assert features.shape == (5, 16)
    assert features.dtype == torch.float32
    one_by_one = torch.cat([loaded.features(image[None]) for image in images])
    torch.testing.assert_close(features, one_by_one, rtol=1e-5, atol=1e-6)
    assert features.std(0).max() > 1e-3
    assert loaded.targets == made.targets
    assert loaded.preprocessing == made.preprocessing
    assert loaded.metrics == made.metrics
    assert loaded.facts == made.facts
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ldm"])["tensors_sha256"] == loaded.sha256


def test_outputs_are_probabilities_and_values_in_the_unit():
    targets = Targets.fit(SCHEMA, ROWS, ["sex", "age"])
    assert targets.sizes == {"sex": 2, "age": 1}
    assert targets.moments == {"age": (50.0, 10.0)}  # of the rows that have one
    found = targets.predict(torch.tensor([[0.0, np.log(3.0), -1.5]], dtype=torch.float32))
    torch.testing.assert_close(found["sex"], torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(found["age"], torch.tensor([35.0]))
    rows = [{"sex": "M", "age": 35.0}, {"sex": None, "age": None}]
    truth = targets.truth(torch.from_numpy(targets.schema.encode_table(rows)))
    torch.testing.assert_close(truth["sex"], torch.tensor([1.0, np.nan]), equal_nan=True)
    torch.testing.assert_close(truth["age"], torch.tensor([-1.5, np.nan]), equal_nan=True)


def test_brightness_can_be_seen():
    """Normalisation of every image by itself would make a brighter image the same one."""
    network = predictor(in_channels=1).network
    dark, bright = (network.features(torch.full((1, 1, 16, 16), value)) for value in (0.2, 0.8))
    assert (bright - dark).abs().max() > 0.2 * dark.abs().max()


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(LdmError, match="no covariate 'sexx'.*Did you mean 'sex'"):
        Targets.fit(SCHEMA, ROWS, ["sexx"])
    with pytest.raises(LdmError, match="needs covariates to predict"):
        Targets.fit(CovariateSchema(), ROWS)
    with pytest.raises(LdmError, match="no training record has a value of 'sex'"):
        Targets.fit(SCHEMA, [{"age": 1.0}], ["sex"])
    with pytest.raises(LdmError, match="channels is .12..*multiple of norm_num_groups, 8"):
        build_predictor({"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [12]})
    made = predictor()
    for shape in ((1, 1, 8, 8), (2, 8, 8), (1, 2, 8, 8, 8)):
        with pytest.raises(LdmError, match="2-D images with 2 channels"):
            made.features(torch.zeros(shape))
    made.save(tmp_path / "predictor.safetensors")
    with pytest.raises(LdmError, match="kind 'predictor', expected 'first_stage'"):
        FirstStage.load(tmp_path / "predictor.safetensors")
    first_stage = FirstStage(torch.nn.Linear(2, 2), {}, made.preprocessing)
    first_stage.save(tmp_path / "vae.safetensors")
    with pytest.raises(LdmError, match="kind 'first_stage', expected 'predictor'"):
        Predictor.load(tmp_path / "vae.safetensors")
