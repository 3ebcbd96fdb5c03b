"""The schedules against their papers' formulae and diffusers, and the pairs of times of every spacing."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grid import Grid, Step
from ldm.diffusion.process import schedule_from_dict
from ldm.diffusion.schedule import TIMESTEP_SPACINGS, NoiseSchedule
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


def test_tables_stay_on_the_cpu_whatever_the_default_device():
    for name in SCHEDULES:
        with torch.device("meta"):
            schedule = NoiseSchedule(10, name)
            assert not schedule.ends_in_pure_noise
        assert schedule.alphas_cumprod.device.type == "cpu"
        assert schedule.grid(5).alpha[-1] == 1


def test_cosine_is_capped_at_the_noise_end_only():
    betas, abar = SCHEDULES["cosine"].betas, SCHEDULES["cosine"].alphas_cumprod
    assert (betas == 0.999).nonzero().flatten().tolist() == [999]
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert abar[499].item() == pytest.approx(f[1] / f[0], rel=1e-12)


def test_sigmoid_is_the_formula_of_its_paper():
    """Chen 2023, algorithm 1 (Jabri et al. 2022), at start -3, end 3, tau 1."""
    schedule = NoiseSchedule(1000, "sigmoid")
    start, end = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    for t in (0, 100, 500, 998):
        output = 1 / (1 + math.exp(-((t + 1) / 1000 * 6 - 3)))
        assert schedule.alphas_cumprod[t].item() == pytest.approx((end - output) / (end - start), rel=1e-9)
    assert (schedule.betas == 0.999).nonzero().flatten().tolist() == [999]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_is_that_of_diffusers(name):
    plain = NoiseSchedule(1000, name)
    schedule = NoiseSchedule(1000, name, rescale_zero_terminal_snr=True)
    torch.testing.assert_close(schedule.betas, rescale_zero_terminal_snr(plain.betas), rtol=1e-9, atol=1e-12)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    assert schedule.ends_in_pure_noise
    assert not plain.ends_in_pure_noise
    assert schedule.log_snr(torch.tensor([999])).item() == -math.inf
    assert schedule.grid(10).alpha[0] == 0


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
        "kind": "discrete", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
        "beta_end": 0.02, "rescale_zero_terminal_snr": False,
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
        ({"beta_schedule": "sigmoid", "beta_end": 0.02}, "no effect on the sigmoid schedule"),
        ({"num_train_timesteps": 1, "rescale_zero_terminal_snr": True}, "at least 2"),
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


@pytest.mark.parametrize("count", [1, 2, 5, 10, 20, 50])
def test_karras_times_are_those_of_diffusers_less_the_last(count):
    schedule = NoiseSchedule(1000, "scaled_linear")
    oracle = DPMSolverMultistepScheduler(
        1000, trained_betas=schedule.betas.numpy(), use_karras_sigmas=True, final_sigmas_type="zero"
    )
    oracle.set_timesteps(count + 1)
    # diffusers rounds an interpolation between times, here the nearest time is taken
    np.testing.assert_allclose(schedule.grid(count, "karras").t[:-1], oracle.timesteps.numpy()[:count], atol=1)


def test_karras_levels_of_pure_noise_begin_there():
    for schedule in (NoiseSchedule(rescale_zero_terminal_snr=True), FlowSchedule(shift=2.0)):
        grid = schedule.grid(5, "karras")
        assert (grid.alpha[0], grid.sigma[0]) == (0.0, 1.0)
    flow = [sigma / alpha for alpha, sigma in zip(grid.alpha[1:-1], grid.sigma[1:-1], strict=True)]
    expected = [2 * (999 ** (1 / 7) * (1 - k / 5) + 999 ** (-1 / 7) * k / 5) ** 7 for k in range(1, 5)]
    assert flow == pytest.approx(expected)
    edm = EDMSchedule()
    assert edm.grid(5, "karras") == edm.grid(5, "trailing")


def test_cubic_levels_are_those_where_ten_moves_are_worth_it():
    """From 20 to 0.01 in their cube root, whatever the schedule; from pure noise; the range grows with the moves."""
    expected = [(20 ** (1 / 3) * (1 - k / 10) + 0.01 ** (1 / 3) * k / 10) ** 3 for k in range(1, 10)]
    for schedule, accuracy in ((FlowSchedule(), 1e-9), (EDMSchedule(), 1e-9), (NoiseSchedule(), 0.03)):
        grid = schedule.grid(10, "cubic")
        found = [sigma / alpha for alpha, sigma in zip(grid.alpha[1:-1], grid.sigma[1:-1], strict=True)]
        assert found == pytest.approx(expected, rel=accuracy, abs=accuracy)
        assert grid.t[0] == schedule.grid(10, "trailing").t[0]
    many = FlowSchedule().grid(100, "cubic")
    assert many.sigma[1] / many.alpha[1] > 150
    assert many.sigma[-2] / many.alpha[-2] < 0.005


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
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
    if spacing in ("trailing", "karras", "cubic"):
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


def test_a_chain_can_start_at_a_level():
    grid = SCHEDULES["linear"].grid(10)  # 999, 899, ..., 99, -1
    assert grid.below(500).t == (499, 399, 299, 199, 99, -1)
    assert grid.below(499) == grid.last(5)
    assert list(grid.last(3)) == list(grid)[-3:]
    assert grid.last(10) == grid
    with pytest.raises(LdmError, match="Cannot keep 11 moves of a grid that has 10"):
        grid.last(11)
    with pytest.raises(LdmError, match="t <= 50: its last one starts at 99"):
        grid.below(50)


# ---- continuous time


def test_training_times_have_the_distribution_that_is_asked():
    """Quantiles against the distributions of torch; middles of ten bins, as validation takes them."""
    middles = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    assert NoiseSchedule().time_at(middles).tolist() == list(range(50, 1000, 100))
    torch.testing.assert_close(FlowSchedule().time_at(middles).double(), middles, rtol=1e-6, atol=0)
    normal = torch.distributions.Normal(0.3, 1.5)
    t = FlowSchedule("logit_normal", 0.3, 1.5).time_at(middles).double()
    torch.testing.assert_close(normal.cdf(torch.logit(t)), middles, rtol=1e-5, atol=0)
    sigma = EDMSchedule(P_mean=-1.2, P_std=1.2).time_at(middles).double()
    torch.testing.assert_close(torch.distributions.LogNormal(-1.2, 1.2).cdf(sigma), middles, rtol=1e-5, atol=0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert NoiseSchedule().time_at(ends).tolist() == [0, 999]
    assert FlowSchedule("logit_normal", shift=3.0).time_at(ends).tolist() == [0, 1]
    assert EDMSchedule().time_at(ends).tolist() == pytest.approx([0.002, 80.0])


def test_shift_moves_training_times_and_grids_alike():
    """Esser et al. 2024, eq. 23; sqrt(m / n) leaves the same noise, relative to what n positions average out."""
    plain, shifted = FlowSchedule(), FlowSchedule(shift=3.0)
    expected = [3 * t / (1 + 2 * t) for t in plain.grid(10).t]
    assert shifted.grid(10).t == pytest.approx(expected)
    u = torch.tensor([0.25, 0.5])
    assert shifted.time_at(u).tolist() == pytest.approx([0.5, 0.75])
    flow = {"kind": "flow", "shift": "resolution", "base_positions": 1024}
    assert schedule_from_dict(flow, positions=9216).shift == pytest.approx(3.0)
    assert schedule_from_dict({**flow, "shift": 2.0}, positions=9216).shift == 2.0


def test_the_grid_of_edm_is_equation_5():
    sigma = EDMSchedule(sigma_min=0.002, sigma_max=80.0, rho=7.0).grid(18, "linspace").sigma
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert sigma == pytest.approx([*expected, 0.0], rel=1e-12)


@pytest.mark.parametrize("schedule", [NoiseSchedule(), FlowSchedule(), EDMSchedule()], ids=lambda s: s.kind)
def test_the_network_sees_unit_variance_and_float32_times_between_0_and_1000(schedule):
    t = schedule.time_at(torch.linspace(0.001, 0.999, 50))
    told = schedule.network_time(t)
    assert told.dtype == torch.float32
    assert ((told >= 0) & (told <= 1000)).all()
    assert (told.diff() > 0).all()
    power = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    scaled = (schedule.input_scale(t) * power.sqrt()).tolist()
    assert scaled == pytest.approx([1.0] * 50) if schedule.kind != "flow" else min(scaled) > 0.7
    assert schedule.input_scale(t).dtype == torch.float32


discrete = st.builds(
    NoiseSchedule,
    st.integers(2, 1000),
    st.sampled_from(["linear", "scaled_linear", "cosine", "sigmoid"]),
    rescale_zero_terminal_snr=st.booleans(),
)
flow = st.builds(
    FlowSchedule,
    st.sampled_from(["uniform", "logit_normal"]),
    st.floats(-2, 2),
    st.floats(0.3, 2),
    st.floats(0.2, 8),
)
edm = st.builds(
    EDMSchedule,
    st.floats(-2, 1),
    st.floats(0.3, 2),
    st.floats(0.001, 0.1),
    st.floats(10, 200),
    st.floats(1, 10),
)


@settings(max_examples=80, deadline=None)
@given(st.one_of(discrete, flow, edm), st.sampled_from(TIMESTEP_SPACINGS), st.integers(1, 40))
def test_what_every_schedule_keeps(schedule, spacing, count):
    assert schedule_from_dict(schedule.to_dict()) == schedule
    # noise grows with the quantile
    t = schedule.time_at(torch.linspace(0.01, 0.99, 20, dtype=torch.float64))
    assert (t.diff() >= 0).all()
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert (log_snr[1:] <= log_snr[:-1] + 1e-6).all()  # both may be -inf
    finite = log_snr.isfinite() & (log_snr.abs() < 10)
    torch.testing.assert_close(2 * (alpha / sigma).log()[finite], log_snr[finite], rtol=1e-3, atol=1e-3)
    x0, eps = torch.full((20, 1, 2), 2.0), torch.full((20, 1, 2), -3.0)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t)[:, 0, 0], 2 * alpha - 3 * sigma)
    # a grid walks from its noisiest point to the data, through the schedule's own levels
    if schedule.kind == "discrete":
        count = min(count, schedule.num_train_timesteps)
    grid = schedule.grid(count, spacing)
    assert len(grid) == count
    assert (grid.alpha[-1], grid.sigma[-1]) == (1.0, 0.0)
    ratios = [s / math.hypot(a, s) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    assert all(before > after for before, after in itertools.pairwise(ratios))
    times = torch.tensor(grid.t[:-1])
    torch.testing.assert_close(schedule.alpha(times).tolist(), list(grid.alpha[:-1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(schedule.sigma(times).tolist(), list(grid.sigma[:-1]), rtol=1e-4, atol=1e-6)
