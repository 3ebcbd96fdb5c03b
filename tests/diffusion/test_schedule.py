"""The noise schedule against its papers' formulae and diffusers, and the pairs of times of every spacing."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion.schedule import Grid, NoiseSchedule, Step
from ldm.errors import LdmError

SCHEDULES = {
    "linear": NoiseSchedule(1000, "linear"),
    "scaled_linear": NoiseSchedule(1000, "scaled_linear", 0.0015, 0.0205),
    "cosine": NoiseSchedule(1000, "cosine"),
}
DIFFUSERS_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def diffusers_scheduler(name: str, **options) -> DDPMScheduler:
    schedule = SCHEDULES[name]
    betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end} if name != "cosine" else {}
    return DDPMScheduler(schedule.num_train_timesteps, beta_schedule=DIFFUSERS_NAMES[name], **betas, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_those_of_diffusers_in_float64(name):
    schedule, oracle = SCHEDULES[name], diffusers_scheduler(name)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.betas.float(), oracle.betas, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), oracle.alphas_cumprod, rtol=2e-4, atol=0)


def test_cosine_is_capped_at_the_noise_end_only():
    betas, abar = SCHEDULES["cosine"].betas, SCHEDULES["cosine"].alphas_cumprod
    assert (betas == 0.999).nonzero().flatten().tolist() == [999]
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert abar[499].item() == pytest.approx(f[1] / f[0], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_of_t(name):
    schedule, t = SCHEDULES[name], torch.tensor([0, 1, 500, 999])
    abar = schedule.alphas_cumprod[t]
    for value, expected in (
        (schedule.alpha(t), abar.sqrt()),
        (schedule.sigma(t), (1 - abar).sqrt()),
        (schedule.log_snr(t), (abar / (1 - abar)).log()),
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(IndexError):  # not silently the last entry of the table
        schedule.alpha(torch.tensor([-1]))


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 4, 5, 6)])
def test_add_noise_weighs_each_sample_by_its_own_t_and_changes_no_state(shape):
    schedule, t = SCHEDULES["scaled_linear"], torch.tensor([0, 400, 999])
    x0, eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [schedule.alphas_cumprod[k] ** 0.5 * a + (1 - schedule.alphas_cumprod[k]) ** 0.5 * e
         for k, a, e in zip(t, x0.double(), eps.double(), strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(schedule.add_noise(x0, eps, t).double(), expected, rtol=1e-6, atol=1e-6)

    noised = schedule.add_noise(x0.half(), eps.half(), t)
    assert noised.dtype == torch.float32
    assert schedule.alphas_cumprod.dtype == torch.float64
    schedule.alphas_cumprod.zero_()  # a copy: the schedule itself stands
    assert schedule.alphas_cumprod[0] > 0.99


def test_round_trip_and_the_betas_of_the_papers():
    for schedule in SCHEDULES.values():
        assert NoiseSchedule.from_dict(schedule.to_dict()) == schedule
    assert NoiseSchedule().to_dict() == {
        "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    }  # fmt: skip
    with pytest.raises(AttributeError):
        NoiseSchedule().beta_end = 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps must be a whole number"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps must be a whole number"),
        ({"beta_schedule": "scaled-linear"}, "Did you mean 'scaled_linear'"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "0 < beta_start <= beta_end < 1"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_end": "2e-2"}, "beta_end must be a number"),
        ({"beta_schedule": "cosine", "beta_end": 0.02}, "no effect on the cosine schedule"),
    ],
)
def test_illegal_parameters_are_refused(options, message):
    with pytest.raises(LdmError, match=message):
        NoiseSchedule(**options)
    with pytest.raises(LdmError, match="Did you mean 'beta_end'"):
        NoiseSchedule.from_dict({"beta_ende": 0.02})


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_are_those_of_diffusers(spacing):
    oracle = DDPMScheduler(1000, timestep_spacing=spacing)
    for count in range(1, 1001):
        oracle.set_timesteps(count)
        # where its float range is one too long, diffusers adds t = -1
        expected = oracle.timesteps.numpy()[:count]
        np.testing.assert_array_equal(SCHEDULES["linear"].grid(count, spacing).t[:-1], expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 61, 601, 999, 1000])
def test_a_grid_is_a_chain_of_pairs_down_to_the_data(spacing, count):
    schedule = SCHEDULES["scaled_linear"]
    steps = list(schedule.grid(count, spacing))
    assert len(steps) == len(schedule.grid(count, spacing)) == count
    for step, following in itertools.pairwise(steps):
        assert (step.t_prev, step.alpha_prev, step.sigma_prev) == (
            following.t,
            following.alpha,
            following.sigma,
        )
    assert all(0 <= step.t <= 999 and step.t > step.t_prev for step in steps)
    assert (steps[-1].t_prev, steps[-1].alpha_prev, steps[-1].sigma_prev) == (-1, 1.0, 0.0)
    if spacing == "trailing":
        assert steps[0].t == 999
    for step in steps:
        assert isinstance(step.alpha, float)
        assert isinstance(step.t, int)
        assert step.alpha**2 == pytest.approx(schedule.alphas_cumprod[step.t].item(), rel=1e-14)
        assert step.alpha**2 + step.sigma**2 == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("count", [0, -1, 1001, 2.5])
def test_a_grid_of_impossible_length_is_refused(count):
    with pytest.raises(LdmError, match="num_inference_steps"):
        SCHEDULES["linear"].grid(count)
    with pytest.raises(LdmError, match="Did you mean 'trailing'"):
        SCHEDULES["linear"].grid(10, "trailling")


def test_a_chain_that_does_not_start_at_noise_is_told_so(caplog):
    with caplog.at_level(logging.WARNING):
        SCHEDULES["linear"].grid(50)
        assert not caplog.records
        SCHEDULES["linear"].grid(600, "leading")
    assert "starts at t = 599" in caplog.text


def test_a_grid_of_continuous_time_needs_no_schedule():
    flow = Grid(t=(1.0, 0.5, 0.0), alpha=(0.0, 0.5, 1.0), sigma=(1.0, 0.5, 0.0))
    assert list(flow) == [Step(1.0, 0.5, 0.0, 1.0, 0.5, 0.5), Step(0.5, 0.0, 0.5, 0.5, 1.0, 0.0)]
    with pytest.raises(LdmError, match="same two or more points"):
        Grid((1.0, 0.0), (0.0, 1.0), (1.0,))
    with pytest.raises(LdmError, match="finite and not negative"):
        Grid((1.0, 0.0), (0.0, math.nan), (1.0, 0.0))
