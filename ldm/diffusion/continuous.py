"""Schedules in continuous time: the straight path of flow matching, and the growing noise of EDM."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.diffusion.checks import check_choice, check_count
from ldm.diffusion.grid import Grid, chain, cubic_levels, karras_levels
from ldm.diffusion.schedule import TIMESTEP_SPACINGS, Schedule
from ldm.errors import LdmError

TIME_DISTRIBUTIONS = ("uniform", "logit_normal")

#: Times the network is told span [0, 1000], as those of the usual discrete schedule do.
TIME_SCALE = 1000


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """The straight path ``alpha = 1 - t, sigma = t`` with t in [0, 1] (Liu et al. 2023, Lipman et al. 2023).

    Args:
        time_distribution: of training times before the shift: ``"uniform"``, or ``"logit_normal"``, whose logit is
            ``N(logit_mean, logit_std^2)`` (Esser et al. 2024, section 3.1).
        logit_mean, logit_std: see above; logit_std > 0.
        shift: s of ``t' = s t / (1 + (s - 1) t)`` (Esser et al. 2024, eq. 23), more than 1 for more noise, on training
            times and grids alike. The paper's choice for a latent of m positions, from one of n: sqrt(m / n).

    Raises:
        LdmError: an unknown distribution, or a number outside its range.
    """

    kind: ClassVar[str] = "flow"

    time_distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        check_choice("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        _check_numbers(self, positive=("logit_std", "shift"), any_sign=("logit_mean",))

    def time_at(self, u: Tensor) -> Tensor:
        """Quantile of the shifted time distribution, (B,) float32."""
        t = u.double()
        if self.time_distribution == "logit_normal":
            t = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(t))
        return self._shifted(t).float()

    def alpha(self, t: Tensor) -> Tensor:
        """``1 - t``."""
        return 1 - t.float()

    def sigma(self, t: Tensor) -> Tensor:
        """``t``."""
        return t.float()

    def log_snr(self, t: Tensor) -> Tensor:
        """``2 log((1 - t) / t)``."""
        return 2 * (torch.log1p(-t.float()) - torch.log(t.float()))

    def network_time(self, t: Tensor) -> Tensor:
        """``1000 t``."""
        return TIME_SCALE * t.float()

    def grid(self, num_inference_steps: int, timestep_spacing: str = "trailing") -> Grid:
        """Times 1 .. 0 spaced as `fractions` says, then shifted; "linspace" is what diffusers has for flow matching.

        With "karras" the noise levels ``t / (1 - t)`` before the shift are `karras_levels` of t = 0.001 .. 0.999, with
        "cubic" `cubic_levels`; the first move starts at 1 all the same.
        """
        times = [self._shifted(t) for t in self._unshifted(num_inference_steps, timestep_spacing)]
        return chain(times, [1 - t for t in times], times, end=0.0)

    def _unshifted(self, count: int, timestep_spacing: str) -> list[float]:
        times = fractions(count, timestep_spacing)
        if timestep_spacing not in ("karras", "cubic"):
            return times
        least = 1 / TIME_SCALE / (1 - 1 / TIME_SCALE)
        spaced = cubic_levels if timestep_spacing == "cubic" else karras_levels
        levels = spaced(least, 1 / least, count)
        return [1.0, *(level / (1 + level) for level in levels[1:])]

    def _shifted(self, t: Any) -> Any:
        return self.shift * t / (self.shift * t + (1 - t))  # in this form exactly 1 at t = 1


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """``alpha = 1, sigma = t``: noise is added to data that keep their size (Karras et al. 2022).

    The paper's numbers are for data of standard deviation 0.5. Scaled latents have 1, so the noise that is trained
    with is twice the paper's: ``P_mean = -1.2 + ln 2``.

    Args:
        P_mean, P_std: training draws ``ln(sigma) ~ N(P_mean, P_std^2)``, cut to [sigma_min, sigma_max].
        sigma_min, sigma_max, rho: of the sampler's grid (eq. 5), 0 < sigma_min < sigma_max.

    Raises:
        LdmError: a number outside its range.
    """

    kind: ClassVar[str] = "edm"

    P_mean: float = -0.5
    P_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        _check_numbers(self, positive=("P_std", "sigma_min", "sigma_max", "rho"), any_sign=("P_mean",))
        if not self.sigma_min < self.sigma_max:
            raise LdmError(f"sigma_min={self.sigma_min} must be less than sigma_max={self.sigma_max}.")

    def time_at(self, u: Tensor) -> Tensor:
        """Quantile of the log-normal sigma, (B,) float32."""
        sigma = torch.exp(self.P_mean + self.P_std * torch.special.ndtri(u.double()))
        return sigma.clamp(self.sigma_min, self.sigma_max).float()

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t, dtype=torch.float32)

    def sigma(self, t: Tensor) -> Tensor:
        """``t``."""
        return t.float()

    def log_snr(self, t: Tensor) -> Tensor:
        """``-2 log t``."""
        return -2 * torch.log(t.float())

    def network_time(self, t: Tensor) -> Tensor:
        """``c_noise = ln(sigma) / 4`` of the paper, moved and stretched to [0, 1000] over [sigma_min, sigma_max].

        A sinusoidal embedding with a period of 2 pi and more could not tell levels apart on the paper's scale.
        """
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return TIME_SCALE * (torch.log(t.float()) - low) / (high - low)

    def input_scale(self, t: Tensor) -> Tensor:
        """``c_in = 1 / sqrt(sigma_data^2 + sigma^2)`` with sigma_data = 1 (table 1): the network sees unit variance."""
        return torch.rsqrt(1 + t.float() ** 2)

    def grid(self, num_inference_steps: int, timestep_spacing: str = "trailing") -> Grid:
        """Sigmas evenly spaced in ``sigma^(1 / rho)`` as `fractions` says; "linspace" is eq. 5 itself.

        "karras" is "trailing" here: eq. 5 with one point more, the last of which is left out. "cubic" starts at the
        largest sigma too, and goes on with those of `cubic_levels` that are below it.
        """
        between = fractions(num_inference_steps, timestep_spacing, 0.0)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigmas = [(low + f * (high - low)) ** self.rho for f in between]
        if timestep_spacing == "cubic":
            sigmas[1:] = cubic_levels(self.sigma_min, self.sigma_max, num_inference_steps)[1:]
        return chain(sigmas, [1.0] * len(sigmas), sigmas, end=0.0)


def fractions(count: int, timestep_spacing: str, least: float = 1 / TIME_SCALE) -> list[float]:
    """Where N moves stand between data (0) and noise (1), noisiest first; the counterparts of the discrete spacings.

    * ``"trailing"``: ``1 - k / N``, k = 0 .. N - 1. Starts at the noise. So do ``"karras"`` and ``"cubic"``, see the
      schedules.
    * ``"leading"``: the same less ``1 / N``, plus ``least``.
    * ``"linspace"``: N evenly spaced numbers, 1 and ``least`` included. N = 1 gives 1 alone.

    Args:
        count: N, at least 1.
        timestep_spacing: one of `TIMESTEP_SPACINGS`.
        least: where the last move starts: 0.001 is the first of 1000 discrete times; 0 if that still has noise.

    Raises:
        LdmError: a count below 1, or an unknown spacing.
    """
    check_count("num_inference_steps", count)
    check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
    if timestep_spacing in ("trailing", "karras", "cubic"):
        return [1 - k / count for k in range(count)]
    if timestep_spacing == "leading":
        return [(count - 1 - k) / count + min(least, 1 / count) for k in range(count)]
    return [1.0 + k * (least - 1.0) / max(count - 1, 1) for k in range(count)]


def _check_numbers(schedule: Schedule, positive: tuple[str, ...], any_sign: tuple[str, ...]) -> None:
    for name in (*positive, *any_sign):
        value = getattr(schedule, name)
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise LdmError(f"{name} must be a finite number, got {value!r}.")
        if name in positive and value <= 0:
            raise LdmError(f"{name} must be more than 0, got {value}.")
