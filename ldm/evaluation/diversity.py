"""Do samples differ from each other as different subjects do: at the same covariates, and as a set?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import track

from ldm.data.schema import CovariateSchema
from ldm.evaluation.repeats import percentiles, resampled_subjects, spread_over_seeds
from ldm.metrics.similarity import ms_ssim, ms_ssim_protocol


def nearest_pairs(
    schema: CovariateSchema, rows: Sequence[Mapping[str, Any]], subjects: Sequence[str]
) -> list[tuple[int, int]]:
    """Each image with that of another subject whose covariates are nearest; one at random of those equally near.

    Args:
        schema: of the covariates.
        rows: of N images; a value that is missing counts as the mean, a level is at the same distance from any other.
        subjects: whose each is.

    Returns:
        Pairs of positions, each once; none where all are of one subject.
    """
    columns = []
    for name in schema.names:
        covariate, values = schema[name], [row.get(name) for row in rows]
        if covariate.kind == "categorical":
            found = [None if value is None else covariate.level_index(value) for value in values]
            for level in range(len(covariate.levels)):
                columns.append([np.nan if one is None else float(one == level) for one in found])
        else:
            columns.append([np.nan if value is None else float(value) for value in values])
    codes = np.array(columns, np.float64).reshape(len(columns), len(rows)).T  # (N, K)
    codes = codes[:, np.isfinite(codes).any(0)]
    filled = np.where(np.isnan(codes), np.nanmean(codes, axis=0, keepdims=True), codes)
    scaled = (filled - filled.mean(0)) / np.maximum(filled.std(0), 1e-9)
    distance = np.linalg.norm(scaled[:, None] - scaled[None], axis=-1)  # (N, N)
    names = np.asarray(subjects)
    # Were it always the first of them, all images of a level would be compared with the same one.
    distance += 1e-9 * np.random.default_rng(0).random(distance.shape)
    distance[names[:, None] == names[None]] = np.inf
    nearest = [(i, int(row.argmin())) for i, row in enumerate(distance) if np.isfinite(row).any()]
    return sorted({tuple(sorted(pair)) for pair in nearest})


def spread(
    images: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]], value_range: tuple[float, float]
) -> dict[str, Any]:
    """How far apart the pairs are.

    Args:
        images: each ``(C, *S)``.
        pairs: positions to compare.
        value_range: of the images.

    Returns:
        ``ms_ssim`` and ``rms`` (root-mean-square difference over the range), each with ``mean``, ``std`` and ``n``.
    """
    low, high = value_range
    alike = [ms_ssim(images[i], images[j], high - low) for i, j in pairs]
    apart = [float(np.sqrt(np.mean((images[i] - images[j]) ** 2))) / (high - low) for i, j in pairs]
    summary = {
        name: {"mean": float(np.mean(values)), "std": float(np.std(values)), "n": len(values)}
        for name, values in (("ms_ssim", alike), ("rms", apart))
    }
    return {**summary, "protocol": ms_ssim_protocol(images[0].shape[1:])}


REAL, RECONSTRUCTED, SAMPLES = "real", "reconstructed", "samples"


def pairs_within(subjects: Sequence[str], most: int = 200, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of images of different subjects: all, or ``most`` of them drawn at random.

    Args:
        subjects: whose each image is.
        most: largest number of pairs.
        seed: of the draw.
    """
    pairs = [(i, j) for i, j in itertools.combinations(range(len(subjects)), 2) if subjects[i] != subjects[j]]
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:most]
    return [pairs[k] for k in sorted(chosen)]


def within_sets(
    sets: Mapping[str, Sequence[np.ndarray]],
    subjects: Sequence[str],
    value_range: tuple[float, float],
    most: int = 200,
    seed: int = 0,
    further: Mapping[int, Sequence[np.ndarray]] | None = None,
) -> dict[str, Any] | None:
    """Mean MS-SSIM of pairs within each set, and how far it is from that within the real images.

    The pairs have the same positions in every set, and image i of every set belongs to subject i or was asked as this
    subject, so that the difference of two sets is one of like pairs. Intervals are 95 % percentiles of 2000 bootstrap
    resamples of subjects; a pair counts as often as its two subjects together.

    Args:
        sets: ``real`` and others, each images ``(C, *S)``.
        subjects: whose the images of ``real`` are.
        value_range: of the images.
        most: largest number of pairs.
        seed: of the pairs and the resamples.
        further: seed -> samples drawn with other noise.

    Returns:
        ``sets``: name -> ``mean``, ``std``, ``interval``; ``difference``: name -> ``value``, ``interval`` (set minus
        real); ``seeds``: spread of the samples' difference over seeds, if there are several; ``protocol``. None where
        there are fewer than 3 pairs.
    """
    pairs = pairs_within(subjects, most, seed)
    if len(pairs) < 3:
        return None
    counts = resampled_subjects(subjects, seed=seed)  # (R, N)
    weights = counts[:, [i for i, _ in pairs]] * counts[:, [j for _, j in pairs]]  # (R, P)
    values = {name: _alike(images, pairs, value_range, name) for name, images in sets.items()}  # (P,) each
    again = {number: _alike(images, pairs, value_range, f"seed {number}") for number, images in (further or {}).items()}
    result = {
        "sets": {
            name: {"mean": float(one.mean()), "std": float(one.std()), "interval": _mean_interval(one, weights)}
            for name, one in values.items()
        },
        "difference": {
            name: {
                "value": float((one - values[REAL]).mean()),
                "interval": _mean_interval(one - values[REAL], weights),
            }
            for name, one in values.items()
            if name != REAL
        },
        "protocol": {
            **ms_ssim_protocol(sets[REAL][0].shape[1:]),
            "images": len(subjects),
            "subjects": len(set(subjects)),
            "pairs": len(pairs),
            "drawn": "all pairs of different subjects, or a random choice; the same positions in every set",
            "interval": "95 %, 2000 bootstrap resamples of subjects",
        },
    }
    if again:
        differences = [float((one - values[REAL]).mean()) for one in (values[SAMPLES], *again.values())]
        result["seeds"] = {"difference": spread_over_seeds(differences)}
    return result


def _alike(
    images: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]], value_range: tuple[float, float], name: str
) -> np.ndarray:
    low, high = value_range
    shown = track(pairs, f"MS-SSIM within {name}")
    return np.array([ms_ssim(images[i], images[j], high - low) for i, j in shown])


def _mean_interval(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """Interval of the mean of ``values`` ``(P,)`` from resampled weights ``(R, P)``."""
    total = weights.sum(1)
    return percentiles((weights @ values)[total > 0] / total[total > 0])
