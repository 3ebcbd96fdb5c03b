"""Samplers: pure functions that walk a grid from noise to data.

Each is called as ``sampler(denoise, x, grid, generators, callback=None, **options)``:

* ``denoise(x, step) -> Prediction``;
* ``x``: (B, C, *S), the noise the chain starts from;
* ``grid``: steps, noisiest first (`schedule.Grid`). All a sampler knows of a schedule is in the step;
* ``generators``: one a sample, for samplers that draw noise (`noise.generators`);
* ``callback``: called before each move with ``{"step", "index", "x", "prediction"}``, x being what the
  network saw; for progress, previews and tests;
* ``clip``: ``(low, high)`` that the predicted x0 is clamped to, eps being derived from it anew. Off by
  default: latents have no bounds.

They return x at the end of the grid, (B, C, *S), float32 (float64 where x is). The last step, whose
``sigma_prev`` is 0, draws no noise. Gradients are off; a ``denoise`` that needs them enables them within.
Every one can start at alpha = 0. `heun` asks the network twice a step, but once in the last; all others once.

| sampler | equation solved | order |
|---|---|---|
| `ddpm`, `ddim` with eta = 1 | reverse process, step by step | 1 |
| `ddim` with eta = 0, `euler` | probability-flow ODE | 1 |
| `heun` | probability-flow ODE | 2 |
| `dpmpp_2m` | probability-flow ODE | 2, from one call a step |
| `dpmpp_2m_sde` | reverse SDE | 2 as its noise goes to 0 |
| `ddim_encode` | probability-flow ODE, from data to noise | 1 |

The formulae are written for any ``x_t = alpha x0 + sigma eps``; with ``alpha = sqrt(abar)`` and ``sigma =
sqrt(1 - abar)`` they are those of the papers cited, for a pair (t, t_prev) in place of (t, t - 1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion import noise
from ldm.diffusion.checks import check_choice, check_number, check_pair
from ldm.diffusion.grid import Grid, Step
from ldm.diffusion.posterior import Posterior, posterior_of
from ldm.diffusion.prediction import Denoise, Prediction, at_least_float32
from ldm.errors import LdmError

Callback = Callable[[dict[str, Any]], None]
Sampler = Callable[..., Tensor]

VARIANCES = ("small", "large", "learned")


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
    *,
    variance: str = "small",
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    Args:
        variance: ``"small"``: of the posterior q(x_prev | x_t, x0), optimal for data at one point;
            ``"large"``: optimal for data ~ N(0, I), the beta of the pair where alpha^2 + sigma^2 = 1 (section
            3.2); ``"learned"``: between the two, by ``Prediction.variance``.
    """
    check_choice("variance", variance, VARIANCES)
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(grid):
        # 1. What the network makes of x_t
        prediction = _predict(denoise, x, step, clip, callback, index)

        # 2. Mean of the posterior, formula (7) of DDPM
        posterior = posterior_of(step)
        x = posterior.x0_coefficient * prediction.x0 + posterior.xt_coefficient * x

        # 3. Noise, formulae (6) and (7) of DDPM
        if step.sigma_prev > 0:
            x = x + _std(variance, posterior, prediction) * _draw(generators, x)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Denoising diffusion implicit sampling (Song et al. 2021).

    Args:
        eta: 0 is deterministic and needs no generators; 1 is `ddpm` with the small variance.
    """
    check_number("eta", eta, 0, 1, "0 (deterministic) to 1 (ancestral)")
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(grid):
        # 1. What the network makes of x_t
        prediction = _predict(denoise, x, step, clip, callback, index)

        # 2. Standard deviation of the new noise, formula (16) of DDIM
        std = eta * math.sqrt(posterior_of(step).small) if eta > 0 else 0.0

        # 3. "Predicted x0" and "direction pointing to x_t", formula (12) of DDIM. At alpha = 0 and eta = 1
        #    the difference is 0, and rounding may leave it below.
        direction = math.sqrt(max(step.sigma_prev**2 - std**2, 0.0))
        x = step.alpha_prev * prediction.x0 + direction * prediction.eps

        # 4. "Random noise", formula (12) of DDIM
        if std > 0:
            x = x + std * _draw(generators, x)
    return x


@torch.no_grad()
def ddim_encode(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """`ddim` with eta = 0 backwards, from data to the first level of ``grid`` (Song et al. 2021, section 4.3).

    `ddim` over the same grid returns the data, up to the error of either chain's first-order steps. For the noise up to
    level L: ``grid.below(L)`` here and there.

    Each move asks the network at the level where x stands and goes to the next noisier one. At the data themselves the
    network knows no noise, so the first move asks at the level it goes to, with x of that level's size.

    Args:
        x: data, (B, C, *S); noise at the grid's end.

    Returns:
        ``x_t`` of the grid's first level, (B, C, *S).
    """
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(_backwards(grid)):
        # 1. What the network makes of x_t
        if step.sigma == 0:
            level = _at_prev(step)
            prediction = _predict(denoise, x * (level.alpha / step.alpha), level, clip, callback, index)
            prediction = Prediction(x / step.alpha, prediction.eps)
        else:
            prediction = _predict(denoise, x, step, clip, callback, index)

        # 2. Formula (12) of DDIM, towards noise
        x = step.alpha_prev * prediction.x0 + step.sigma_prev * prediction.eps
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE, which is `ddim` with eta = 0 and nothing else.

    The ODE is ``dx = x0 dalpha + eps dsigma`` with the network's x0 and eps at x (Karras et al. 2022, eq. 4, in these
    terms). A step with both held fixed ends at ``alpha_prev x0 + sigma_prev eps``, whether it is written in t of a
    flow, ``x + (t_prev - t) (eps - x0)``, or in sigma of EDM, ``x + (sigma_prev - sigma) eps``.
    """
    return ddim(denoise, x, grid, generators, callback, eta=0.0, clip=clip)


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1).

    With ``dx = x0 dalpha + eps dsigma`` the trapezoidal rule averages x0 and eps over both ends of a step. For
    alpha = 1 that is algorithm 1; unlike the paper's ``x / alpha`` for other paths, it can start at alpha = 0. Asks the
    network twice a step, but in the last: 2 N - 1 calls.
    """
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(grid):
        # 1. Euler step from t to t_prev, lines 4 and 5 of algorithm 1
        prediction = _predict(denoise, x, step, clip, callback, index)
        x0, eps = prediction.x0, prediction.eps
        x_euler = step.alpha_prev * x0 + step.sigma_prev * eps

        # 2. Second-order correction, lines 6 to 8; not at the data, where the network knows no noise
        if step.sigma_prev > 0:
            end = _predict(denoise, x_euler, _at_prev(step), clip)
            x = x + (step.alpha_prev - step.alpha) / 2 * (x0 + end.x0)
            x = x + (step.sigma_prev - step.sigma) / 2 * (eps + end.eps)
        else:
            x = x_euler
    return x


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator] = (),
    callback: Callback | None = None,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """DPM-Solver++ (2M) on the probability-flow ODE (Lu et al. 2022, algorithm 2).

    The first and the last step, and one after a start at alpha = 0, are of first order.
    """
    _check_clip(clip)
    x, history = at_least_float32(x), _History()
    for index, step in enumerate(grid):
        # 1. x0 at t, extrapolated to the middle of the step: D_i of algorithm 2
        x0 = history.extrapolate(_predict(denoise, x, step, clip, callback, index).x0, step)

        # 2. Exact solution for an x0 that stays, proposition 4.1: alpha_prev e^-h = alpha sigma_prev / sigma
        decay = step.sigma_prev / step.sigma
        x = decay * x + (step.alpha_prev - step.alpha * decay) * x0
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    grid: Iterable[Step],
    generators: Sequence[torch.Generator],
    callback: Callback | None = None,
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """SDE-DPM-Solver++ (2M) on the reverse SDE (Lu et al. 2022, appendix; the midpoint form).

    A step of first order is `ddpm` with the small variance; here x0 is extrapolated as in `dpmpp_2m`.
    """
    _check_clip(clip)
    x, history = at_least_float32(x), _History()
    for index, step in enumerate(grid):
        # 1. x0 at t, extrapolated to the middle of the step
        x0 = history.extrapolate(_predict(denoise, x, step, clip, callback, index).x0, step)

        # 2. Exact solution for an x0 that stays: sigma_prev / sigma e^-h x + alpha_prev (1 - e^-2h) x0, the posterior's
        posterior = posterior_of(step)
        x = posterior.x0_coefficient * x0 + posterior.xt_coefficient * x

        # 3. Noise of std sigma_prev sqrt(1 - e^-2h)
        if step.sigma_prev > 0:
            x = x + math.sqrt(posterior.small) * _draw(generators, x)
    return x


#: The samplers by name; `ddim_encode` walks the other way and is none
SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


def sampler(name: str, **options: Any) -> Sampler:
    """Look a sampler up by name, its options bound.

    Raises:
        LdmError: a name or an option that does not exist, naming those that do; an illegal value.
    """
    check_choice("Sampler", name, SAMPLERS)
    function = SAMPLERS[name]
    parameters = inspect.signature(function).parameters.values()
    legal = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        check_choice(f"Option of sampler '{name}',", option, legal)
    bound = partial(function, **options)
    bound(None, torch.zeros(1), (), ())  # without a move it does no more than look at the options' values
    return bound


class _History:
    """x0 of the step before, for multistep samplers."""

    def __init__(self) -> None:
        self.x0: Tensor | None = None
        self.h = math.inf

    def extrapolate(self, x0: Tensor, step: Step) -> Tensor:
        """``D = x0 + h / (2 h_before) (x0 - x0_before)`` with h the step in log(alpha / sigma); x0 at either end."""
        signal, noise_ = step.alpha_prev * step.sigma, step.alpha * step.sigma_prev
        h = math.log(signal / noise_) if noise_ > 0 else math.inf
        before, self.x0, h_before, self.h = self.x0, x0, self.h, h
        if before is None or math.isinf(h) or math.isinf(h_before):
            return x0
        return x0 + h / (2 * h_before) * (x0 - before)


def _at_prev(step: Step) -> Step:
    """The level where a step ends, as one at which the network can be asked; a move of no length."""
    return Step(step.t_prev, step.t_prev, step.alpha_prev, step.sigma_prev, step.alpha_prev, step.sigma_prev)


def _backwards(grid: Grid) -> Grid:
    return Grid(grid.t[::-1], grid.alpha[::-1], grid.sigma[::-1])


def _std(variance: str, posterior: Posterior, prediction: Prediction) -> float | Tensor:
    if variance == "small":
        return math.sqrt(posterior.small)
    if variance == "large":
        return math.sqrt(posterior.large)
    if prediction.variance is None:
        raise LdmError("variance 'learned' needs a network that predicts a variance; use 'small' or 'large'.")
    # Nichol & Dhariwal 2021, formula (15)
    v = prediction.variance
    return torch.exp(0.5 * (v * math.log(posterior.large) + (1 - v) * math.log(posterior.small)))


def _predict(
    denoise: Denoise,
    x: Tensor,
    step: Step,
    clip: tuple[float, float] | None,
    callback: Callback | None = None,
    index: int = 0,
) -> Prediction:
    prediction = denoise(x, step)
    if clip is not None:
        x0 = prediction.x0.clamp(*clip)
        prediction = Prediction(x0, (x - step.alpha * x0) / step.sigma, prediction.variance)
    if callback is not None:
        callback({"step": step, "index": index, "x": x, "prediction": prediction})
    return prediction


def _check_clip(clip: tuple[float, float] | None) -> None:
    if clip is not None:
        check_pair("clip", clip, -math.inf, "two numbers, low < high, or null")


def _draw(generators: Sequence[torch.Generator], x: Tensor) -> Tensor:
    if len(generators) != len(x):
        raise LdmError(f"A batch of {len(x)} samples needs one random generator each, got {len(generators)}.")
    return noise.draw(generators, x.shape[1:]).to(x)
