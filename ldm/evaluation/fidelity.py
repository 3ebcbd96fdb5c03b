"""Do samples show what was asked for? As well as the instrument can tell, which real images tell of it.

An instrument errs. So what it finds in samples stands beside what it finds in the real held-out images whose covariates
the samples were asked with, and the headline is the share of the real agreement that the samples reach.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from ldm.data.schema import Covariate, CovariateSchema
from ldm.evaluation.agreement import agreement, correlations, level_agreement
from ldm.evaluation.instruments import Instrument, OfAnotherSplit
from ldm.evaluation.repeats import percentiles, resampled_subjects, spread_over_seeds
from ldm.training import figures

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Real or generated images with what they should show, N each.

    Attributes:
        images: each ``(C, *S)``, in the model's range.
        rows: true or asked covariates.
        subjects: whose covariates these are.
    """

    images: Sequence[np.ndarray]
    rows: Sequence[Row]
    subjects: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int) -> ImageSet:
        """The first ``n``."""
        return ImageSet(self.images[:n], self.rows[:n], self.subjects[:n])


@dataclass(frozen=True)
class Measured:
    """What an instrument found in N images, beside what they should show; see :class:`ImageSet`."""

    rows: Sequence[Row]
    found: Sequence[Row]
    subjects: Sequence[str]

    def pairs(self, name: str) -> Pairs:
        """What should be there and what was found, of the images where both are known."""
        known = [
            (row[name], values[name], subject)
            for row, values, subject in zip(self.rows, self.found, self.subjects, strict=True)
            if row.get(name) is not None and measurable(values[name])
        ]
        return Pairs(*([one[k] for one in known] for k in range(3)))


@dataclass(frozen=True)
class Pairs:
    """True or asked values, measured ones, and whose they are; N each."""

    asked: Sequence[Any]
    found: Sequence[Any]
    subjects: Sequence[str]

    def __len__(self) -> int:
        return len(self.asked)

    def of(self, subjects: set[str]) -> Pairs:
        """Those of some subjects."""
        kept = [k for k, subject in enumerate(self.subjects) if subject in subjects]
        return Pairs(*([values[k] for k in kept] for values in (self.asked, self.found, self.subjects)))


def fidelity(
    instruments: Mapping[str, Instrument],
    schema: CovariateSchema,
    real: ImageSet,
    samples: ImageSet,
    folder: Path,
    further: Mapping[int, ImageSet] | None = None,
) -> dict[str, Any]:
    """Agreement of what was asked and measured in samples, and of truth and measurement on real held-out images.

    Args:
        instruments: title -> instrument.
        schema: of the covariates.
        real: held-out images and their true covariates.
        samples: asked with the covariates of ``real``.
        folder: where scatter plots go.
        further: seed -> samples drawn with other noise.

    Returns:
        Covariate -> what :func:`compare_values` or :func:`compare_levels` gives; a covariate that several instruments
        measure is there once an instrument, as ``covariate (title)``. ``trained_on_split`` is False of an instrument
        that may know some of the held-out images.
    """
    result = {}
    for title, instrument in instruments.items():
        on_real = measure(instrument, real, f"{title}: held-out images")
        on_samples = measure(instrument, samples, f"{title}: samples")
        again = {seed: measure(instrument, one, f"{title}: seed {seed}") for seed, one in (further or {}).items()}
        for name in on_real.found[0]:
            if name not in schema.names:
                continue
            key = name if name not in result else f"{name} ({title})"
            compare = compare_levels if schema[name].kind == "categorical" else compare_values
            found = compare(schema[name], on_real, on_samples, again)
            if found is None:
                logger.warning("%s: too few images could be measured, or all alike.", name)
                continue
            missing = sum(not measurable(values[name]) for values in on_samples.found)
            foreign = {"trained_on_split": False} if isinstance(instrument, OfAnotherSplit) else {}
            about = {"covariate": name, "instrument": title, **foreign}
            result[key] = {**about, **found, "unmeasurable_samples": missing}
            if found["kind"] == "continuous":
                _scatter(key, schema[name], on_real.pairs(name), on_samples.pairs(name), folder)
    return result


def measure(instrument: Instrument, images: ImageSet, title: str) -> Measured:
    """What the instrument finds in ``images``, with a progress bar."""
    return Measured(images.rows, [instrument(image) for image in track(images.images, title)], images.subjects)


def compare_values(
    covariate: Covariate, real: Measured, samples: Measured, further: Mapping[int, Measured]
) -> dict[str, Any] | None:
    """Agreement of a continuous covariate, and the samples' r over the real one; None where it cannot be had."""
    truth, asked = real.pairs(covariate.name), samples.pairs(covariate.name)
    again = [one.pairs(covariate.name) for one in further.values()]
    for pairs in (truth, asked, *again):
        if len(pairs) < 3 or min(np.ptp(pairs.asked), np.ptp(pairs.found)) == 0:
            return None
    on_real, on_samples, *others = (
        agreement(pairs.asked, pairs.found, subjects=pairs.subjects) for pairs in (truth, asked, *again)
    )
    result = {
        "kind": covariate.kind,
        "unit": covariate.unit or "",
        "instrument_on_held_out": on_real,
        "samples": on_samples,
        "share": share_of_real(truth, asked, _correlation) if on_real["r_interval"][0] > 0 else None,
    }
    if others:
        result["seeds"] = {
            name: spread_over_seeds([one[name] for one in (on_samples, *others)]) for name in ("r", "slope", "mae")
        }
    return result


def compare_levels(
    covariate: Covariate, real: Measured, samples: Measured, further: Mapping[int, Measured]
) -> dict[str, Any] | None:
    """Agreement of a categorical covariate, and the samples' share over the real one; None where no image has it."""
    sets = [one.pairs(covariate.name) for one in (real, samples, *further.values())]
    if not all(map(len, sets)):
        return None
    sets = [
        Pairs([covariate.levels[covariate.level_index(value)] for value in one.asked], one.found, one.subjects)
        for one in sets
    ]
    on_real, on_samples, *others = (
        level_agreement(one.asked, one.found, covariate.levels, one.subjects) for one in sets
    )
    result = {
        "kind": covariate.kind,
        "levels": list(covariate.levels),
        "instrument_on_held_out": on_real,
        "samples": on_samples,
        "share": share_of_real(*sets[:2], _accuracy) if on_real["accuracy"] > 0 else None,
    }
    if others:
        result["seeds"] = {"accuracy": spread_over_seeds([one["accuracy"] for one in (on_samples, *others)])}
    return result


def share_of_real(
    real: Pairs, samples: Pairs, statistic: Callable[[Pairs, np.ndarray], np.ndarray], seed: int = 0
) -> dict[str, Any] | None:
    """A statistic of the samples over that of the real images.

    The 95 % interval is that of 2000 bootstrap resamples of subjects: a subject's real image and the samples that were
    asked with its covariates are drawn together. Real images of other subjects are left out: a wider range of
    covariates alone would make their r larger.

    Args:
        real, samples: what is compared.
        statistic: of pairs and weights ``(R, N)``, giving ``(R,)``.
        seed: of the resamples.

    Returns:
        ``value``, ``interval``, ``subjects`` (how many); None where the real images have none that is above 0.
    """
    real = real.of(set(samples.subjects))
    subjects = [*real.subjects, *samples.subjects]
    counts = resampled_subjects(subjects, seed=seed)  # (R, N + M)
    values = []
    for weights in (np.ones((1, len(subjects))), counts):
        below, above = statistic(real, weights[:, : len(real)]), statistic(samples, weights[:, len(real) :])
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(np.where(below > 0, above / below, np.nan))
    if not np.isfinite(values[0][0]):
        return None
    return {"value": float(values[0][0]), "interval": percentiles(values[1]), "subjects": len(set(subjects))}


def measurable(value: float | str) -> bool:
    """Whether an instrument found a level or a finite value."""
    return isinstance(value, str) or bool(np.isfinite(value))


def _correlation(pairs: Pairs, weights: np.ndarray) -> np.ndarray:
    return correlations(np.asarray(pairs.asked, np.float64), np.asarray(pairs.found, np.float64), weights)[0]


def _accuracy(pairs: Pairs, weights: np.ndarray) -> np.ndarray:
    right = np.array([float(asked == found) for asked, found in zip(pairs.asked, pairs.found, strict=True)])  # (N,)
    with np.errstate(invalid="ignore"):
        return weights @ right / weights.sum(1)


def _scatter(key: str, covariate: Covariate, real: Pairs, samples: Pairs, folder: Path) -> None:
    everything = [float(value) for pairs in (real, samples) for value in (*pairs.asked, *pairs.found)]
    limits = min(everything), max(everything)
    for which, title, pairs in (("real", "held-out images", real), ("samples", "samples", samples)):
        path = folder / f"measured_{which}_{key}.png"
        figures.scatter(pairs.asked, pairs.found, f"{key}: {title}", covariate.unit or "", path, limits)
