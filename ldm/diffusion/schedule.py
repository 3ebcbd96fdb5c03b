"""How much signal and noise ``x_t`` holds.

Everywhere ``x_t = alpha(t) x0 + sigma(t) eps`` with ``eps ~ N(0, I)``. For the discrete schedules of Ho et
al. (2020), here, ``alpha = sqrt(alphas_cumprod)`` and ``sigma = sqrt(1 - alphas_cumprod)``; those in continuous
time are in `ldm.diffusion.continuous`.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.checks import check_choice, check_count
from ldm.diffusion.grid import Grid, chain, cubic_levels, karras_levels
from ldm.errors import LdmError

#: Range of beta each schedule has where none is given: DDPM (Ho et al. 2020, section 4) and latent diffusion
#: (Rombach et al. 2022, the released configurations). Cosine and sigmoid define alphas_cumprod and have no such range.
DEFAULT_BETAS = {
    "linear": (1e-4, 2e-2),
    "scaled_linear": (1.5e-3, 1.95e-2),
    "cosine": (None, None),
    "sigmoid": (None, None),
}
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "karras", "cubic")


class Schedule(ABC):
    """What training and sampling ask of a schedule; immutable, and a frozen dataclass of its parameters.

    Times are tensors (B,): integers in 0 .. T - 1 for a discrete schedule, floats in continuous time. What depends
    on them comes back in float32 on their device, never in less, whatever precision the network runs in.
    """

    kind: ClassVar[str]

    @abstractmethod
    def time_at(self, u: Tensor) -> Tensor:
        """Inverse distribution function of training times: ``u`` (B,) in [0, 1] -> (B,), noisier with larger ``u``.

        Training draws ``time_at(rand)``; validation takes the quantiles in the middle of its bins.
        """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level: (B,) -> (B,) float32."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level: (B,) -> (B,) float32."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``: (B,) -> (B,) float32, infinite at pure noise and pure data."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of ``t``: (B,) -> (B,) float32 on the scale of its sinusoidal embedding."""

    @abstractmethod
    def grid(self, num_inference_steps: int, timestep_spacing: str = "trailing") -> Grid:
        """The times of a chain of ``num_inference_steps`` moves that ends at the data."""

    def input_scale(self, t: Tensor) -> Tensor:
        """What the network's noisy input is multiplied by, so that it has about unit variance: (B,) -> (B,)."""
        return torch.ones_like(self.alpha(t))

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether the noisiest training time has no signal at all, alpha = 0."""
        return self.alpha(self.time_at(torch.ones(1, device="cpu"))).item() == 0

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Draw ``x_t = alpha(t) x0 + sigma(t) eps`` (Ho et al. 2020, eq. 4), in float32.

        Args:
            x0, eps: (B, C, *S), of any floating dtype.
            t: (B,).
        """
        shape = (-1, *[1] * (x0.ndim - 1))
        alpha, sigma = self.alpha(t).view(shape), self.sigma(t).view(shape)  # (B, 1, ..., 1)
        return alpha * x0.float() + sigma * eps.float()

    def to_dict(self) -> dict[str, Any]:
        """Kind and parameters, as plain values for a file."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`. Raises LdmError for a key the schedule does not have."""
        values = {key: value for key, value in values.items() if key != "kind"}
        for key in values:
            check_choice(f"Key of a {cls.kind} schedule,", key, cls.__dataclass_fields__)
        return cls(**values)


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """The discrete variance-preserving schedule a model is trained with: ``t`` in ``0 .. T - 1``.

    The tables are float64 on the CPU and never change dtype or device; what depends on a tensor
    ``t`` comes back as float32 on the device of ``t``, what a sampler needs as python floats.

    Args:
        num_train_timesteps: T.
        beta_schedule: ``"linear"`` (Ho et al. 2020), ``"scaled_linear"`` (linear in sqrt(beta): Rombach et
            al. 2022, whose code calls it "linear"), ``"cosine"`` (Nichol & Dhariwal 2021, eq. 17 with
            s = 0.008, betas capped at 0.999) or ``"sigmoid"`` (Jabri et al. 2022, with start -3, end 3 and
            temperature 1, capped alike; not the sigmoid of betas that MONAI has under this name).
        beta_start, beta_end: first and last beta of the linear schedules, 0 < beta_start <= beta_end < 1; by
            default those of the schedule's paper (`DEFAULT_BETAS`). Cosine and sigmoid have none.
        rescale_zero_terminal_snr: shift and scale ``sqrt(abar)`` so that the last time is pure noise (Lin et
            al. 2024, algorithm 1).

    Raises:
        LdmError: a parameter outside these ranges, or one the schedule does not have.
    """

    kind: ClassVar[str] = "discrete"

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float | None = None
    beta_end: float | None = None
    rescale_zero_terminal_snr: bool = False

    def __post_init__(self):
        check_count("num_train_timesteps", self.num_train_timesteps)
        check_choice("beta_schedule", self.beta_schedule, DEFAULT_BETAS)
        if self.rescale_zero_terminal_snr and self.num_train_timesteps < 2:
            raise LdmError("rescale_zero_terminal_snr needs num_train_timesteps of at least 2, got 1.")
        if DEFAULT_BETAS[self.beta_schedule] == (None, None):
            if (self.beta_start, self.beta_end) != (None, None):
                raise LdmError(
                    f"beta_start and beta_end have no effect on the {self.beta_schedule} schedule: remove them."
                )
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

    def time_at(self, u: Tensor) -> Tensor:
        """Uniform: ``floor(u T)``, int64."""
        total = self.num_train_timesteps
        return (u.double() * total).long().clamp(0, total - 1)

    def network_time(self, t: Tensor) -> Tensor:
        """The index itself."""
        return t.float()

    def grid(self, num_inference_steps: int, timestep_spacing: str = "trailing") -> Grid:
        """The times of a chain of ``num_inference_steps`` moves, ending at the data (``t_prev = -1``).

        With N moves and T training times, after Lin et al. 2024, table 2 (the definitions diffusers has):

        * ``"trailing"``: ``round(T - k T / N) - 1``, k = 0 .. N - 1. Starts at T - 1, the pure noise that
          sampling starts from: the default.
        * ``"leading"``: multiples of ``floor(T / N)`` from 0. Starts at ``(N - 1) floor(T / N)``, below
          T - 1 unless N = T, so the network is told of less noise than there is.
        * ``"linspace"``: N evenly spaced times, T - 1 and 0 included, rounded. N = 1 gives t = 0 alone.
        * ``"karras"``: the times nearest to the noise levels sigma / alpha of `karras_levels`, each once. Starts at
          T - 1, and has more of its moves at little noise than the others.
        * ``"cubic"``: the same with `cubic_levels`, for ten moves or so.

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
        elif timestep_spacing == "karras":
            times = self._nearest_times(karras_levels(*self._level_range, count))
        elif timestep_spacing == "cubic":
            times = self._nearest_times(cubic_levels(*self._level_range, count))
        else:
            # Cut to N: where rounding leaves the end of the range a hair above 0 (N = 61 of T = 1000, for
            # one), it has one element more, which in diffusers becomes a step at t = -1.
            times = np.round(np.arange(total, 0, -total / count)[:count]) - 1
        times = [int(t) for t in times]

        abar = self._alphas_cumprod[times].tolist()
        return chain(times, [math.sqrt(value) for value in abar], [math.sqrt(1 - value) for value in abar], end=-1)

    @cached_property
    def _log_levels(self) -> np.ndarray:
        """Logarithm of sigma / alpha, (T,); pure noise, where it is infinite, counts like the time below."""
        log_levels = -0.5 * torch.logit(self._alphas_cumprod).numpy()
        if self.num_train_timesteps > 1 and self.ends_in_pure_noise:
            log_levels[-1] = log_levels[-2]
        return log_levels

    @property
    def _level_range(self) -> tuple[float, float]:
        return tuple(np.exp(self._log_levels[[0, -1]]))

    def _nearest_times(self, levels: Sequence[float]) -> list[int]:
        """Times of noise levels, noisiest first; the first is T - 1 whatever its level."""
        times = [self.num_train_timesteps - 1]
        for left, level in zip(range(len(levels) - 2, -1, -1), levels[1:], strict=True):
            nearest = int(np.abs(self._log_levels - np.log(level)).argmin())
            times.append(max(min(nearest, times[-1] - 1), left))  # each once, and enough left for those to come
        return times

    @cached_property
    def _betas(self) -> Tensor:  # on the CPU, whatever device new tensors are made on by default
        return _rescaled(self._plain_betas) if self.rescale_zero_terminal_snr else self._plain_betas

    @cached_property
    def _plain_betas(self) -> Tensor:
        steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float64, device="cpu")
        if self.beta_schedule == "scaled_linear":
            return (
                torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float64, device="cpu") ** 2
            )
        times = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        if self.beta_schedule == "cosine":
            # Nichol & Dhariwal 2021, eq. 17: abar(t) = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2)
            f = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        else:
            # Jabri et al. 2022, as in Chen 2023, algorithm 1: abar(t) = (S(e) - S(s + (e - s) t / T)) / (S(e) - S(s))
            # with the logistic S, s = -3, e = 3; f(t) is its numerator
            f = torch.sigmoid(times.new_tensor(3.0)) - torch.sigmoid(6 * times - 3)
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        return torch.cumprod(1 - self._betas, dim=0)


def _rescaled(betas: Tensor) -> Tensor:
    """Lin et al. 2024, algorithm 1: the same first level, no signal at the last; betas (T,) -> (T,)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return torch.cat([betas[:1], 1 - abar[1:] / abar[:-1]])


def _look_up(table: Tensor, t: Tensor) -> Tensor:
    # index_select refuses a negative index, which [] would take from the noisy end; float64 is dropped
    # before the move because some devices have none.
    return table.to(torch.float32).to(t.device).index_select(0, t)
