"""The variational term of a learned variance against torch's distributions, and whom its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.posterior import variational_term
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule(1000, "linear")


def example(t):
    x0, error, v = torch.randn(3, len(t), 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return x0, x0 + 0.1 * error, torch.sigmoid(v)


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule(1000, "cosine", rescale_zero_terminal_snr=True)])
def test_terms_are_those_of_the_papers(schedule):
    """Nichol & Dhariwal 2021, eq. 4 to 7 and 15, with means and variances from DDPM (7)."""
    times = [0, 1, 2, 500, 999]
    x0, guess, v = example(times)
    ours = variational_term(schedule, Prediction(guess, guess, v), x0, torch.tensor(times))
    abar = schedule.alphas_cumprod.tolist()
    for b, t in enumerate(times):
        abar_prev = abar[t - 1] if t else 1.0
        beta = 1 - abar[t] / abar_prev
        tilde = (1 - abar_prev) / (1 - abar[t]) * beta
        floor = tilde if t else (1 - abar[0]) / (1 - abar[1]) * (1 - abar[1] / abar[0])
        of_x0 = math.sqrt(abar_prev) * beta / (1 - abar[t])  # what is common to both means falls out
        std = torch.exp(0.5 * (v[b] * math.log(beta) + (1 - v[b]) * math.log(floor)))
        model = Normal(of_x0 * guess[b], std)
        expected = kl_divergence(Normal(of_x0 * x0[b], math.sqrt(tilde)), model) if t else -model.log_prob(x0[b])
        assert ours[b].item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_the_gradient_reaches_the_variance_alone():
    times = torch.tensor([0, 3, 700])
    x0, guess, v = example(times)
    guess.requires_grad_()
    v.requires_grad_()
    variational_term(SCHEDULE, Prediction(guess, guess, v), x0, times).sum().backward()
    assert guess.grad is None
    assert (v.grad.abs() > 0).all()


def test_the_best_variance_of_a_perfect_mean_is_the_posteriors():
    times = torch.tensor([5, 300])
    x0, _, _ = example(times)
    values = [
        variational_term(SCHEDULE, Prediction(x0, x0, torch.full_like(x0, v)), x0, times) for v in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(values[0], torch.zeros_like(values[0]), rtol=0, atol=1e-9)
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()
