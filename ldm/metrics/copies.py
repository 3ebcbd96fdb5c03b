"""How near synthetic images come to training scans, against scans that nothing was trained on.

Everything here starts from matrices of distances, whatever they were measured in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ldm.errors import LdmError

CONFIDENCE = 0.95


def pairwise(queries: Iterable[np.ndarray], reference: np.ndarray) -> np.ndarray:
    """Root-mean-square distances ``(N, M)``, of each query in whichever of its V variants is nearest.

    Products of vectors say which variant that is; the distance is then that of differences, so that what is the same
    is at 0 and not at what rounding leaves of the difference of two norms.

    Args:
        queries: N of ``(V, F)``.
        reference: ``(M, F)``.
    """
    exact, rows = reference.astype(np.float64), []
    for variants in queries:
        doubled = 2 * variants @ reference.T  # (V, M)
        nearest = (np.square(variants).sum(1)[:, None] - doubled).argmin(0)  # (M,)
        differences = exact - variants[nearest]  # (M, F)
        rows.append(np.sqrt(np.square(differences).mean(1)))
    return np.stack(rows)


def conformal_threshold(distances: Sequence[float], rate: float) -> tuple[float, int]:
    """The k-th smallest of m held-out distances, ``k = floor(rate (m + 1))``, and k.

    A further scan that is exchangeable with these comes at most as near with probability ``k / (m + 1) <= rate``,
    whatever the distribution. With fewer than ``1 / rate - 1`` scans k is 1, and the probability above ``rate``.

    Args:
        distances: ``(m,)`` of independent held-out scans to their nearest training scan.
        rate: false positives asked for, above 0 and below 1.

    Raises:
        LdmError: no distance at all, or an illegal rate.
    """
    if not 0 < rate < 1 or not len(distances):
        raise LdmError(f"a threshold at a rate of {rate} of {len(distances)} held-out scans cannot be had.")
    k = max(1, int(rate * (len(distances) + 1) + 1e-9))
    return float(np.sort(distances)[k - 1]), k


def lower_prediction_bound(distances: Sequence[float], n: int, alpha: float) -> float:
    """A distance that n further scans all exceed with probability of at least ``1 - alpha``.

    The m held-out scans cannot say by themselves what one of many more would never do. Logarithms of their distances
    are therefore taken as normal, of unknown mean and variance: Student's bound for one more value, at ``alpha / n``.

    Args:
        distances: ``(m,)`` of independent held-out scans to their nearest training scan.

    Returns:
        0 where a distance is 0, or there is one scan only: nothing is nearer than that.
    """
    values = np.asarray(distances, np.float64)
    if len(values) < 2 or values.min() <= 0:
        return 0.0
    logs = np.log(values)
    spread = logs.std(ddof=1) * np.sqrt(1 + 1 / len(logs))
    return float(np.exp(logs.mean() + stats.t.ppf(alpha / n, len(logs) - 1) * spread))


def precedence_p_value(flagged: int, n: int, k: int, m: int) -> float:
    """P(at least ``flagged`` of n come before the k-th of m), one-sided, when all n + m are exchangeable.

    The exact two-sample precedence test (Nelson 1963): at least s of n precede the k-th of m if and only if the first
    ``s + k - 1`` of the pooled ones hold at least s of the n, whose number is hypergeometric. That the threshold is
    itself estimated from m scans is thereby accounted for.
    """
    if flagged <= 0:
        return 1.0
    return float(stats.hypergeom(n + m, n, min(flagged + k - 1, n + m)).sf(flagged - 1))


def critical_count(n: int, k: int, m: int, alpha: float) -> int | None:
    """The smallest count with a :func:`precedence_p_value` of at most ``alpha``; None if not even n have."""
    counts = np.arange(1, n + 1)
    p_values = stats.hypergeom.sf(counts - 1, n + m, n, np.minimum(counts + k - 1, n + m))  # (n,), falling
    return int(counts[p_values <= alpha][0]) if (p_values <= alpha).any() else None


def upper_bound(count: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Exact one-sided upper bound of a share of which ``count`` of n were seen (Clopper & Pearson 1934).

    For none of n it is ``1 - (1 - confidence)^(1/n)``, at 95 % about 3 / n: the rule of three.
    """
    return 1.0 if count >= n else float(stats.beta.ppf(confidence, count + 1, n - count))


def nearest_of_others(within_train: np.ndarray, positions: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """Distance ``(M,)`` of some training scans to the nearest one of another subject; NaN for those not asked about.

    Args:
        within_train: ``(K, M)`` distances from these scans to all training scans.
        positions: ``(K,)`` which of the training scans these are.
        subjects: ``(M,)`` whose the training scans are.
    """
    who = np.asarray(subjects)
    others = np.where(who[positions][:, None] == who[None], np.inf, within_train)  # (K, M)
    result = np.full(len(who), np.nan)
    result[positions] = others.min(1)
    return result


def authenticity(to_train: np.ndarray, to_others: np.ndarray) -> float:
    """Share of images that are no nearer to their nearest training scan than that is to one of another subject.

    Alaa et al. 2022: an image is authentic when it is further from its nearest training scan than that
    scan is from its own nearest neighbour.

    Args:
        to_train: ``(N, M)`` distances of the images.
        to_others: ``(M,)`` see :func:`nearest_of_others`; of the scans that are nearest to an image.
    """
    return float((to_train.min(1) >= to_others[to_train.argmin(1)]).mean())


def distance_ratio(
    to_train: np.ndarray,
    to_held_out: np.ndarray,
    train_subjects: Sequence[str],
    draws: int = 50,
    seed: int = 0,
) -> float:
    """Median of (distance to the nearest training scan) / (distance to the nearest held-out scan); below 1 is nearer.

    The nearest of many is nearer than that of few, so the training scans are those of as many subjects as are held out,
    drawn ``draws`` times.

    Args:
        to_train: ``(N, M)``; to_held_out: ``(N, H)``, one scan a subject.
        train_subjects: ``(M,)``.
    """
    rng, names = np.random.default_rng(seed), np.asarray(train_subjects)
    first = np.unique(names, return_index=True)[1]  # one scan a subject
    count = min(len(first), to_held_out.shape[1])
    other = np.maximum(to_held_out.min(1), np.finfo(float).tiny)  # (N,)
    ratios = []
    for _ in range(draws):
        chosen = rng.choice(first, count, replace=False)
        ratios.append(np.median(to_train[:, chosen].min(1) / other))
    return float(np.mean(ratios))


def smallest_by_subject(distances: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """The smallest distance of each subject's scans ``(S,)``, in order of the names, of ``(M,)`` and ``(M,)``."""
    names, number = np.unique(np.asarray(subjects), return_inverse=True)
    result = np.full(len(names), np.inf)
    np.minimum.at(result, number, distances)
    return result


def membership(
    members: np.ndarray, others: np.ndarray, seed: int = 0, resamples: int = 1000, least_for_tpr: int = 300
) -> dict[str, Any]:
    """How well nearness to the synthetic images tells who was trained on.

    Args:
        members: ``(S,)`` distance of each training subject to its nearest synthetic image.
        others: ``(T,)`` the same of held-out subjects.
        seed, resamples: of the bootstrap over subjects.
        least_for_tpr: subjects that both sides need for the true positive rate at 1 % false positives, which a few
            subjects would decide otherwise.

    Returns:
        ``auc`` (probability that a member is nearer, ties half; 0.5 tells nothing), ``interval`` (95 %, percentiles),
        ``n``, ``tpr_at_1_percent_fpr`` or None.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        auc(members[rng.integers(len(members), size=len(members))], others[rng.integers(len(others), size=len(others))])
        for _ in range(resamples)
    ]
    enough = min(len(members), len(others)) >= least_for_tpr
    return {
        "auc": auc(members, others),
        "interval": [float(value) for value in np.percentile(drawn, [2.5, 97.5])],
        "n": {"members": len(members), "others": len(others)},
        "tpr_at_1_percent_fpr": tpr_at_fpr(members, others, 0.01) if enough else None,
    }


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(member < other) + P(equal) / 2, by ranks (Mann & Whitney 1947)."""
    ranks = stats.rankdata(np.concatenate([members, others]))
    u = ranks[: len(members)].sum() - len(members) * (len(members) + 1) / 2  # pairs in which the member is larger
    return float(1 - u / (len(members) * len(others)))


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, rate: float) -> float:
    """Share of members nearer than all but ``floor(rate T)`` of the T others."""
    allowed = int(rate * len(others) + 1e-9)
    return float((members < np.sort(others)[allowed]).mean())
