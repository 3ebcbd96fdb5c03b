"""Samplers against mathematics (data whose ideal denoiser is known), diffusers and MONAI.

The Gaussian data are N(0.3, 0.5^2): neither mean 0 nor std 1, where a wrong chain can look right.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM

from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.grid import Grid
from ldm.diffusion.noise import draw, generators
from ldm.diffusion.prediction import PREDICTION_TYPES, Prediction, target, to_prediction
from ldm.diffusion.samplers import SAMPLERS, ddim, ddim_encode, ddpm, euler, sampler
from ldm.diffusion.schedule import TIMESTEP_SPACINGS, NoiseSchedule
from ldm.errors import LdmError

MEAN, STD = 0.3, 0.5
SCHEDULES = {
    "linear": NoiseSchedule(1000, "linear"),
    "scaled_linear": NoiseSchedule(1000, "scaled_linear", 0.0015, 0.0205),
    "cosine": NoiseSchedule(1000, "cosine"),
    "sigmoid": NoiseSchedule(1000, "sigmoid"),
    "zero_snr": NoiseSchedule(1000, "scaled_linear", rescale_zero_terminal_snr=True),
    "flow": FlowSchedule(),
    "flow-shift": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
}
SPACINGS = ["leading", "trailing", "linspace"]  # of diffusers
THEIRS = ["epsilon", "sample", "v_prediction"]  # the prediction types of diffusers and MONAI
CHAINS = {
    "ddpm-small": ("ddpm", {"variance": "small"}),
    "ddpm-large": ("ddpm", {"variance": "large"}),
    "ddpm-learned": ("ddpm", {"variance": "learned"}),
    "ddim-0": ("ddim", {"eta": 0.0}),
    "ddim-0.4": ("ddim", {"eta": 0.4}),
    "ddim-1": ("ddim", {"eta": 1.0}),
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
}
LEARNED = 0.3  # what the network says of the variance: 0 is the small one, 1 the large
DETERMINISTIC = {"ddim-0", "euler", "heun", "dpmpp_2m"}


def ideal_denoise(prediction_type="sample"):
    """The network that minimises the loss: E[x0 | x_t], said in the words of ``prediction_type``."""

    def denoise(x, step):
        x0, eps = ideal(x, step.alpha, step.sigma)
        output = target(prediction_type, x0, eps, step.alpha, step.sigma)
        read = to_prediction(prediction_type, output, x, step.alpha, step.sigma)
        return Prediction(read.x0, read.eps, torch.full_like(x, LEARNED))

    return denoise


def ideal(x, alpha, sigma):
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = MEAN + gain * (x - alpha * MEAN)
    return x0, (x - alpha * x0) / sigma


# ---- mathematics: the papers' updates, written a second time in float64 from the papers' own quantities


def levels_of(schedule, grid):
    """alpha and sigma of a grid's times, from the definition of each path."""
    if isinstance(schedule, NoiseSchedule):
        abar = [schedule.alphas_cumprod[t].item() if t >= 0 else 1.0 for t in grid.t]
        return [(math.sqrt(value), math.sqrt(1 - value)) for value in abar]
    return [(1 - t, t) if isinstance(schedule, FlowSchedule) else (1.0, t) for t in grid.t]


def paper_chain(name, options, levels, x, noises):
    """Walk ``levels`` from x with the ideal denoiser; noises: what to add at each step."""
    update = {"ddpm": paper_ddpm, "ddim": paper_ddim, "euler": paper_euler, "heun": paper_heun}.get(name, paper_dpmpp)
    history = []
    for (alpha, sigma), (alpha_prev, sigma_prev) in itertools.pairwise(levels):
        z = noises.pop(0) if sigma_prev > 0 and noises else 0.0
        history.append((alpha, sigma, ideal(x, alpha, sigma)[0]))
        x = update(x, alpha, sigma, alpha_prev, sigma_prev, z=z, history=history, name=name, **options)
    return x


def in_vp(x, alpha, sigma, alpha_prev, sigma_prev):
    """Any path, scaled to unit variance, is a variance-preserving one: x, abar, abar_prev and the way back's factor."""
    norm, norm_prev = math.hypot(alpha, sigma), math.hypot(alpha_prev, sigma_prev)
    return x / norm, (alpha / norm) ** 2, (alpha_prev / norm_prev) ** 2, norm_prev


def paper_ddpm(x, *levels, z, variance, **_):
    """DDPM (6) and (7) for the pair (t, t_prev)."""
    x, abar, abar_prev, back = in_vp(x, *levels)
    x0 = ideal(x, math.sqrt(abar), math.sqrt(1 - abar))[0]
    beta = 1 - abar / abar_prev
    mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
    share = {"small": 0.0, "learned": LEARNED, "large": 1.0}[variance]  # in the logarithm, Nichol & Dhariwal (15)
    std = math.sqrt(beta * ((1 - abar_prev) / (1 - abar)) ** (1 - share))
    return back * (mean + std * z)


def paper_ddim(x, *levels, z, eta, **_):
    """DDIM (12) and (16)."""
    x, abar, abar_prev, back = in_vp(x, *levels)
    x0 = ideal(x, math.sqrt(abar), math.sqrt(1 - abar))[0]
    std = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    return back * (math.sqrt(abar_prev) * x0 + math.sqrt(max(1 - abar_prev - std**2, 0)) * eps + std * z)


def paper_euler(x, alpha, sigma, alpha_prev, sigma_prev, **_):
    """Flow: x + dt (eps - x0); EDM: x + dsigma eps. Both are dx = dalpha x0 + dsigma eps."""
    x0, eps = ideal(x, alpha, sigma)
    return x + (alpha_prev - alpha) * x0 + (sigma_prev - sigma) * eps


def paper_heun(x, alpha, sigma, alpha_prev, sigma_prev, **_):
    """Karras et al. 2022, algorithm 1, for dx = dalpha x0 + dsigma eps."""
    end = paper_euler(x, alpha, sigma, alpha_prev, sigma_prev)
    if sigma_prev == 0:
        return end
    (x0, eps), (x0_end, eps_end) = ideal(x, alpha, sigma), ideal(end, alpha_prev, sigma_prev)
    return x + (alpha_prev - alpha) * (x0 + x0_end) / 2 + (sigma_prev - sigma) * (eps + eps_end) / 2


def paper_dpmpp(x, alpha, sigma, alpha_prev, sigma_prev, z, history, name):
    """Lu et al. 2022, algorithm 2 and its SDE form, in lambda = log(alpha / sigma)."""
    with np.errstate(divide="ignore"):
        lambdas = [float(np.log(a) - np.log(s)) for a, s, _ in history]
        h = float(np.log(alpha_prev) - np.log(sigma_prev)) - lambdas[-1]
    x0 = history[-1][2]
    if len(history) > 1 and math.isfinite(h) and math.isfinite(lambdas[-2]):
        r = (lambdas[-1] - lambdas[-2]) / h
        x0 = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * history[-2][2]
    if name == "dpmpp_2m":
        return sigma_prev / sigma * x - alpha_prev * math.expm1(-h) * x0
    std = sigma_prev * math.sqrt(-math.expm1(-2 * h))
    return sigma_prev / sigma * math.exp(-h) * x - alpha_prev * math.expm1(-2 * h) * x0 + std * z


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("chain", CHAINS)
def test_every_chain_is_its_papers_recursion(chain, prediction_type, schedule):
    """With the same noise, number by number; float64, and what is left of it in float32."""
    name, options = CHAINS[chain]
    schedule = SCHEDULES[schedule]
    for spacing in TIMESTEP_SPACINGS:
        grid = schedule.grid(12, spacing)
        streams, twins = generators(20, range(2)), generators(20, range(2))
        x = grid.start_std * torch.linspace(-2.5, 2.5, 24, dtype=torch.float64).reshape(2, 1, 3, 4)
        if prediction_type == "epsilon" and grid.alpha[0] == 0:
            with pytest.raises(LdmError, match="epsilon leaves x0 open at alpha = 0"):
                SAMPLERS[name](ideal_denoise(prediction_type), x, grid, streams, **options)
            continue
        noises = [] if chain in DETERMINISTIC else [draw(twins, x.shape[1:]).double() for _ in range(11)]
        expected = paper_chain(name, options, levels_of(schedule, grid), x, noises)
        # where alpha is small, epsilon determines x0 badly: a rounding error of 1e-16 becomes one of 1e-12
        ours = SAMPLERS[name](ideal_denoise(prediction_type), x, grid, streams, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda m, s=spacing: f"{s}: {m}")
        streams = generators(20, range(2))
        ours = SAMPLERS[name](ideal_denoise("sample"), x.float(), grid, streams, **options)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("chain", ["ddpm-small", "ddpm-large", "ddim-0", "ddim-1", "dpmpp_2m_sde"])
def test_these_tests_would_notice_a_strided_chain_that_uses_t_minus_1(chain):
    name, options = CHAINS[chain]
    schedule = SCHEDULES["scaled_linear"]
    every = {step.t: step for step in schedule.grid(1000)}
    grid = schedule.grid(50)
    wrong = [every[t] for t in grid.t[:-1]]  # the pairs (t, t - 1)
    wrong[-1] = list(grid)[-1]

    def spread(steps):
        streams = generators(20, range(2))
        return SAMPLERS[name](ideal_denoise(), draw(streams, (1, 30, 50)), steps, streams, **options).std()

    assert spread(wrong) > 1.5 * spread(grid)


# ---- mathematics: what the chains are for


MODES = torch.tensor([[-1.0, 0.5], [1.2, -0.3]])
WEIGHTS, MODE_STD = torch.tensor([0.3, 0.7]), 0.25


def mixture_denoise(x, step):
    """E[x0 | x_t] of two Gaussian modes in the plane; x (B, 2, P): P particles."""
    variance = step.alpha**2 * MODE_STD**2 + step.sigma**2
    away = x[:, None] - step.alpha * MODES[None, :, :, None]  # (B, mode, 2, P)
    log_share = WEIGHTS.log()[None, :, None] - away.square().sum(2) / (2 * variance)  # (B, mode, P)
    inside = MODES[None, :, :, None] + step.alpha * MODE_STD**2 / variance * away
    x0 = (log_share.softmax(1)[:, :, None] * inside).sum(1)  # (B, 2, P)
    return Prediction(x0, (x - step.alpha * x0) / step.sigma, torch.full_like(x, LEARNED))


def mixture_error(chain, schedule, count):
    """Largest error of the samples' mean and covariance."""
    name, options = CHAINS[chain]
    grid, streams = SCHEDULES[schedule].grid(count, "trailing"), generators(21, range(2))
    x = grid.start_std * draw(streams, (2, 4000))
    x = SAMPLERS[name](mixture_denoise, x, grid, streams, **options).double()
    x = x.transpose(0, 1).flatten(1)  # (2, B P)
    mean = (WEIGHTS[:, None] * MODES).sum(0).double()
    apart = (MODES[1] - MODES[0]).double()
    covariance = MODE_STD**2 * torch.eye(2) + WEIGHTS.prod() * torch.outer(apart, apart)
    return max((x.mean(1) - mean).abs().max().item(), (torch.cov(x) - covariance).abs().max().item())


@pytest.mark.parametrize("schedule", ["scaled_linear", "zero_snr", "flow", "edm"])
@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain not in ("euler", "ddim-0.4", "ddim-1")])
def test_more_steps_approach_two_modes(chain, schedule):
    coarse, fine = mixture_error(chain, schedule, 5), mixture_error(chain, schedule, 80)
    assert fine < 0.06
    assert fine < coarse / 2


SHARE = 0.1


def rare_mask_denoise(x, step):
    """E[x0 | x_t] of a mask that is 1 all over with probability SHARE, else -1 all over; x (B, P, pixels): P masks."""
    log_odds = math.log(SHARE / (1 - SHARE)) + (2 * step.alpha / step.sigma**2 * x).sum(2, keepdim=True)
    x0 = torch.tanh(log_odds / 2).expand_as(x)
    return Prediction(x0, (x - step.alpha * x0) / step.sigma)


@pytest.mark.parametrize("pixels", [20, 200])
@pytest.mark.parametrize("shift", [8.0, 32.0])
def test_few_moves_draw_a_rare_mask_about_as_often_as_it_is(shift, pixels):
    """A chain decides between masks in a narrow range of noise; one that leaps over it falls to the likelier mask."""

    def share(spacing, count):
        streams = generators(24, range(1))
        x = draw(streams, (4000, pixels))
        x = SAMPLERS["dpmpp_2m_sde"](rare_mask_denoise, x, FlowSchedule(shift=shift).grid(count, spacing), streams)
        return (x.mean(2) > 0).double().mean().item()

    assert share("trailing", 20) == pytest.approx(SHARE, abs=0.02)  # 0.005 is its standard error
    assert share("karras", 10) < 0.065 < share("trailing", 15)


@pytest.mark.parametrize("path", ["variance preserving", "flow", "edm"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence_in_log_snr(name, order, path):
    """Against the exact solution, along which (x - alpha MEAN) / std(x_t) stays."""
    start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 9)

    def spread(alpha, sigma):
        return math.sqrt(alpha**2 * STD**2 + sigma**2)

    def error(count):
        ratios = [math.exp(-5 + 9 * k / count) for k in range(count + 1)]  # alpha / sigma, evenly spaced in its log
        norm = {"variance preserving": lambda r: math.hypot(1, r), "flow": lambda r: 1 + r, "edm": lambda r: r}[path]
        sigma, alpha = [1 / norm(r) for r in ratios], [r / norm(r) for r in ratios]
        grid = Grid(tuple(range(count, -1, -1)), tuple(alpha), tuple(sigma))
        x = alpha[0] * MEAN + spread(alpha[0], sigma[0]) * start
        exact = alpha[-1] * MEAN + spread(alpha[-1], sigma[-1]) * start
        return (SAMPLERS[name](ideal_denoise(), x, grid, ()) - exact).abs().max().item()

    measured = math.log2(error(80) / error(160))
    assert measured == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("schedule", ["scaled_linear", "zero_snr", "flow", "edm"])
def test_encoding_and_decoding_return_the_data(schedule):
    """Wolleb et al. 2022 encode up to a level L < T; here up to three quarters of the chain, and all of it."""
    x = torch.linspace(-1, 1.6, 24, dtype=torch.float64).reshape(2, 1, 3, 4)

    def error(count, share):
        grid = SCHEDULES[schedule].grid(count)
        grid = grid.below(grid.t[round((1 - share) * count)])
        code = ddim_encode(ideal_denoise(), x, grid)
        assert (code - x).abs().max() > 0.1
        return (ddim(ideal_denoise(), code, grid) - x).abs().max().item()

    for share in (0.75, 1.0):
        assert error(400, share) < 0.03
        assert error(400, share) < error(100, share) / 2


def test_euler_is_deterministic_ddim_bit_for_bit():
    x, denoise = torch.linspace(-2, 2, 24).reshape(2, 1, 3, 4), dummy_denoise("v_prediction")
    for schedule in SCHEDULES.values():
        grid = schedule.grid(7)
        assert torch.equal(euler(denoise, x, grid), ddim(denoise, x, grid, eta=0.0))


def test_heun_asks_twice_but_at_the_data():
    levels = []

    def denoise(x, step):
        levels.append((step.alpha, step.sigma))
        return ideal_denoise()(x, step)

    grid = SCHEDULES["flow"].grid(3)
    SAMPLERS["heun"](denoise, torch.ones(1, 1, 2), grid, ())
    points = list(zip(grid.alpha, grid.sigma, strict=True))
    assert levels == [points[0], points[1], points[1], points[2], points[2]]


# ---- other implementations, given the same network, pairs and noise


def dummy_output(x, t):
    return 0.4 * torch.tanh(x) + 0.1 * x + 0.2 * math.cos(t / 100)


def dummy_denoise(prediction_type, learned_variance=False):
    def denoise(x, step):
        prediction = to_prediction(prediction_type, dummy_output(x, step.t), x, step.alpha, step.sigma)
        return replace(prediction, variance=torch.sigmoid(x)) if learned_variance else prediction

    return denoise


def trajectory(name, prediction_type, grid, count=2, shape=(1, 4, 6), **options):
    """x before every step, and the end."""
    streams, path = generators(5, range(count)), []
    x = draw(streams, shape)
    denoise = dummy_denoise(prediction_type, options.get("variance") == "learned")
    end = SAMPLERS[name](denoise, x, grid, streams, lambda info: path.append(info["x"]), **options)
    return [*path, end]


def assert_same_path(ours, theirs):
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, i=index: f"step {i}: {m}")


def diffusers_path(scheduler, schedule, count_steps, learned_variance=False, **step_options):
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # in float64
    scheduler.set_timesteps(count_steps)
    streams = generators(5, range(2))
    x, path = draw(streams, (1, 4, 6)), []
    for t in scheduler.timesteps:
        path.append(x)
        output = dummy_output(x, t.item())
        if learned_variance:
            output = torch.cat([output, 2 * torch.sigmoid(x) - 1], dim=1)  # diffusers wants it in [-1, 1]
        result = scheduler.step(output, t, x, generator=streams, **step_options)
        x = result.prev_sample
    # Where the last t is not 0 diffusers' DDPM still adds noise, to a sample that is finished: its end is x0.
    return [*path, result.pred_original_sample]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", THEIRS)
@pytest.mark.parametrize(
    ("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ddpm_is_diffusers(variance, theirs, prediction_type, spacing):
    schedule = SCHEDULES["scaled_linear"]
    oracle = DDPMScheduler(
        1000,
        variance_type=theirs,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        clip_sample=False,
    )
    expected = diffusers_path(oracle, schedule, 12, learned_variance=variance == "learned")
    assert_same_path(trajectory("ddpm", prediction_type, schedule.grid(12, spacing), variance=variance), expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # for linspace diffusers' DDIM does not pair its times
@pytest.mark.parametrize("prediction_type", THEIRS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(eta, prediction_type, spacing):
    schedule = SCHEDULES["linear"]
    oracle = DDIMScheduler(1000, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False)
    expected = diffusers_path(oracle, schedule, 20, eta=eta)
    assert_same_path(trajectory("ddim", prediction_type, schedule.grid(20, spacing), eta=eta), expected)


@pytest.mark.parametrize("prediction_type", THEIRS)
def test_clipped_chain_is_diffusers(prediction_type):
    schedule = SCHEDULES["linear"]
    oracle = DDIMScheduler(1000, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample_range=0.4)
    expected = diffusers_path(oracle, schedule, 20, use_clipped_model_output=True)
    assert_same_path(trajectory("ddim", prediction_type, schedule.grid(20), clip=(-0.4, 0.4)), expected)
    oracle = DDPMScheduler(1000, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample_range=0.4)
    expected = diffusers_path(oracle, schedule, 20)
    assert_same_path(trajectory("ddpm", prediction_type, schedule.grid(20), clip=(-0.4, 0.4)), expected)


@pytest.mark.parametrize("prediction_type", THEIRS)
@pytest.mark.parametrize("count", [8, 20])  # below 15 steps diffusers lowers orders by another rule
@pytest.mark.parametrize(("name", "theirs"), [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")])
def test_dpmpp_is_diffusers(name, theirs, count, prediction_type):
    schedule = SCHEDULES["scaled_linear"]
    oracle = DPMSolverMultistepScheduler(
        1000, algorithm_type=theirs, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    oracle.alphas_cumprod = schedule.alphas_cumprod
    oracle.set_timesteps(count)
    streams = generators(5, range(2))
    x, path = draw(streams, (1, 4, 6)), []
    for t in oracle.timesteps:
        path.append(x)
        x = oracle.step(dummy_output(x, t.item()), t, x, generator=streams).prev_sample
    assert_same_path(trajectory(name, prediction_type, schedule.grid(count)), [*path, x])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_a_flow_is_diffusers(shift):
    grid = FlowSchedule(shift=shift).grid(10)
    oracle = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    oracle.set_timesteps(sigmas=FlowSchedule().grid(10).t[:-1])  # it shifts them itself
    x, path = draw(generators(5, range(2)), (1, 4, 6)), []
    for t in oracle.timesteps:
        path.append(x)
        x = oracle.step(dummy_output(x, t.item() / 1000), t, x).prev_sample
    assert_same_path(trajectory("euler", "flow", grid), [*path, x])


def test_encoding_moves_as_published_and_as_diffusers_but_asks_at_another_time():
    """A move of ours, of diffusers, and the noising formula of Wolleb et al. 2022 are one.

    They differ in what the network is asked. From t to t_next the ODE's slope is eps(x_t, t): the level at which x
    stands, as here. DDIMInverse feeds t_next with x_t, that is, tells the network of more noise than x has. Both err
    by O(step), which of them less depends on the path; but only the slope at x_t is the explicit Euler method.
    """
    schedule, count = SCHEDULES["scaled_linear"], 10
    grid, asked = schedule.grid(count), []
    outputs = torch.randn(count, 2, 1, 4, 6, generator=torch.Generator().manual_seed(3))

    def denoise(x, step):
        asked.append(step.t)
        return to_prediction("epsilon", outputs[len(asked) - 1], x, step.alpha, step.sigma)

    start = torch.linspace(-1, 1, 48).reshape(2, 1, 4, 6)
    ours = ddim_encode(denoise, start, grid)
    oracle = DDIMInverseScheduler(1000, timestep_spacing="trailing", clip_sample=False)
    oracle.alphas_cumprod = schedule.alphas_cumprod
    oracle.set_timesteps(count)
    theirs, published = start, start.double()
    abar = [1.0, *(schedule.alphas_cumprod[t].item() for t in grid.t[-2::-1])]
    for k, t in enumerate(oracle.timesteps):
        theirs = oracle.step(outputs[k], t, theirs).prev_sample
        now, after = abar[k], abar[k + 1]
        published = published + math.sqrt(after) * (
            (math.sqrt(1 / now) - math.sqrt(1 / after)) * published
            + (math.sqrt(1 / after - 1) - math.sqrt(1 / now - 1)) * outputs[k].double()
        )
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, published.float(), rtol=1e-4, atol=1e-4)
    times = oracle.timesteps.tolist()
    assert asked == [times[0], *times[:-1]]  # at the data themselves the network knows no noise


@pytest.mark.parametrize("prediction_type", THEIRS)
@pytest.mark.parametrize(
    ("name", "options", "monai", "monai_options"),
    [
        ("ddpm", {"variance": "small"}, MonaiDDPM, {"variance_type": "fixed_small"}),
        ("ddpm", {"variance": "large"}, MonaiDDPM, {"variance_type": "fixed_large"}),
        ("ddim", {"eta": 0.0}, MonaiDDIM, {}),
    ],
)
def test_the_full_chain_is_monais(name, options, monai, monai_options, prediction_type):
    """All 1000 steps: MONAI's DDPM takes t - 1 for t_prev, which only there is right."""
    oracle = monai(
        1000, "scaled_linear_beta", prediction_type=prediction_type, clip_sample=False, beta_start=0.0015,
        beta_end=0.0205, **monai_options,
    )  # fmt: skip
    oracle.set_timesteps(1000)
    streams = generators(5, [0])
    x = draw(streams, (1, 4, 6))
    for t in oracle.timesteps.tolist():
        x, _ = oracle.step(dummy_output(x, t), t, x, generator=streams[0])
    ours = trajectory(name, prediction_type, SCHEDULES["scaled_linear"].grid(1000), count=1, **options)[-1]
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("chain", "total", "mean"),
    [
        ("ddpm-small", 67.0845, 0.02226),
        ("ddpm-large", 88.4607, 0.03012),
        ("ddim-0", 80.2086, -0.00874),
        ("ddim-1", 67.0845, 0.02226),
    ],
)
def test_full_loop_numbers_stay(chain, total, mean):
    """A dummy network through ten steps; the sum of |x| and the mean on record."""
    name, options = CHAINS[chain]
    x = torch.linspace(-2, 2, 192).reshape(2, 1, 4, 4, 6)
    grid = SCHEDULES["scaled_linear"].grid(10)
    x = SAMPLERS[name](dummy_denoise("v_prediction"), x, grid, generators(9, range(2)), **options)
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-3)
    assert x.mean().item() == pytest.approx(mean, abs=1e-4)


# ---- contracts


@pytest.mark.parametrize("chain", CHAINS)
def test_a_sample_comes_out_the_same_at_any_batch_size_and_order(chain):
    name, options = CHAINS[chain]
    grid = SCHEDULES["linear"].grid(10)

    def samples(indices):
        streams = generators(3, indices)
        denoise = dummy_denoise("epsilon", learned_variance=True)
        return SAMPLERS[name](denoise, draw(streams, (1, 4, 6)), grid, streams, **options)

    batch = samples(range(8))
    torch.testing.assert_close(samples([5])[0], batch[5], rtol=0, atol=1e-6)
    torch.testing.assert_close(samples([6, 2, 7])[1], batch[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_last_step_draws_no_noise(chain):
    name, options = CHAINS[chain]
    streams, twin = generators(1, [0]), generators(1, [0])
    denoise = dummy_denoise("sample", learned_variance=True)
    SAMPLERS[name](denoise, torch.ones(1, 1, 4, 4), SCHEDULES["linear"].grid(5), streams, **options)
    for _ in range(0 if chain in DETERMINISTIC else 4):
        draw(twin, (1, 4, 4))
    assert torch.equal(draw(streams, (8,)), draw(twin, (8,)))


def test_callback_sees_each_step_and_half_precision_is_left_behind():
    seen = []
    grid = SCHEDULES["linear"].grid(4)
    x = torch.ones(2, 1, 4, 4, dtype=torch.float16)
    end = ddim(dummy_denoise("epsilon"), x, grid, callback=seen.append)
    assert [info["index"] for info in seen] == [0, 1, 2, 3]
    assert [info["step"] for info in seen] == list(grid)
    assert torch.equal(seen[0]["x"], x.float())
    assert torch.equal(seen[-1]["prediction"].x0, end)
    for info in seen:
        step, prediction = info["step"], info["prediction"]
        torch.testing.assert_close(step.alpha * prediction.x0 + step.sigma * prediction.eps, info["x"])


def test_what_is_refused():
    grid, x, streams = SCHEDULES["linear"].grid(3), torch.ones(2, 1, 4, 4), generators(0, range(2))
    denoise = dummy_denoise("epsilon")
    with pytest.raises(LdmError, match=r"legal: ddpm, ddim, euler, heun, dpmpp_2m, dpmpp_2m_sde\. Did you mean 'ddpm'"):
        sampler("ddpn")
    with pytest.raises(LdmError, match=r"legal: variance, clip\. Did you mean 'variance'"):
        sampler("ddpm", varience="small")
    with pytest.raises(LdmError, match="Option of sampler 'ddpm', 'eta' is not known"):
        sampler("ddpm", eta=0.0)
    with pytest.raises(LdmError, match="Did you mean 'small'"):
        ddpm(denoise, x, grid, streams, variance="fixed_small")
    with pytest.raises(LdmError, match="predicts a variance"):
        ddpm(denoise, x, grid, streams, variance="learned")
    with pytest.raises(LdmError, match="eta is .*; legal: 0"):
        ddim(denoise, x, grid, streams, eta=1.5)
    with pytest.raises(LdmError, match="low < high"):
        ddim(denoise, x, grid, streams, clip=(1.0, -1.0))
    with pytest.raises(LdmError, match="one random generator each, got 1"):  # not one stream for both samples
        ddpm(denoise, x, grid, streams[:1])
    assert torch.equal(sampler("ddim", eta=0.0)(denoise, x, grid, streams), ddim(denoise, x, grid))


def test_gradients_are_off_but_a_denoise_may_turn_them_on():
    def denoise(x, step):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((leaf**2).sum(), leaf)
        return Prediction(x0=gradient, eps=(x - step.alpha * gradient) / step.sigma)

    x = ddim(denoise, torch.ones(1, 1, 2, 2), SCHEDULES["linear"].grid(2))
    assert not x.requires_grad
