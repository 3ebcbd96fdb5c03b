"""Samplers: pure functions that walk a grid from noise to data.

Each is called as ``sampler(denoise, x, grid, generators, callback=None, **options)``:

* ``denoise(x, step) -> Prediction``;
* ``x``: (B, C, *S), the noise the chain starts from;
* ``grid``: steps, noisiest first (`schedule.Grid`). All a sampler knows of a schedule is in the step;
* ``generators``: one a sample, for samplers that draw noise (`noise.generators`);
* ``callback``: called before each update with ``{"step", "index", "x", "prediction"}``, x being what the
  network saw; for progress, previews and tests;
* ``clip``: ``(low, high)`` that the predicted x0 is clamped to, eps being derived from it anew. Off by
  default: latents have no bounds.

They return x at the end of the grid, (B, C, *S), float32 (float64 where x is). The last step, whose
``sigma_prev`` is 0, draws no noise. Gradients are off; a ``denoise`` that needs them enables them within.

The formulae are written for any ``x_t = alpha x0 + sigma eps``; with ``alpha = sqrt(abar)`` and ``sigma =
sqrt(1 - abar)`` they are those of the papers cited, for a pair (t, t_prev) in place of (t, t - 1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion import noise
from ldm.diffusion.checks import check_choice
from ldm.diffusion.prediction import Denoise, Prediction, at_least_float32
from ldm.diffusion.schedule import Step
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
            ``"large"``: the beta of the pair, optimal for data ~ N(0, I) (section 3.2); ``"learned"``:
            between the two, by ``Prediction.variance``.
    """
    check_choice("variance", variance, VARIANCES)
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(grid):
        # 1. What the network makes of x_t
        prediction = _predict(denoise, x, step, clip)
        if callback is not None:
            callback({"step": step, "index": index, "x": x, "prediction": prediction})

        # 2. Mean of the posterior, formula (7) of DDPM
        posterior = _posterior(step)
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
    if not 0 <= eta <= 1:
        raise LdmError(f"eta must be between 0 (deterministic) and 1 (ancestral), got {eta}.")
    _check_clip(clip)
    x = at_least_float32(x)
    for index, step in enumerate(grid):
        # 1. What the network makes of x_t
        prediction = _predict(denoise, x, step, clip)
        if callback is not None:
            callback({"step": step, "index": index, "x": x, "prediction": prediction})

        # 2. Standard deviation of the new noise, formula (16) of DDIM
        std = eta * math.sqrt(_posterior(step).small) if eta > 0 else 0.0

        # 3. "Predicted x0" and "direction pointing to x_t", formula (12) of DDIM. At alpha = 0 and eta = 1
        #    the difference is 0, and rounding may leave it below.
        direction = math.sqrt(max(step.sigma_prev**2 - std**2, 0.0))
        x = step.alpha_prev * prediction.x0 + direction * prediction.eps

        # 4. "Random noise", formula (12) of DDIM
        if std > 0:
            x = x + std * _draw(generators, x)
    return x


#: The samplers by name
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim}


def sampler(name: str, **options: Any) -> Sampler:
    """Look a sampler up by name, its options bound.

    Raises:
        LdmError: a name or an option that does not exist, naming those that do.
    """
    check_choice("Sampler", name, SAMPLERS)
    function = SAMPLERS[name]
    parameters = inspect.signature(function).parameters.values()
    legal = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        check_choice(f"Option of sampler '{name}',", option, legal)
    return partial(function, **options)


class _Posterior(NamedTuple):
    """q(x_prev | x_t, x0) = N(x0_coefficient x0 + xt_coefficient x_t, small I)."""

    x0_coefficient: float
    xt_coefficient: float
    small: float  # the posterior's variance, beta tilde
    large: float  # the variance of q(x_t | x_prev), beta


def _posterior(step: Step) -> _Posterior:
    """DDPM formula (7) for the pair (t, t_prev); for any alpha, sigma: Kingma et al. 2021, appendix A."""
    ratio = step.alpha / step.alpha_prev  # sqrt(abar_t / abar_prev)
    large = step.sigma**2 - ratio**2 * step.sigma_prev**2  # 1 - abar_t / abar_prev
    return _Posterior(
        x0_coefficient=step.alpha_prev * large / step.sigma**2,
        xt_coefficient=ratio * step.sigma_prev**2 / step.sigma**2,
        small=step.sigma_prev**2 / step.sigma**2 * large,
        large=large,
    )


def _std(variance: str, posterior: _Posterior, prediction: Prediction) -> float | Tensor:
    if variance == "small":
        return math.sqrt(posterior.small)
    if variance == "large":
        return math.sqrt(posterior.large)
    if prediction.variance is None:
        raise LdmError("variance 'learned' needs a network that predicts a variance; use 'small' or 'large'.")
    # Nichol & Dhariwal 2021, formula (15)
    v = prediction.variance
    return torch.exp(0.5 * (v * math.log(posterior.large) + (1 - v) * math.log(posterior.small)))


def _predict(denoise: Denoise, x: Tensor, step: Step, clip: tuple[float, float] | None) -> Prediction:
    prediction = denoise(x, step)
    if clip is None:
        return prediction
    x0 = prediction.x0.clamp(*clip)
    return Prediction(x0, (x - step.alpha * x0) / step.sigma, prediction.variance)


def _check_clip(clip: tuple[float, float] | None) -> None:
    if clip is not None and not (len(clip) == 2 and clip[0] < clip[1]):
        raise LdmError(f"clip must be two numbers, low < high, got {clip}.")


def _draw(generators: Sequence[torch.Generator], x: Tensor) -> Tensor:
    if len(generators) != len(x):
        raise LdmError(f"A batch of {len(x)} samples needs one random generator each, got {len(generators)}.")
    return noise.draw(generators, x.shape[1:]).to(x)
