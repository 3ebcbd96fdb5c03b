"""Sampling from a model: the starting noise, what its network is shown, guidance by covariate, a learned variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.diffusion.continuous import FlowSchedule
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions
from tests.model.test_transfer import AGE, SEX, model

FLOW = {"schedule": {"kind": "flow", "shift": "resolution", "base_positions": 16}, "prediction_type": "flow"}
EDM = {"schedule": {"kind": "edm"}, "prediction_type": "edm"}
LEARNED = {"learned_variance": True}


def record_calls(made):
    """What the network is called with: (input, time, condition) of every call."""
    calls, network = [], made.network.forward

    def forward(x, t, condition):
        calls.append((x, t, condition))
        return network(x, t, condition)

    made.network.forward = forward
    return calls


@pytest.mark.parametrize("settings", [{}, FLOW, EDM], ids=["discrete", "flow", "edm"])
def test_the_first_call_sees_unit_noise_at_the_top_of_the_scale(settings):
    made = model([AGE, SEX], "adaptive_norm", **settings)
    calls = record_calls(made)
    made.sample_latents(made.encode_condition([{}] * 64), 0, range(64), SamplingOptions(num_inference_steps=4))
    x, t, _ = calls[0]
    assert x.std().item() == pytest.approx(1.0, abs=0.02)
    assert t.tolist() == pytest.approx([999.0 if not settings else 1000.0] * 64)
    assert all(t.dtype == torch.float32 for _, t, _ in calls)
    times = [t[0].item() for _, t, _ in calls]
    assert times == sorted(times, reverse=True)


def test_the_shift_is_resolved_by_the_latents_size_and_kept_in_the_file(tmp_path):
    made = model([AGE], "concat", **FLOW)
    assert made.schedule == FlowSchedule(shift=2.0)  # sqrt(64 / 16)
    made.save(tmp_path / "m.safetensors")
    assert LatentDiffusionModel.load(tmp_path / "m.safetensors").schedule == made.schedule


def test_scales_by_covariate_follow_the_formula_and_ask_for_no_more():
    made = model([AGE, SEX], "adaptive_norm")
    values = made.encode_condition([{"age": 50.0, "sex": "F"}] * 2)
    step = next(iter(made.schedule.grid(3)))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    no_age = made.encode_condition([{"sex": "F"}] * 2)
    with torch.no_grad():
        whole, without = made.denoise_many(x, step, [values, no_age])
        calls = record_calls(made)
        settings = SamplingOptions(guidance_scale={"age": 2.5, "sex": 1.0})
        prediction = made.guided_denoise(values, settings)(x, step)
    torch.testing.assert_close(prediction.eps, whole.eps + 1.5 * (whole.eps - without.eps), rtol=1e-4, atol=1e-4)
    assert [len(x) for x, _, _ in calls] == [4]
    with pytest.raises(
        LdmError, match="conditioner 'aeg' is not known; legal: age, sex, covariates. Did you mean 'age'"
    ):
        made.sample({}, n=1, guidance_scale={"aeg": 2.0})


def test_guidance_stays_in_its_interval():
    made = model([AGE], "concat", **FLOW)
    calls = record_calls(made)
    options = {"num_inference_steps": 10, "timestep_spacing": "trailing", "sampler": "ddim"}
    options |= {"guidance_scale": 3.0, "guidance_interval": [0.5, 2.0]}
    made.sample({"age": 50.0}, n=1, precision="float32", **options)
    ratios = [sigma / alpha if alpha else math.inf for alpha, sigma in zip(*grid_levels(made, 10), strict=True)]
    assert [len(x) for x, _, _ in calls] == [2 if 0.5 < ratio <= 2.0 else 1 for ratio in ratios]
    assert {len(x) for x, _, _ in calls} == {1, 2}


def grid_levels(made, count):
    grid = made.schedule.grid(count)
    return grid.alpha[:-1], grid.sigma[:-1]


def test_a_learned_variance_is_read_from_the_second_half_and_sampled_with(tmp_path):
    made = model([AGE], "concat", **LEARNED)
    step = next(iter(made.schedule.grid(3)))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = made.encode_condition([{"age": 50.0}] * 2)
    with torch.no_grad():
        output = made.evaluate(made.network, x, torch.full((2,), step.t), values)
        prediction = made.denoise_many(x, step, [values])[0]
    assert output.shape == (2, 6, 8, 8)
    torch.testing.assert_close(prediction.variance, (output[:, 3:] + 1) / 2)
    torch.testing.assert_close(prediction.x0, step.alpha * x - step.sigma * output[:, :3], rtol=1e-4, atol=1e-4)
    made.save(tmp_path / "m.safetensors")
    again = LatentDiffusionModel.load(tmp_path / "m.safetensors")
    options = {"n": 1, "seed": 3, "sampler": "ddpm", "options": {"variance": "learned"}, "precision": "float32"}
    images = again.sample({"age": 50.0}, **options).images
    assert (images == made.sample({"age": 50.0}, **options).images).all()
    small = made.sample({"age": 50.0}, **{**options, "options": {"variance": "small"}}).images
    assert abs(images - small).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dpmpp"}, "Did you mean 'dpmpp_2m'"),
        ({"sampler": "heun", "options": {"eta": 1.0}}, "Option of sampler 'heun'"),
        ({"timestep_spacing": "trail"}, "Did you mean 'trailing'"),
        ({"guidance_interval": [2.0, 1.0]}, "guidance_interval is"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"guidance_interval": ["a", 2]}, "guidance_interval is"),
        ({"guidance_rescale": 2.0}, "guidance_rescale is 2.0"),
        ({"guidance_rescale": None}, "guidance_rescale is None"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"sampler": "ddim", "options": {"eta": "high"}}, "eta is 'high'"),
        ({"options": {"clip": 1.0}}, "clip is 1.0; legal: two numbers"),
        ({"options": {"clip": [None, 1]}}, "clip is"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(LdmError, match=message):
        SamplingOptions(**options)


def test_a_model_that_cannot_be_sampled_is_not_built():
    with pytest.raises(LdmError, match="'epsilon' does not go with schedule 'flow'"):
        model([AGE], "concat", **{**FLOW, "prediction_type": "epsilon"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddpm", "options": {"variance": "fixed_small"}}, "variance 'fixed_small' is not known"),
        ({"sampler": "ddim", "options": {"eta": 2.0}}, "eta is 2.0; legal: 0"),
        ({"options": {"clip": [1, -1]}}, "clip"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": 5000}, "num_inference_steps=5000 is more than the 1000"),
        ({"guidance_scale": "two"}, "guidance_scale is 'two'"),
        ({"guidance_scale": {"aeg": 2.0}}, "Did you mean 'age'"),
        ({"guidance_scale": {"age": 2.0, "covariates": 2.0}}, "age would be guided twice"),
        ({"sampler": "ddpm", "options": {"variance": "learned"}}, "needs a model with ldm.learned_variance"),
    ],
)
def test_what_a_model_cannot_be_drawn_from_with_is_refused_when_it_is_made(settings, message):
    with pytest.raises(LdmError, match=message):
        model([AGE], "adaptive_norm", sampling=settings)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"n": 0}, "n must be a whole number"),
        ({"guidance_scale": {"age": 2.0, "covariates": 2.0}}, "age would be guided twice"),
        ({"sampler": "ddpm", "options": {"variance": "learned"}}, "needs a model with ldm.learned_variance"),
    ],
)
def test_what_cannot_be_drawn_is_refused(asked, message):
    with pytest.raises(LdmError, match=message):
        model([AGE], "adaptive_norm").sample({"age": 50.0}, **asked)


def test_conditions_are_asked_one_by_one_where_memory_does_not_allow_more(caplog):
    made = model([AGE], "adaptive_norm")
    asked = {"n": 2, "guidance_scale": 2.0, "num_inference_steps": 3, "precision": "float32"}
    together = made.sample({"age": 50.0}, **asked).images
    network, sizes = made.network.forward, []

    def small(x, t, condition):
        if len(x) > 2:
            raise torch.OutOfMemoryError("no more")
        sizes.append(len(x))
        return network(x, t, condition)

    made.network.forward = small
    apart = made.sample({"age": 50.0}, **asked).images
    assert sizes == [2] * 6
    assert np.abs(apart - together).max() < 1e-5
    assert caplog.text.count("one after the other") == 1


def test_memory_for_one_condition_has_to_be_there():
    made = model([AGE], "adaptive_norm")

    def none(x, t, condition):
        raise torch.OutOfMemoryError("no more")

    made.network.forward = none
    with pytest.raises(torch.OutOfMemoryError):
        made.sample({"age": 50.0}, n=2, guidance_scale=2.0)


def test_options_of_one_sampler_are_not_those_of_another():
    made = model(
        [AGE], "adaptive_norm", sampling={"sampler": "ddpm", "options": {"variance": "large", "clip": [-1, 1]}}
    )
    assert made.settings({"sampler": "dpmpp_2m_sde"}).options == {"clip": [-1, 1]}
    assert made.settings({"sampler": "ddim", "options": {"eta": 0.5}}).options == {"clip": [-1, 1], "eta": 0.5}
    assert made.settings({}).options == {"variance": "large", "clip": [-1, 1]}


def test_a_model_that_never_hid_its_covariates_neither_goes_without_nor_is_guided():
    made = model([AGE, SEX], "adaptive_norm", learned_null=False)
    made.sample({"age": 50.0, "sex": "F"}, n=1)
    with pytest.raises(LdmError, match="go without sex: ask"):
        made.sample({"age": 50.0}, n=1)
    with pytest.raises(LdmError, match="guidance_scale is 2"):
        made.sample({"age": 50.0, "sex": "F"}, n=1, guidance_scale=2.0)
    unconditional = model([AGE], "none", learned_null=False)
    unconditional.sample(n=1)


def test_a_sample_is_the_same_alone_and_among_eight():
    made = model([AGE], "adaptive_norm", sampling={"num_inference_steps": 6})
    rows = [{"age": 40.0 + 5 * k} for k in range(8)]
    together, alone = (made.sample(rows, seed=3, batch_size=size).images for size in (8, 1))
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1
