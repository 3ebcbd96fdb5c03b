"""The pairs of times a sampler walks (`Grid`), and the noise levels that are worth a visit.

Samplers know a `Grid` and no schedule.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldm.diffusion.checks import check_count
from ldm.errors import LdmError

logger = logging.getLogger(__name__)

KARRAS_RHO = 7.0  # Karras et al. 2022, appendix D.1

#: A chain that starts from pure noise at a level with more signal than this is told so in the log.
MAX_SIGNAL_AT_START = 0.1


@dataclass(frozen=True)
class Step:
    """One move of a sampler, from ``t`` to the less noisy ``t_prev``; every number a python int or float.

    ``t`` is the schedule's own time: an integer index for a discrete schedule, a float in continuous time; what
    the network is told of it is `Schedule.network_time`. ``alpha, sigma`` belong to ``t``; ``alpha_prev,
    sigma_prev`` to ``t_prev``. A discrete schedule writes the data end as ``t_prev = -1``; a sampler recognises
    it by ``sigma_prev == 0``.
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

    @property
    def start_std(self) -> float:
        """Standard deviation of x at the first point for data whose own is 1: that of the starting noise."""
        return math.hypot(self.alpha[0], self.sigma[0])

    def last(self, count: int) -> Grid:
        """The last ``count`` moves; image-to-image with strength s is the last ``round(s N)`` of N.

        Raises:
            LdmError: ``count`` outside 1 .. N.
        """
        check_count("The number of moves to keep", count)
        if count > len(self):
            raise LdmError(f"Cannot keep {count} moves of a grid that has {len(self)}.")
        return Grid(*(points[-count - 1 :] for points in (self.t, self.alpha, self.sigma)))

    def below(self, t: int | float) -> Grid:
        """The moves that start at time ``t`` or later in the chain: from level L of T on, as in anomaly detection.

        Raises:
            LdmError: no move starts there.
        """
        count = sum(time <= t for time in self.t[:-1])
        if not count:
            raise LdmError(f"No move of this grid starts at t <= {t}: its last one starts at {self.t[-2]}.")
        return self.last(count)


def chain(times: Sequence[int | float], alpha: Sequence[float], sigma: Sequence[float], end: int | float) -> Grid:
    """A grid through these points down to the data, at time ``end``; a start with much signal in it is logged."""
    signal = alpha[0] / math.hypot(alpha[0], sigma[0])
    if signal > MAX_SIGNAL_AT_START:
        logger.warning(
            "The chain starts at t = %s, where the model expects a signal of alpha = %.2f and not pure "
            "noise: use timestep_spacing 'trailing', or a schedule that ends in more noise.",
            f"{times[0]:.4g}",
            signal,
        )
    return Grid((*times, end), (*alpha, 1.0), (*sigma, 0.0))


def karras_levels(low: float, high: float, count: int, rho: float = KARRAS_RHO) -> list[float]:
    """N noise levels sigma / alpha, from ``high`` towards ``low``, evenly spaced in their root, the 7th.

    Karras et al. 2022, eq. 5, with N + 1 points of which the last, ``low``, is left out: the last move goes from the
    one before to the data.
    """
    start, end = high ** (1 / rho), low ** (1 / rho)
    return [(start + k / count * (end - start)) ** rho for k in range(count)]


def cubic_levels(low: float, high: float, count: int) -> list[float]:
    """N noise levels, evenly spaced in their cube root from 2 N towards 1 / (10 N), within ``low`` .. ``high``.

    A few moves have none to spare for levels where next to nothing happens: N = 10 keeps to 20 .. 0.01. The range grows
    with N, so that chains of many moves converge. Found on MedNIST: docs/sampling.md.
    """
    return karras_levels(max(low, 0.1 / count), min(high, 2.0 * count), count, rho=3.0)
