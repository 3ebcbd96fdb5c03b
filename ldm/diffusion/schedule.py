"""How much signal and noise ``x_t`` holds (`NoiseSchedule`), and the pairs of times a sampler walks (`Grid`).

Everywhere ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps ~ N(0, I)``. For the discrete schedules of Ho et
al. (2020) ``alpha = sqrt(alphas_cumprod)`` and ``sigma = sqrt(1 - alphas_cumprod)``; a `Grid` takes any other
pair of functions as well, such as ``alpha = 1 - t, sigma = t`` (flow) or ``alpha = 1`` (EDM).
"""

from __future__ import annotations

import itertools
import logging
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.checks import check_choice, check_count
from ldm.errors import LdmError

logger = logging.getLogger(__name__)

#: Range of beta each schedule has where none is given: DDPM (Ho et al. 2020, section 4) and latent diffusion
#: (Rombach et al. 2022, the released configurations). The cosine schedule has no such range.
DEFAULT_BETAS = {"linear": (1e-4, 2e-2), "scaled_linear": (1.5e-3, 1.95e-2), "cosine": (None, None)}
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

#: A chain that starts from pure noise at a level with more signal than this is told so in the log.
MAX_SIGNAL_AT_START = 0.1


@dataclass(frozen=True)
class Step:
    """One move of a sampler, from ``t`` to the less noisy ``t_prev``; every number a python int or float.

    ``t`` is what the network is told: an integer index for a discrete schedule, a float in continuous time.
    ``alpha, sigma`` belong to ``t``; ``alpha_prev, sigma_prev`` to ``t_prev``. A discrete schedule writes
    the data end as ``t_prev = -1``; a sampler recognises it by ``sigma_prev == 0``.
    """

    t: int | float
    t_prev: int | float
    alpha: float
    sigma: float
    alpha_prev: float
    sigma_prev: float


@dataclass(frozen=True)
class Grid:
    """The times a sampler visits, noisiest first, read as a sequence of `Step`.

    The grid stores N + 1 points and derives the N pairs from neighbours, so a strided chain cannot pair ``t``
    with ``t - 1`` by mistake. Nothing here assumes a schedule: ``Grid(t=(1.0, 0.5, 0.0), alpha=(0.0, 0.5,
    1.0), sigma=(1.0, 0.5, 0.0))`` is two steps of a flow.

    Raises:
        LdmError: fewer than two points, tuples of unequal length, or an alpha or sigma that is negative or
            not finite.
    """

    t: tuple[int | float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    def __post_init__(self):
        if not len(self.t) == len(self.alpha) == len(self.sigma) >= 2:
            raise LdmError(
                f"A grid needs t, alpha and sigma at the same two or more points, got {len(self.t)}, "
                f"{len(self.alpha)} and {len(self.sigma)}."
            )
        if not all(math.isfinite(value) and value >= 0 for value in (*self.alpha, *self.sigma)):
            raise LdmError("Every alpha and sigma of a grid must be finite and not negative.")

    def __len__(self) -> int:
        return len(self.t) - 1

    def __iter__(self) -> Iterator[Step]:
        points = zip(self.t, self.alpha, self.sigma, strict=True)
        for (t, alpha, sigma), (t_prev, alpha_prev, sigma_prev) in itertools.pairwise(points):
            yield Step(t, t_prev, alpha, sigma, alpha_prev, sigma_prev)


@dataclass(frozen=True)
class NoiseSchedule:
    """The discrete variance-preserving schedule a model is trained with: ``t`` in ``0 .. T - 1``.

    Immutable. The tables are float64 on the CPU and never change dtype or device; what depends on a tensor
    ``t`` comes back as float32 on the device of ``t``, what a sampler needs as python floats.

    Args:
        num_train_timesteps: T.
        beta_schedule: ``"linear"`` (Ho et al. 2020), ``"scaled_linear"`` (linear in sqrt(beta): Rombach et
            al. 2022, whose code calls it "linear") or ``"cosine"`` (Nichol & Dhariwal 2021, eq. 17 with
            s = 0.008, betas capped at 0.999).
        beta_start, beta_end: first and last beta of the linear schedules, 0 < beta_start <= beta_end < 1; by
            default those of the schedule's paper (`DEFAULT_BETAS`). The cosine schedule has none.

    Raises:
        LdmError: a parameter outside these ranges, or one the schedule does not have.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self):
        check_count("num_train_timesteps", self.num_train_timesteps)
        check_choice("beta_schedule", self.beta_schedule, DEFAULT_BETAS)
        if self.beta_schedule == "cosine":
            if (self.beta_start, self.beta_end) != (None, None):
                raise LdmError("beta_start and beta_end have no effect on the cosine schedule: remove them.")
            return
        for name, default in zip(("beta_start", "beta_end"), DEFAULT_BETAS[self.beta_schedule], strict=True):
            value = default if getattr(self, name) is None else getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise LdmError(f"{name} must be a number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise LdmError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} are not legal: "
                "0 < beta_start <= beta_end < 1."
            )

    @property
    def betas(self) -> Tensor:
        """Variance of the noise each single step adds, (T,) float64 (a copy)."""
        return self._betas.clone()

    @property
    def alphas_cumprod(self) -> Tensor:
        """``abar_t = prod_{s <= t} (1 - beta_s)``, (T,) float64 (a copy)."""
        return self._alphas_cumprod.clone()

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level ``sqrt(abar_t)``: integer ``t`` (B,) -> (B,) float32 on the device of ``t``."""
        return _look_up(self._alphas_cumprod.sqrt(), t)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level ``sqrt(1 - abar_t)``: integer ``t`` (B,) -> (B,) float32 on the device of ``t``."""
        return _look_up((1 - self._alphas_cumprod).sqrt(), t)

    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``: integer ``t`` (B,) -> (B,) float32 on the device of ``t``."""
        return _look_up(torch.logit(self._alphas_cumprod), t)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draw ``x_t = alpha(t) x0 + sigma(t) eps`` (Ho et al. 2020, eq. 4), in float32.

        Args:
            x0, eps: (B, C, *S), of any floating dtype.
            t: (B,) integers in 0 .. T - 1.
        """
        shape = (-1, *[1] * (x0.ndim - 1))
        alpha, sigma = self.alpha(t).view(shape), self.sigma(t).view(shape)  # (B, 1, ..., 1)
        return alpha * x0.float() + sigma * eps.float()

    def grid(self, num_inference_steps: int, timestep_spacing: str = "trailing") -> Grid:
        """The times of a chain of ``num_inference_steps`` moves, ending at the data (``t_prev = -1``).

        With N moves and T training times, after Lin et al. 2024, table 2 (the definitions diffusers has):

        * ``"trailing"``: ``round(T - k T / N) - 1``, k = 0 .. N - 1. Starts at T - 1, the pure noise that
          sampling starts from: the default.
        * ``"leading"``: multiples of ``floor(T / N)`` from 0. Starts at ``(N - 1) floor(T / N)``, below
          T - 1 unless N = T, so the network is told of less noise than there is.
        * ``"linspace"``: N evenly spaced times, T - 1 and 0 included, rounded. N = 1 gives t = 0 alone.

        Raises:
            LdmError: ``num_inference_steps`` outside 1 .. T, or an unknown spacing.
        """
        check_count("num_inference_steps", num_inference_steps)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        count, total = num_inference_steps, self.num_train_timesteps
        if count > total:
            raise LdmError(
                f"num_inference_steps={count} is more than the {total} timesteps the model was trained with: "
                f"choose 1 to {total}."
            )
        if timestep_spacing == "leading":
            times = np.arange(count)[::-1] * (total // count)
        elif timestep_spacing == "linspace":
            times = np.linspace(0, total - 1, count).round()[::-1]
        else:
            # Cut to N: where rounding leaves the end of the range a hair above 0 (N = 61 of T = 1000, for
            # one), it has one element more, which in diffusers becomes a step at t = -1.
            times = np.round(np.arange(total, 0, -total / count)[:count]) - 1
        times = [int(t) for t in times]

        abar = self._alphas_cumprod[times].tolist()
        alpha = (*(math.sqrt(value) for value in abar), 1.0)
        sigma = (*(math.sqrt(1 - value) for value in abar), 0.0)
        if alpha[0] > MAX_SIGNAL_AT_START:
            logger.warning(
                "The chain starts at t = %d, where the model expects a signal of alpha = %.2f and not pure "
                "noise: use timestep_spacing 'trailing', or a schedule with larger betas.",
                times[0],
                alpha[0],
            )
        return Grid((*times, -1), alpha, sigma)

    def to_dict(self) -> dict[str, Any]:
        """The four parameters, as plain values for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """Rebuild from `to_dict`. Raises LdmError for a key the schedule does not have."""
        legal = tuple(cls.__dataclass_fields__)
        for key in values:
            check_choice("Schedule key", key, legal)
        return cls(**values)

    @cached_property
    def _betas(self) -> Tensor:
        steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float64) ** 2
        # Nichol & Dhariwal 2021, eq. 17: abar(t) = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2)
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        return torch.cumprod(1 - self._betas, dim=0)


def _look_up(table: Tensor, t: Tensor) -> Tensor:
    # index_select refuses a negative index, which [] would take from the noisy end; float64 is dropped
    # before the move because some devices have none.
    return table.to(torch.float32).to(t.device).index_select(0, t)
