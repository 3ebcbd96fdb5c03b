"""Profiles of power-function averages, and any of them from a few others (Karras et al. 2023, section 3, appendix C).

A power-function average after t steps weighs the weights at time s with the profile ``p(s) = (gamma + 1) s^gamma /
t^(gamma + 1)``, 0 <= s <= t. Its standard deviation is ``sigma_rel t``: a share of the training so far, however long.
An average is linear in its profile, so what approximates a profile by others approximates the average by theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ldm.errors import LdmError

#: of gamma = 0, the plain mean of all weights so far
WIDEST = 1 / math.sqrt(12)


def width_of(gamma: float) -> float:
    """sigma_rel of an exponent: standard deviation of its profile over t."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent_of(sigma_rel: float) -> float:
    """gamma >= 0 of a width: the largest root of ``(gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2``.

    Raises:
        LdmError: a width that no such profile has.
    """
    if not isinstance(sigma_rel, int | float) or not 0 < sigma_rel <= WIDEST:
        raise LdmError(f"sigma_rel is {sigma_rel}; legal: more than 0, at most {WIDEST:.4f} (the mean of all steps).")
    t = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def products(
    times: Sequence[float], gammas: Sequence[float], other_times: Sequence[float], other_gammas: Sequence[float]
) -> np.ndarray:
    """Inner products ``(A, B)`` of profiles, the integral of ``p_a(s) p_b(s)``; in logarithms, as t^gamma is huge."""
    t, g = np.asarray(times, float)[:, None], np.asarray(gammas, float)[:, None]  # (A, 1)
    u, h = np.asarray(other_times, float)[None], np.asarray(other_gammas, float)[None]  # (1, B)
    end = np.minimum(t, u)  # (A, B)
    shape = (g + 1) * (h + 1) / (g + h + 1) / end
    return shape * np.exp((g + 1) * np.log(end / t) + (h + 1) * np.log(end / u))


def coefficients(
    times: Sequence[float], gammas: Sequence[float], time: float, gamma: float
) -> tuple[np.ndarray, float]:
    """How to add up averages so that their profiles come nearest to another one, in the mean square.

    Beyond the paper, the coefficients are made to sum to 1, so that weights that no longer change come out as they are.

    Args:
        times, gammas: of the S averages at hand; times in steps.
        time, gamma: of the one that is wanted.

    Returns:
        Coefficients (S,), and what is left: root mean square of the difference of the profiles over that of the
        wanted one.
    """
    wanted = products([time], [gamma], [time], [gamma])[0, 0]
    gram = products(times, gammas, times, gammas)  # (S, S)
    b = products(times, gammas, [time], [gamma])[:, 0]  # (S,)
    scale = 1 / np.sqrt(gram.diagonal())  # profiles of norm 1: snapshots from early on are much higher than late ones
    system = np.block([[gram * scale * scale[:, None], scale[:, None]], [scale[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(b * scale, 1.0), rcond=1e-15)[0]
    x = solution[:-1] * scale
    left = max(0.0, wanted - 2 * x @ b + x @ gram @ x)
    return x, math.sqrt(left / wanted)
