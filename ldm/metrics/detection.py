"""How well maps show lesions and scores tell images apart: Dice, areas under curves, false alarms, with intervals.

A value above a threshold is a lesion. Voxels of one patient are not independent, so intervals are taken over patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from ldm.errors import LdmError
from ldm.metrics.segmentation import dice

Statistic = Callable[[np.ndarray], float]  # of how often each patient counts, (patients,)
PAIRED = ("pixel_auroc", "dice", "image_auroc")  # in which methods are compared
LEVELS = 1024  # of lesions and of the rest, each, that curves over many voxels are drawn with


@dataclass(frozen=True)
class Reference:
    """The reference standard: what is known of N images.

    Attributes:
        diseased: ``(N,)`` bool.
        subjects: whose image it is, one each.
        masks: ``(N, *S)`` bool, True in lesions; None where only the class is known.
    """

    diseased: np.ndarray
    subjects: Sequence[str]
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.diseased.all() or not self.diseased.any():
            word = "diseased" if self.diseased.all() else "healthy"
            raise LdmError(
                f"All {len(self.diseased)} images are {word}: areas under curves and false alarms need both healthy "
                "and diseased ones."
            )
        if self.masks is not None and not self.masks.any():
            raise LdmError(f"None of the {len(self.masks)} masks has a lesion.")

    def owners(self) -> np.ndarray:
        """Number of each image's patient, ``(N,)``."""
        return np.unique(np.asarray(self.subjects), return_inverse=True)[1]


def best_threshold(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The threshold of largest Dice over all elements together, and that Dice; exact, over every distinct value.

    Args:
        values: of any shape, finite.
        truth: bool, of the same shape, with at least one True.

    Returns:
        The threshold, half way to the next smaller value, and the Dice of ``values > threshold``.
    """
    values, truth = np.asarray(values, np.float64).ravel(), np.asarray(truth, bool).ravel()
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], np.cumsum(truth[order])  # hits[k]: lesions among the k + 1 largest
    last = np.append(ordered[1:] < ordered[:-1], True)  # where a threshold can be: behind the last of equal values
    scores = np.where(last, 2 * hits / (np.arange(1, len(values) + 1) + truth.sum()), -1.0)
    best = int(scores.argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else ordered[best] - 1.0
    return float((ordered[best] + below) / 2), float(scores[best])


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that separates a histogram into two classes of largest between-class variance (Otsu 1979).

    With the first k bins as one class, of weight w and mean m, and M the mean of all: ``(M w - m w)^2 / (w (1 - w))``
    (eq. 18). The threshold is the edge behind bin k; constant values give their value, above which there is nothing.
    """
    values = np.asarray(values, np.float64).ravel()
    low, high = values.min(), values.max()
    if low == high:
        return float(low)
    counts, edges = np.histogram(values, bins, (low, high))
    share, centres = counts / counts.sum(), (edges[:-1] + edges[1:]) / 2
    weight, moment = np.cumsum(share)[:-1], np.cumsum(share * centres)[:-1]  # (bins - 1,)
    inside = (weight > 0) & (weight < 1)
    between = np.zeros_like(weight)
    mean = (share * centres).sum()
    between[inside] = (mean * weight[inside] - moment[inside]) ** 2 / (weight[inside] * (1 - weight[inside]))
    tied = np.flatnonzero(between >= between.max() * (1 - 1e-12))  # an empty gap: its middle
    return float(edges[tied + 1].mean())


def interval_over_patients(
    statistic: Statistic, patients: int, resamples: int = 500, seed: int = 0
) -> list[float] | None:
    """95 % percentile interval over patients (Efron & Tibshirani 1993, chapter 13).

    None where the statistic hangs on one patient, without whom it is not defined: draws of one tell of no spread.

    Args:
        statistic: of how often each patient is drawn, ``(patients,)``; NaN where it is not defined.
        patients: how many there are.
        resamples, seed: draws of as many patients, with replacement.
    """
    if any(np.isnan(statistic(others)) for others in 1 - np.eye(patients, dtype=np.int64)):
        return None
    rng = np.random.default_rng(seed)
    values = [statistic(rng.multinomial(patients, np.full(patients, 1 / patients))) for _ in range(resamples)]
    return [float(value) for value in np.nanpercentile(values, [2.5, 97.5])]


def detection_metrics(
    maps: np.ndarray,
    scores: np.ndarray,
    reference: Reference,
    threshold: float | None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, dict]:
    """All numbers of one method, each with ``value`` and ``interval``, None where there is none.

    ``image_auroc``, ``image_auprc``: of ``scores``. With masks: ``pixel_auroc``, ``pixel_auprc`` over all voxels of all
    images; ``dice_otsu``: mean over diseased images with Otsu's threshold of each. With a threshold:
    ``false_positive_voxels``: share of the voxels of healthy images above it, ``false_positive_images``: share of
    healthy images with such a voxel; and, with masks, ``dice``: mean over diseased images, ``dice_pooled``: over all
    voxels of all images, healthy ones included. The area under a precision-recall curve is average precision; by chance
    it is the share of lesions (``prevalence``).

    Args:
        maps: ``(N, *S)``, larger where there is a lesion.
        scores: ``(N,)``, larger for the diseased.
        reference: of the same images.
        threshold: of the maps, chosen on other images; None where there is none.
        resamples, seed: see `interval_over_patients`.
    """
    statistics = detection_statistics(maps, scores, reference, threshold)
    return values_of(statistics, reference, resamples, seed)


def detection_statistics(
    maps: np.ndarray, scores: np.ndarray, reference: Reference, threshold: float | None
) -> dict[str, Statistic]:
    """The numbers of :func:`detection_metrics` as functions of how often each patient counts; they keep no maps."""
    owners = reference.owners()
    statistics = _image_statistics(maps, scores, reference, threshold, owners)
    if reference.masks is not None:
        statistics |= _voxel_statistics(maps, reference, threshold, owners)
    return statistics


def values_of(
    statistics: Mapping[str, Statistic], reference: Reference, resamples: int = 500, seed: int = 0
) -> dict[str, dict]:
    """``value`` and ``interval`` of every statistic and, with masks, the share of lesions as ``prevalence``."""
    result = {name: _with_interval(one, reference, resamples, seed) for name, one in statistics.items()}
    if reference.masks is not None:
        result["prevalence"] = {"value": float(reference.masks.mean())}
    return result


def paired_differences(
    statistics: Mapping[str, Statistic],
    others: Mapping[str, Statistic],
    reference: Reference,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, dict]:
    """One method less another on the same images, of the numbers of `PAIRED` that both have.

    Each draw of patients is the same for both, so that what makes a patient hard for both adds nothing to the interval.
    Above 0 the first is better; it is so beyond chance if the interval is above 0.

    Args:
        statistics, others: of :func:`detection_statistics`, of one reference.
        reference: of the images.
        resamples, seed: see `interval_over_patients`.

    Returns:
        ``value`` and ``interval`` of each.
    """

    def difference(name: str) -> Statistic:
        return lambda w: statistics[name](w) - others[name](w)

    names = [name for name in PAIRED if name in statistics and name in others]
    return {name: _with_interval(difference(name), reference, resamples, seed) for name in names}


def _with_interval(statistic: Statistic, reference: Reference, resamples: int, seed: int) -> dict:
    patients = int(reference.owners().max()) + 1
    everyone = np.ones(patients, np.int64)
    return {
        "value": float(statistic(everyone)),
        "interval": interval_over_patients(statistic, patients, resamples, seed),
    }


def image_auroc(scores: np.ndarray, reference: Reference) -> float:
    """Area under the receiver operating characteristic of image scores ``(N,)``."""
    return float(roc_auc_score(reference.diseased, scores))


def voxel_auprc(maps: np.ndarray, reference: Reference) -> float:
    """Average precision over all voxels of all images, of maps ``(N, *S)``."""
    everyone = np.zeros(len(maps), np.int64)
    return _voxel_statistics(maps, reference, None, everyone)["pixel_auprc"](np.ones(1, np.int64))


def _image_statistics(
    maps: np.ndarray, scores: np.ndarray, reference: Reference, threshold: float | None, owners: np.ndarray
) -> dict[str, Statistic]:
    axes = tuple(range(1, maps.ndim))
    healthy = ~reference.diseased
    statistics: dict[str, Statistic] = {
        "image_auroc": lambda w: _area(roc_auc_score, reference.diseased, scores, w[owners]),
        "image_auprc": lambda w: _area(average_precision_score, reference.diseased, scores, w[owners]),
    }
    if threshold is not None:
        above = (maps > threshold).mean(axes)  # (N,)
        statistics["false_positive_voxels"] = _mean_over(above, healthy, owners)
        statistics["false_positive_images"] = _mean_over(above > 0, healthy, owners)
    if reference.masks is not None:
        ill = reference.masks.any(axes)
        by_otsu = [dice(m > otsu(m), t) if any_ else 0.0 for m, t, any_ in zip(maps, reference.masks, ill, strict=True)]
        statistics["dice_otsu"] = _mean_over(np.array(by_otsu), ill, owners)
        if threshold is not None:
            each = np.array([dice(m > threshold, t) for m, t in zip(maps, reference.masks, strict=True)])
            statistics["dice"] = _mean_over(each, ill, owners)
    return statistics


def _voxel_statistics(
    maps: np.ndarray, reference: Reference, threshold: float | None, owners: np.ndarray
) -> dict[str, Statistic]:
    lesions, rest, edges = voxel_counts(maps, reference.masks, owners, threshold)
    levels = np.concatenate([np.arange(lesions.shape[1])] * 2)
    labels = np.repeat([True, False], lesions.shape[1])

    def area(curve: Callable) -> Statistic:
        return lambda w: _area(curve, labels, levels, np.concatenate([w @ lesions, w @ rest]))

    statistics = {"pixel_auroc": area(roc_auc_score), "pixel_auprc": area(average_precision_score)}
    if threshold is not None:
        above = int(np.searchsorted(edges, threshold)) + 1  # levels from here on are above the threshold

        def pooled(w: np.ndarray) -> float:
            positives, negatives = w @ lesions, w @ rest
            hits = positives[above:].sum()
            total = hits + negatives[above:].sum() + positives.sum()
            return 2 * hits / total if total else float("nan")

        statistics["dice_pooled"] = pooled
    return statistics


def voxel_counts(
    maps: np.ndarray, masks: np.ndarray, owners: np.ndarray, threshold: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many lesion voxels, and others, of each patient have values of each level.

    Levels are the distinct values, or, if there are many, `LEVELS` quantiles of lesions and as many of the rest. A
    value is of level k if it is above edge k - 1 and not above edge k; the threshold is one of the edges.

    Returns:
        Counts ``(patients, K)`` of lesions and of the rest, and the edges ``(K - 1,)``.
    """
    edges = np.unique(maps)
    if len(edges) > 2 * LEVELS:
        shares = np.linspace(0, 1, LEVELS)
        edges = np.unique(np.concatenate([np.quantile(maps[masks], shares), np.quantile(maps[~masks], shares)]))
    if threshold is not None:
        edges = np.unique(np.append(edges, threshold))
    patients, count = int(owners.max()) + 1, len(edges) + 1
    lesions, rest = np.zeros((patients, count)), np.zeros((patients, count))
    for values, mask, owner in zip(maps, masks, owners, strict=True):
        levels = np.searchsorted(edges, values, side="left")
        lesions[owner] += np.bincount(levels[mask], minlength=count)
        rest[owner] += np.bincount(levels[~mask], minlength=count)
    return lesions, rest, edges


def _mean_over(values: np.ndarray, chosen: np.ndarray, owners: np.ndarray) -> Statistic:
    values = values[chosen].astype(np.float64)

    def mean(w: np.ndarray) -> float:
        weights = w[owners[chosen]]
        return float((weights * values).sum() / weights.sum()) if weights.sum() else float("nan")

    return mean


def _area(curve: Callable, truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """An area under a curve; NaN where there is nothing of one class."""
    counted = weights > 0
    if len(np.unique(truth[counted])) < 2:
        return float("nan")
    return float(curve(truth[counted], values[counted], sample_weight=weights[counted]))
