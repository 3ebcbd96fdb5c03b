"""Samplers against mathematics (Gaussian data, whose ideal denoiser is known), diffusers and MONAI.

The data are N(0.3, 0.5^2): neither mean 0 nor std 1, where a wrong chain can look right.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from monai.networks.schedulers import DDIMScheduler as MonaiDDIM
from monai.networks.schedulers import DDPMScheduler as MonaiDDPM

from ldm.diffusion.noise import draw, generators
from ldm.diffusion.prediction import PREDICTION_TYPES, Prediction, target, to_prediction
from ldm.diffusion.samplers import SAMPLERS, ddim, ddpm, sampler
from ldm.diffusion.schedule import Grid, NoiseSchedule
from ldm.errors import LdmError

MEAN, STD = 0.3, 0.5
SCHEDULES = {
    "linear": NoiseSchedule(1000, "linear"),
    "scaled_linear": NoiseSchedule(1000, "scaled_linear", 0.0015, 0.0205),
    "cosine": NoiseSchedule(1000, "cosine"),
}
SPACINGS = ["leading", "trailing", "linspace"]
CHAINS = {
    "ddpm-small": ("ddpm", {"variance": "small"}),
    "ddpm-large": ("ddpm", {"variance": "large"}),
    "ddim-0": ("ddim", {"eta": 0.0}),
    "ddim-1": ("ddim", {"eta": 1.0}),
}


def ideal_denoise(prediction_type):
    """The network that minimises the loss: E[x0 | x_t], said in the words of ``prediction_type``."""

    def denoise(x, step):
        gain = step.alpha * STD**2 / (step.alpha**2 * STD**2 + step.sigma**2)
        x0 = MEAN + gain * (x - step.alpha * MEAN)
        eps = (x - step.alpha * x0) / step.sigma
        output = target(prediction_type, x0, eps, step.alpha, step.sigma)
        return to_prediction(prediction_type, output, x, step.alpha, step.sigma)

    return denoise


def affine_steps(schedule, times, name, options):
    """The papers' update with the ideal denoiser, x -> a x + b + std z, in float64 and in their notation.

    Written from DDPM (7), DDIM (12) and (16) with abar alone, independently of the library.
    """
    table = schedule.alphas_cumprod.tolist()
    for t, t_prev in zip(times, [*times[1:], -1], strict=True):
        abar, abar_prev = table[t], table[t_prev] if t_prev >= 0 else 1.0
        gain = math.sqrt(abar) * STD**2 / (abar * STD**2 + 1 - abar)  # x0 = gain x + offset
        offset = MEAN * (1 - gain * math.sqrt(abar))
        beta = 1 - abar / abar_prev
        posterior_variance = (1 - abar_prev) / (1 - abar) * beta
        if name == "ddpm":
            of_x0 = math.sqrt(abar_prev) * beta / (1 - abar)
            of_x = math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
            std = math.sqrt(beta if options["variance"] == "large" else posterior_variance)
        else:
            std = options["eta"] * math.sqrt(posterior_variance)
            of_eps = math.sqrt(1 - abar_prev - std**2)  # eps = (x - sqrt(abar) x0) / sqrt(1 - abar)
            of_x0 = math.sqrt(abar_prev) - of_eps * math.sqrt(abar / (1 - abar))
            of_x = of_eps / math.sqrt(1 - abar)
        yield of_x + of_x0 * gain, of_x0 * offset, std if t_prev >= 0 else 0.0


def expected_moments(schedule, times, name, options):
    """Mean and std that the chain's own update gives to x ~ N(0, 1)."""
    mean, variance = 0.0, 1.0
    for a, b, std in affine_steps(schedule, times, name, options):
        mean, variance = a * mean + b, a**2 * variance + std**2
    return mean, math.sqrt(variance)


def run(chain, prediction_type, grid, shape=(1, 200, 100), dtype=torch.float32):
    name, options = CHAINS[chain]
    streams = generators(20, range(2))
    x = draw(streams, shape).to(dtype)
    return SAMPLERS[name](ideal_denoise(prediction_type), x, grid, streams, **options)


def assert_moments(x, mean, std):
    """Within 4.5 standard errors."""
    x, count = x.double(), x.numel()
    assert x.mean().item() == pytest.approx(mean, abs=4.5 * std / count**0.5)
    assert x.std().item() == pytest.approx(std, abs=4.5 * std / (2 * count) ** 0.5)


# ---- mathematics


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("chain", CHAINS)
def test_gaussian_data_get_the_moments_of_the_recursion(chain, prediction_type, schedule, spacing):
    grid = SCHEDULES[schedule].grid(50, spacing)
    mean, std = expected_moments(SCHEDULES[schedule], grid.t[:-1], *CHAINS[chain])
    assert_moments(run(chain, prediction_type, grid), mean, std)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_deterministic_ddim_is_the_recursion_exactly(prediction_type, schedule, spacing):
    grid = SCHEDULES[schedule].grid(50, spacing)
    x_start = torch.linspace(-2.5, 2.5, 24, dtype=torch.float64).reshape(2, 1, 3, 4)
    expected = x_start
    for a, b, _ in affine_steps(SCHEDULES[schedule], grid.t[:-1], "ddim", {"eta": 0.0}):
        expected = a * expected + b
    denoise = ideal_denoise(prediction_type)
    torch.testing.assert_close(ddim(denoise, x_start, grid), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ddim(denoise, x_start.float(), grid).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("chain", CHAINS)
def test_more_steps_approach_the_data(chain, schedule):
    def distance(count):
        times = SCHEDULES[schedule].grid(count).t[:-1]
        mean, std = expected_moments(SCHEDULES[schedule], times, *CHAINS[chain])
        return math.hypot(mean - MEAN, std - STD)

    assert distance(1000) < 0.012
    assert distance(1000) < distance(50) / 2


@pytest.mark.parametrize("chain", CHAINS)
def test_a_full_chain_of_1000_steps_reaches_the_data(chain):
    grid = SCHEDULES["scaled_linear"].grid(1000)
    x = run(chain, "epsilon", grid, shape=(1, 50, 100))
    assert_moments(x, *expected_moments(SCHEDULES["scaled_linear"], grid.t[:-1], *CHAINS[chain]))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("chain", CHAINS)
def test_these_tests_would_notice_a_strided_chain_that_uses_t_minus_1(chain):
    schedule = SCHEDULES["scaled_linear"]
    every = {step.t: step for step in schedule.grid(1000)}
    grid = schedule.grid(50)
    wrong = [every[t] for t in grid.t[:-1]]  # the pairs (t, t - 1)
    wrong[-1] = list(grid)[-1]
    _, std = expected_moments(schedule, grid.t[:-1], *CHAINS[chain])
    assert run(chain, "epsilon", wrong).std() > 1.5 * std


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("path", ["flow", "edm"])
def test_continuous_time_needs_another_grid_and_nothing_else(path, chain):
    """Neither path has alpha^2 + sigma^2 = 1, and the flow starts at alpha = 0."""
    if path == "flow":
        t = tuple(1 - k / 400 for k in range(401))
        grid, start = Grid(t, alpha=tuple(1 - value for value in t), sigma=t), 1.0
    else:  # Karras et al. 2022, eq. 5, rho = 7
        sigma = tuple((80 ** (1 / 7) + k / 399 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(400))
        sigma, start = (*sigma, 0.0), 80.0
        grid = Grid(sigma, alpha=(1.0,) * 401, sigma=sigma)
    name, options = CHAINS[chain]
    streams = generators(21, range(2))
    x = start * draw(streams, (1, 50, 100))
    x = SAMPLERS[name](ideal_denoise("sample"), x, grid, streams, **options)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, abs=0.03)


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
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
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
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers(eta, prediction_type, spacing):
    schedule = SCHEDULES["linear"]
    oracle = DDIMScheduler(1000, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False)
    expected = diffusers_path(oracle, schedule, 20, eta=eta)
    assert_same_path(trajectory("ddim", prediction_type, schedule.grid(20, spacing), eta=eta), expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clipped_chain_is_diffusers(prediction_type):
    schedule = SCHEDULES["linear"]
    oracle = DDIMScheduler(1000, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample_range=0.4)
    expected = diffusers_path(oracle, schedule, 20, use_clipped_model_output=True)
    assert_same_path(trajectory("ddim", prediction_type, schedule.grid(20), clip=(-0.4, 0.4)), expected)
    oracle = DDPMScheduler(1000, prediction_type=prediction_type, timestep_spacing="trailing", clip_sample_range=0.4)
    expected = diffusers_path(oracle, schedule, 20)
    assert_same_path(trajectory("ddpm", prediction_type, schedule.grid(20), clip=(-0.4, 0.4)), expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
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
        return SAMPLERS[name](dummy_denoise("epsilon"), draw(streams, (1, 4, 6)), grid, streams, **options)

    batch = samples(range(8))
    torch.testing.assert_close(samples([5])[0], batch[5], rtol=0, atol=1e-6)
    torch.testing.assert_close(samples([6, 2, 7])[1], batch[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_last_step_draws_no_noise(chain):
    name, options = CHAINS[chain]
    streams, twin = generators(1, [0]), generators(1, [0])
    SAMPLERS[name](dummy_denoise("sample"), torch.ones(1, 1, 4, 4), SCHEDULES["linear"].grid(5), streams, **options)
    for _ in range(0 if chain == "ddim-0" else 4):
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
    with pytest.raises(LdmError, match=r"legal: ddpm, ddim\. Did you mean 'ddpm'"):
        sampler("ddpn")
    with pytest.raises(LdmError, match=r"legal: variance, clip\. Did you mean 'variance'"):
        sampler("ddpm", varience="small")
    with pytest.raises(LdmError, match="Option of sampler 'ddpm', 'eta' is not known"):
        sampler("ddpm", eta=0.0)
    with pytest.raises(LdmError, match="Did you mean 'small'"):
        ddpm(denoise, x, grid, streams, variance="fixed_small")
    with pytest.raises(LdmError, match="predicts a variance"):
        ddpm(denoise, x, grid, streams, variance="learned")
    with pytest.raises(LdmError, match="eta must be between 0"):
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
