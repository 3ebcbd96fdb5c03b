"""The second stage's loss: what it wants is what samplers read; a learned variance learns by its bound alone."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.noise import step_generator
from ldm.errors import LdmError
from ldm.training.latent_diffusion import LatentDiffusion
from tests.model.test_sampling import EDM, FLOW, LEARNED
from tests.model.test_transfer import AGE, model
from tests.training.test_stages import OPTIMIZER

LOSS = {"weighting": "uniform", "gamma": 5.0, "vlb_weight": 0.001}


def stage(settings, **loss):
    return LatentDiffusion(model([AGE], "concat", **settings), OPTIMIZER, {**LOSS, **loss})


def batch_and_draws(module, size=6):
    generator = step_generator(0, 0, 0)
    shape = (size, 3, 8, 8)
    batch = {
        "mean": torch.randn(shape, generator=generator),
        "std": torch.zeros(shape),
        "covariates": torch.rand(size, 1, generator=generator),
    }
    uniforms = torch.rand(size, generator=generator, dtype=torch.float64)
    draws = {
        "t": module.model.schedule.time_at(uniforms),
        "hide": None,
        "posterior": torch.zeros(shape),
        "eps": torch.randn(shape, generator=generator),
    }
    return batch, draws


@pytest.mark.parametrize("settings", [{}, FLOW, EDM], ids=["discrete", "flow", "edm"])
def test_a_network_that_knows_x0_and_eps_has_no_loss(settings):
    """The target is what the sampler reads: an output that a sampler takes for the truth costs nothing."""
    module = stage(settings)
    batch, draws = batch_and_draws(module)
    _, plain = module.losses(module.network, batch, draws)
    assert plain.shape == (6,)
    assert (plain > 0.1).all()
    schedule = module.model.schedule
    alpha, sigma = schedule.alpha(draws["t"]), schedule.sigma(draws["t"])
    x_t = schedule.add_noise(batch["mean"], draws["eps"], draws["t"])
    shown = []

    class Oracle(torch.nn.Module):
        def forward(self, x, t, condition):
            shown.append((x, t))
            p, q = {"v_prediction": (-sigma, alpha), "flow": (-1 + 0 * sigma, 1 + 0 * sigma)}.get(
                module.model.prediction_type, (sigma / (1 + sigma**2).sqrt(), -1 / (1 + sigma**2).sqrt())
            )
            return p.view(-1, 1, 1, 1) * batch["mean"] + q.view(-1, 1, 1, 1) * draws["eps"]

    _, plain = module.losses(Oracle(), batch, draws)
    torch.testing.assert_close(plain, torch.zeros(6), rtol=0, atol=1e-6)
    x, t = shown[0]
    torch.testing.assert_close(x, x_t * schedule.input_scale(draws["t"]).view(-1, 1, 1, 1))
    assert t.dtype == torch.float32


def test_the_bound_trains_the_variance_and_leaves_the_mean_alone():
    def gradient(**loss):
        module = stage(LEARNED, **loss)
        batch, draws = batch_and_draws(module)
        draws["t"] = torch.arange(6)  # where small and large variance differ
        weighted, plain = module.losses(module.network, batch, draws)
        weighted.mean().backward()
        return plain, module.network.denoiser.unet.out[2].conv.weight.grad  # (2 C, ...)

    plain, little = gradient(vlb_weight=1e-9)
    same, much = gradient(vlb_weight=0.001)
    torch.testing.assert_close(plain, same)
    torch.testing.assert_close(little[:3], much[:3], rtol=1e-3, atol=1e-5)
    assert much[3:].norm() > 1e-3
    assert little[3:].norm() < 1e-3 * much[3:].norm()
    with pytest.raises(LdmError, match="vlb_weight > 0"):
        stage(LEARNED, vlb_weight=0.0)


def test_min_snr_where_chains_start_at_pure_noise_is_warned_of(caplog):
    stage(EDM, weighting="min_snr")
    assert not caplog.records
    stage(FLOW, weighting="min_snr")
    assert "no weight" in caplog.text
