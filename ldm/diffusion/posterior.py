"""The step back when x0 is known, and how far a network's step is from it: the terms of the variational bound."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.grid import Step
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule


class Posterior(NamedTuple):
    """q(x_prev | x_t, x0) = N(x0_coefficient x0 + xt_coefficient x_t, small I)."""

    x0_coefficient: float
    xt_coefficient: float
    small: float  # the posterior's variance, beta tilde
    large: float  # the variance of q(x_prev | x_t) for data ~ N(0, I); beta where alpha^2 + sigma^2 = 1


def posterior_of(step: Step) -> Posterior:
    """DDPM formula (7) for the pair (t, t_prev); for any alpha, sigma: Kingma et al. 2021, appendix A."""
    ratio = step.alpha / step.alpha_prev  # sqrt(abar_t / abar_prev)
    beta = step.sigma**2 - ratio**2 * step.sigma_prev**2  # of q(x_t | x_prev): 1 - abar_t / abar_prev
    growth = (step.alpha_prev**2 + step.sigma_prev**2) / (step.alpha**2 + step.sigma**2)  # 1 on a VP path
    return Posterior(
        x0_coefficient=step.alpha_prev * beta / step.sigma**2,
        xt_coefficient=ratio * step.sigma_prev**2 / step.sigma**2,
        small=step.sigma_prev**2 / step.sigma**2 * beta,
        large=growth * beta,
    )


def variational_term(schedule: NoiseSchedule, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
    """One term of the variational bound at the network's learned variance, in nats per element.

    ``L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))`` (Nichol & Dhariwal 2021, eq. 4 to 7), and for t = 0
    ``-log p(x0 | x_0)`` as a density, latents being continuous. The gradient reaches the variance alone: the mean is
    held fixed, as in the paper's hybrid loss. The bound is the sum over t, so a uniform draw of t estimates it by T
    times this.

    Args:
        schedule: discrete, of at least two times.
        prediction: of ``x_t``, with a variance.
        x0: the truth, (B, C, *S).
        t: (B,) integers.

    Returns:
        (B,).
    """
    rows = _posteriors(schedule)[t.cpu()].to(device=t.device, dtype=x0.dtype)  # (B, 3)
    coefficient, log_small, log_large = (row.view(-1, *[1] * (x0.ndim - 1)) for row in rows.unbind(1))  # (B, 1, ...)
    log_variance = prediction.variance * log_large + (1 - prediction.variance) * log_small  # eq. 15; (B, C, *S)
    error = (coefficient * (x0 - prediction.x0.detach())).square()  # of the mean; (B, C, *S)
    precision = torch.exp(-log_variance)
    kl = 0.5 * (log_variance - log_small + torch.exp(log_small - log_variance) + error * precision - 1)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error * precision)
    return torch.where((t > 0).view(-1, *[1] * (x0.ndim - 1)), kl, likelihood).flatten(1).mean(1)


@functools.lru_cache(maxsize=4)
def _posteriors(schedule: NoiseSchedule) -> Tensor:
    """x0_coefficient, log small and log large of every pair (t, t - 1): (T, 3) float64."""
    total = schedule.num_train_timesteps
    steps = [posterior_of(step) for step in schedule.grid(total)][::-1]  # t = 0 first
    # the posterior of t = 0 has no variance; the paper's code takes that of t = 1 for the range
    small = [steps[1].small, *(step.small for step in steps[1:])]
    rows = [(p.x0_coefficient, math.log(s), math.log(p.large)) for p, s in zip(steps, small, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)
