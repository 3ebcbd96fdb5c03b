"""Start from another model: covariates keep what was learned for them, at their new place."""

import pytest
import torch

from ldm.conditioning.covariates import MODES
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.latents.space import LatentSpace
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.transfer import start_from

AGE = Covariate("age", "continuous", "years", (40.0, 80.0))
SEX = Covariate("sex", "categorical", levels=("F", "M"))
VOLUME = Covariate("volume", "continuous", "mm3", (0.0, 10.0))


def model(schema, mode, channels=3, seed=0, network=None, **settings):
    torch.manual_seed(seed)
    header = {
        "cohort": "test",
        "split_sha256": "",
        "first_stage": {"kind": "identity", "spatial_dims": 2, "in_channels": channels},
        "first_stage_sha256": "same",
        "latent_shape": [channels, 8, 8],
        "denoiser": {
            "channels": [16, 32],
            "num_res_blocks": 1,
            "attention_levels": [False, True],
            "norm_num_groups": 16,
            "num_head_channels": 16,
            **(network or {}),
        },
        "condition": {"mode": mode, "dim": 8, "drop_rate": 0.1, "drop_all_rate": 0.1},
        "schedule": {"beta_schedule": "linear"},
        "prediction_type": "v_prediction",
        "sampling": {"num_inference_steps": 2},
        "seed": 0,
        **settings,
    }
    preprocessing = Preprocessing(
        2, None, shape=(8, 8), multiple=(2, 2), intensity=IntensityRecipe(), channels=("a",) * channels
    )
    made = LatentDiffusionModel(header, LatentSpace.identity(channels), preprocessing, CovariateSchema(schema))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_covariates_are_mapped_by_name(tmp_path, mode, patch_size):
    source = model([AGE, SEX], mode, network={"patch_size": patch_size})
    source.save(tmp_path / "m.safetensors")
    wider = (
        Covariate("age", "continuous", "years", (20.0, 100.0)) if mode in ("adaptive_norm", "cross_attention") else AGE
    )
    target = model([VOLUME, SEX, wider], mode, seed=5, network={"patch_size": patch_size})
    code = (48.0 - wider.range[0]) / (wider.range[1] - wider.range[0])  # the same 48 years: 0.2 of the source's range
    start_from(target, tmp_path / "m.safetensors")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        # a new covariate has no influence yet where its columns are zero; attention has a new token at once
        for volume in (0.3, torch.nan) if mode != "cross_attention" else ():
            known = source.network(x, t, {"covariates": torch.tensor([[0.2, 1.0]] * 2)})
            mapped = target.network(x, t, {"covariates": torch.tensor([[volume, 1.0, code]] * 2)})
            torch.testing.assert_close(mapped, known, rtol=1e-4, atol=1e-4)
    if mode == "cross_attention":
        known, mapped = (m.network.conditioners.covariates.tokens for m in (source, target))
        torch.testing.assert_close(mapped[2](torch.tensor([code])), known[0](torch.tensor([0.2])))


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (0, 2)])
def test_more_frequencies_of_position_start_without_influence(tmp_path, theirs, ours):
    source = model([AGE], "concat", network={"position_frequencies": theirs})
    source.save(tmp_path / "m.safetensors")
    target = model([AGE], "concat", seed=5, network={"position_frequencies": ours})
    start_from(target, tmp_path / "m.safetensors")
    x, t, asked = torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), {"covariates": torch.tensor([[0.2]] * 2)}
    with torch.no_grad():
        torch.testing.assert_close(target.network(x, t, asked), source.network(x, t, asked), rtol=1e-4, atol=1e-4)


def test_a_range_that_planes_do_not_follow_is_told(tmp_path, caplog):
    model([AGE], "concat").save(tmp_path / "m.safetensors")
    start_from(model([Covariate("age", "continuous", "years", (20.0, 100.0))], "concat"), tmp_path / "m.safetensors")
    assert "age ranges over (20.0, 100.0) here and over (40.0, 80.0)" in caplog.text
    caplog.clear()
    start_from(model([AGE], "concat"), tmp_path / "m.safetensors")
    assert "ranges over" not in caplog.text


def test_another_prediction_is_told(tmp_path, caplog):
    model([AGE], "adaptive_norm", prediction_type="epsilon").save(tmp_path / "m.safetensors")
    start_from(model([AGE], "adaptive_norm"), tmp_path / "m.safetensors")
    assert "predicts 'epsilon', this model 'v_prediction'" in caplog.text


def test_what_cannot_be_mapped_is_refused(tmp_path):
    model([AGE], "concat").save(tmp_path / "m.safetensors")
    with pytest.raises(LdmError, match="conditions by 'concat', this model by 'adaptive_norm'"):
        start_from(model([AGE], "adaptive_norm"), tmp_path / "m.safetensors")
    with pytest.raises(LdmError, match="diffuses 3 latent channels, this model 2"):
        start_from(model([AGE], "concat", channels=2), tmp_path / "m.safetensors")
    with pytest.raises(LdmError, match="sees 1 latent voxels as one, this model 4"):
        start_from(model([AGE], "concat", network={"patch_size": 2}), tmp_path / "m.safetensors")


def test_a_saved_model_samples_the_same(tmp_path):
    source = model([SEX, AGE], "adaptive_norm")  # not in alphabetical order, which a sorted header would give it
    source.save(tmp_path / "m.safetensors")
    again = LatentDiffusionModel.load(tmp_path / "m.safetensors")
    options = {"n": 2, "seed": 3, "precision": "float32"}
    first, second = (one.sample({"age": 50.0}, **options).images for one in (source, again))
    assert (first == second).all()
    assert first.shape == (2, 3, 8, 8)
    source.save(tmp_path / "again.safetensors")
    assert (
        again.header["tensors_sha256"]
        == LatentDiffusionModel.load(tmp_path / "again.safetensors").header["tensors_sha256"]
    )


@pytest.mark.parametrize("name", ["norm_num_groups", "num_head_channels"])
def test_what_no_shape_tells_has_to_agree(tmp_path, name):
    made = model([AGE], "adaptive_norm")
    made.save(tmp_path / "m.safetensors")
    other = model([AGE], "adaptive_norm")
    other.network.denoiser.encoder_arguments[name] = 4
    with pytest.raises(LdmError, match=f"ldm.network.{name}=.*, this model 4: set them alike"):
        start_from(other, tmp_path / "m.safetensors")
