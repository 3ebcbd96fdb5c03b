"""What a network output says about ``x0`` and ``eps``, whatever quantity the network was trained to predict.

Every prediction type is a linear form of the two, ``output = p x0 + q eps``, and so is ``x_t = alpha x0 +
sigma eps``. The one table below holds ``(p, q)``; the training target is that form, and reading the output is
the solution of the two equations. Neither assumes ``alpha^2 + sigma^2 = 1``.

``edm`` is the raw network F of Karras et al. 2022, eq. 7, for data of unit standard deviation, which scaled latents
have: ``D(x) = x / (1 + s^2) + s / sqrt(1 + s^2) F`` at ``x = x0 + s eps``. Setting D = x0 gives ``F = (s x0 - eps) /
sqrt(1 + s^2)``; a path with another alpha is this one in ``x_t / alpha``, where ``s = sigma / alpha``. On a
variance-preserving path it is -v. Its factors c_in and c_noise belong to the schedule: they say what the network sees,
not what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.checks import check_choice
from ldm.diffusion.grid import Step
from ldm.errors import LdmError

Level = float | Tensor  # alpha or sigma: one number, or (B,)

#: prediction type -> (p, q) of ``output = p x0 + q eps``, as functions of alpha and sigma
_COEFFICIENTS: dict[str, Callable[[Level, Level], tuple[Level, Level]]] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),  # Ho et al. 2020, eq. 14
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022, v = alpha eps - sigma x0
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # velocity of the straight path: Liu et al. 2023, Esser et al. 2024
    "edm": lambda alpha, sigma: (sigma / _norm(alpha, sigma), -alpha / _norm(alpha, sigma)),
}
PREDICTION_TYPES = tuple(_COEFFICIENTS)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is known of ``x_t`` at one step; the two always satisfy ``x_t = alpha x0 + sigma eps``.

    Attributes:
        x0: predicted data, (B, C, *S).
        eps: predicted noise, (B, C, *S).
        variance: for networks that learn it, the fraction v in [0, 1] of Nichol & Dhariwal 2021, eq. 15, from
            the posterior variance (0) to the beta of the pair (1) on a log scale, (B, C, *S).
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


#: What a sampler calls: ``denoise(x, step)`` with x (B, C, *S)
Denoise = Callable[[Tensor, Step], Prediction]


def target(prediction_type: str, x0: Tensor, eps: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """What the network is trained to output.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        x0, eps: (B, C, *S).
        alpha, sigma: of ``x_t``; a float, or a tensor (B,).

    Returns:
        (B, C, *S), float32 (float64 where x0 is).
    """
    p, q = _coefficients(prediction_type, alpha, sigma)
    x0, eps = at_least_float32(x0), at_least_float32(eps)
    return _over(p, x0) * x0 + _over(q, eps) * eps


def to_prediction(prediction_type: str, output: Tensor, x_t: Tensor, alpha: Level, sigma: Level) -> Prediction:
    """Read a network output as a statement about ``x0`` and ``eps``.

    Solves ``x_t = alpha x0 + sigma eps`` and ``output = p x0 + q eps`` by Cramer's rule.

    Args:
        prediction_type: one of `PREDICTION_TYPES`.
        output: (B, C, *S), in any floating dtype.
        x_t: what the network saw, (B, C, *S).
        alpha, sigma: of ``x_t``; a float, or a tensor (B,).

    Raises:
        LdmError: an unknown type, or a level at which the output leaves ``x0`` or ``eps`` undetermined:
            ``"epsilon"`` at alpha = 0 (pure noise), ``"sample"`` at sigma = 0 (pure data).
    """
    p, q = _coefficients(prediction_type, alpha, sigma)
    determinant = alpha * q - sigma * p
    if bool((torch.as_tensor(determinant) == 0).any()):
        raise LdmError(
            f"A '{prediction_type}' output does not determine both x0 and eps at this noise level: epsilon "
            "leaves x0 open at alpha = 0 (pure noise), sample leaves eps open at sigma = 0 (pure data). "
            "Use v_prediction, or a schedule without that level."
        )
    x_t, output = at_least_float32(x_t), at_least_float32(output)
    x0 = _over(q / determinant, x_t) * x_t - _over(sigma / determinant, x_t) * output
    eps = _over(alpha / determinant, x_t) * output - _over(p / determinant, x_t) * x_t
    return Prediction(x0, eps)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay. No step of a chain is taken in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _coefficients(prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    return _COEFFICIENTS[prediction_type](alpha, sigma)


def _norm(alpha: Level, sigma: Level) -> Level:
    return (alpha**2 + sigma**2) ** 0.5


def _over(level: Level, x: Tensor) -> Level:
    """Shape a level (B,) to multiply x (B, C, *S); numbers pass."""
    if not isinstance(level, Tensor):
        return level
    return level.to(x).reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, ..., 1)
