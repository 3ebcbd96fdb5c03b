"""How many times as far as real images: Fréchet distances over that of real images, with intervals.

A distance of n images has a bias that falls as 1/n, in the floor as in the rest, so that a ratio at few images is
near 1 whatever the images. Two ratios are taken, and which of them it is is said:

* that of distances extrapolated to infinitely many images, where that of the real images is then told from 0 (features
  that know their training images, another scanner among the held-out ones) and there are images enough: a half of the
  subjects has to have more images than features, whichever group is left out, which takes at least 4 groups;
* elsewhere, that at n images each. n is part of it, and another set that is known to be worse has to tell whether n is
  enough. Its floor is cross-validated: a single set of real images may be near the reference by chance, so the floor is
  the mean over splits of all real images, held-out and reference together, into n and the others.

Intervals are those of the jackknife over subjects (Arvesen 1969), in at most 40 groups that are left out of a set and
of the reference at once. Percentiles of a bootstrap are too narrow: a resample repeats images, which adds to the
distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from ldm.errors import LdmError
from ldm.metrics.features import checked
from ldm.metrics.frechet import frechet_distance

GROUPS = 40  # at most; fewer where there are fewer subjects
SPLITS = 100  # of the real images, for a cross-validated floor
EXTRAPOLATED = "extrapolated to infinitely many images"
FIXED = "at a fixed number of images, with a cross-validated floor"


def frechet_ratios(
    reference: np.ndarray,
    sets: Mapping[str, np.ndarray],
    floor: str,
    subjects: Sequence[Any] | None = None,
    reference_subjects: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fréchet distances of every set from the reference over that of real images.

    Args:
        reference: features ``(R, D)`` of real images.
        sets: name -> features ``(N, D)``, N the same for all.
        floor: the set of real images.
        subjects: whose row i is, the same for all sets; None is another subject each.
        reference_subjects: the same for the reference.
        seed: of the splits.

    Returns:
        ``method``; ``n``; ``groups``; ``ratios``: name -> ``{value, interval}``, None where the floor is 0;
        ``floor``: the same of the real images at n images over the cross-validated floor, whatever the method: how much
        further the held-out images are from the reference than parts of all real images are from each other.

    Raises:
        LdmError: sets of different size, or fewer than 3 subjects.
    """
    sizes = {name: len(features) for name, features in sets.items()}
    n = sizes[floor]
    if set(sizes.values()) != {n}:
        raise LdmError(f"a ratio needs sets of one size; these have {sizes}.")
    whose = numbered(subjects, n), numbered(reference_subjects, len(reference))
    groups = min(GROUPS, *(int(one.max()) + 1 for one in whose))
    if groups < 3:
        raise LdmError(f"a ratio of distances needs at least 3 subjects in every set, not {groups}.")
    out = tuple(one % groups for one in whose)
    ratios, features = None, reference.shape[1]
    if n > 4 * features and min(map(_smallest_half, whose, out)) > features:
        ratios = _extrapolated_ratios(reference, sets, floor, whose, out, groups)
    method = FIXED if ratios is None else EXTRAPOLATED
    below = cross_validated(sets[floor], reference, *whose, seed)
    if ratios is None:
        ratios = {name: _fixed_ratio(features, reference, below, out, groups) for name, features in sets.items()}
    own = _fixed_ratio(sets[floor], reference, below, out, groups)
    return {"method": method, "n": n, "groups": groups, "ratios": ratios, "floor": own}


def cross_validated(
    real: np.ndarray, reference: np.ndarray, whose: np.ndarray, whose_reference: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """Mean distance of n real images from R others, and its standard error over the splits.

    Args:
        real, reference: features ``(n, D)`` and ``(R, D)``, which are split anew, a subject's rows staying together.
        whose, whose_reference: number of each row's subject.
        seed: of the splits.
    """
    pool, n = np.concatenate(checked(real, reference)), len(real)  # (n + R, D)
    numbers = np.concatenate([whose, whose_reference + whose.max() + 1])
    rng, distances = np.random.default_rng(seed), []
    for _ in range(SPLITS):
        order = np.argsort(rng.permutation(numbers.max() + 1)[numbers], kind="stable")
        distances.append(frechet_distance(pool[order[:n]], pool[order[n:]]))
    return float(np.mean(distances)), float(np.std(distances, ddof=1) / np.sqrt(SPLITS))


def extrapolated(a: np.ndarray, b: np.ndarray, half_a: np.ndarray, half_b: np.ndarray) -> float:
    """Distance at infinitely many images: ``2 d(n) - d(n / 2)``, which has no term in 1/n; may be negative.

    The second is the mean over two halves, ``half_a`` ``(N,)`` and ``half_b`` ``(M,)`` of 0 and 1; a subject's images
    are in one half, or both halves would know as much as the whole. They are not drawn, so that leaving out a subject
    changes nothing but that subject.
    """
    halves = [frechet_distance(a[half_a == half], b[half_b == half]) for half in (0, 1)]
    return 2 * frechet_distance(a, b) - float(np.mean(halves))


def numbered(subjects: Sequence[Any] | None, n: int) -> np.ndarray:
    """Number of the subject of each of ``n`` rows, ``(n,)``, from 0 without gaps.

    Raises:
        LdmError: there are not ``n`` of them.
    """
    if subjects is None:
        return np.arange(n)
    if len(subjects) != n:
        raise LdmError(f"{len(subjects)} subjects are given for {n} images.")
    return np.unique([str(one) for one in subjects], return_inverse=True)[1]


def _smallest_half(whose: np.ndarray, out: np.ndarray) -> int:
    """Images of the smaller half of the subjects, without the group ``out`` ``(N,)`` that takes most of it away."""
    halves = [out[whose % 2 == half] for half in (0, 1)]
    return min(len(half) - int(np.bincount(half).max(initial=0)) for half in halves)


def interval(value: float, without: np.ndarray, further_error: float = 0.0) -> list[float]:
    """95 % interval of ``value`` from its values without each of G groups ``(G,)``; Student's t with G - 1.

    ``further_error`` is a standard error that the groups do not know of.
    """
    groups = len(without)
    error = np.sqrt((groups - 1) * np.var(without) + further_error**2)
    reach = student.ppf(0.975, groups - 1) * error
    return [float(value - reach), float(value + reach)]


def _fixed_ratio(
    features: np.ndarray,
    reference: np.ndarray,
    below: tuple[float, float],
    out: tuple[np.ndarray, np.ndarray],
    groups: int,
) -> dict[str, Any] | None:
    (ours, theirs), (floor, error) = out, below
    value = frechet_distance(features, reference)
    without = np.array(
        [frechet_distance(features[ours != group], reference[theirs != group]) for group in range(groups)]
    )
    if floor <= 0:
        return None
    if min(value, *without) <= 0:  # no logarithms: the images are the reference
        return {"value": value / floor, "interval": [0.0, max(interval(value / floor, without / floor)[1], 0.0)]}
    low, high = np.exp(interval(float(np.log(value / floor)), np.log(without / floor), error / floor))
    return {"value": value / floor, "interval": [float(low), float(high)]}


def _extrapolated_ratios(
    reference: np.ndarray,
    sets: Mapping[str, np.ndarray],
    floor: str,
    whose: tuple[np.ndarray, np.ndarray],
    out: tuple[np.ndarray, np.ndarray],
    groups: int,
) -> dict[str, Any] | None:
    """None where the floor is not told from 0."""
    halves = whose[0] % 2, whose[1] % 2
    below = _extrapolated_without(sets[floor], reference, halves, out, groups)
    if interval(*below)[0] <= 0 or below[1].min() <= 0:
        return None
    ratios = {floor: {"value": 1.0, "interval": [1.0, 1.0]}}
    for name in sets:
        if name == floor:
            continue
        value, without = _extrapolated_without(sets[name], reference, halves, out, groups)
        low, high = interval(value / below[0], without / below[1])
        ratios[name] = {"value": max(value / below[0], 0.0), "interval": [max(low, 0.0), max(high, 0.0)]}
    return ratios


def _extrapolated_without(
    features: np.ndarray,
    reference: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
    out: tuple[np.ndarray, np.ndarray],
    groups: int,
) -> tuple[float, np.ndarray]:
    """The extrapolated distance, and that without each group ``(G,)``."""
    features, reference = checked(features, reference)
    (ours, theirs), without = out, []
    for group in range(groups):
        kept, kept_theirs = ours != group, theirs != group
        parts = features[kept], reference[kept_theirs], halves[0][kept], halves[1][kept_theirs]
        without.append(extrapolated(*parts))
    return extrapolated(features, reference, *halves), np.array(without)
