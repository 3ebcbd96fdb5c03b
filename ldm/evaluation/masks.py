"""Do samples show the label map that they were given? Dice with the map that a segmenter finds in them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.instruments import Sections, instrument_sections, unlike
from ldm.metrics.overlap import dice_per_class
from ldm.model.segmenter import Segmenter

logger = logging.getLogger(__name__)

OF_SAMPLES = "samples: asked map and the map found"
OF_HELD_OUT = "held-out images: own map and the map found"
REBUILT = "the same, reconstructed"
CHANCE = "samples: asked map and the map found in another subject's sample"
PROTOCOL = {
    "empty": "a label that only one of two maps has scores 0; pairs where neither has it are left out and not in n",
    "interval": "95 %, percentile bootstrap over subjects with all their samples",
    "chance": "as many pairs as samples; the other sample was asked with another subject's map",
}


def mask_segmenter(config: Sections, classes: LabelClasses, preprocessing: Preprocessing) -> tuple[Segmenter, Path]:
    """The cohort's segmenter, where it finds the classes that a mask has, and its file.

    Args:
        config: ``data.instrument``: a section, a list of which the first segmenter counts, or None.
        classes: of the model's mask.
        preprocessing: of the model's images.

    Raises:
        LdmError: there is none, or it has other classes or was trained on images that were prepared in another way;
            says which.
    """
    sections = instrument_sections(config)
    section = next((one for one in sections if one.get("kind") == "segmenter"), None)
    if section is None:
        kinds = ", ".join(str(one.get("kind")) for one in sections)
        found = f"data.instrument.kind is {kinds}" if sections else "data.instrument is not set"
        raise LdmError(f"{found}; only a segmenter (ldm train-segmenter) finds label maps in images.")
    path = Path(section["path"])
    if not path.is_file():
        raise LdmError(f"there is no segmenter {path} yet (ldm train-segmenter).")
    segmenter = Segmenter.load(path)
    if segmenter.labels.values != classes.values:
        raise LdmError(f"{path} finds {_in_words(segmenter.labels)}, but the model's mask has {_in_words(classes)}.")
    trained, given = segmenter.preprocessing.to_dict(), preprocessing.to_dict()
    key = unlike(trained, given)
    if key is not None:
        raise LdmError(f"{path} was trained on images with {key} {trained[key]}, the model's have {given[key]}.")
    return segmenter, path


def mask_dice(
    segmenter: Segmenter,
    masks: Sequence[np.ndarray],
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray] | None,
    samples: Sequence[np.ndarray],
    asked: Sequence[int],
    subjects: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Dice of asked and found label maps, beside what the segmenter reaches on real images and what chance reaches.

    Args:
        segmenter: finds a map in an image.
        masks: stored label values ``(*S)`` of the held-out images.
        real, rebuilt: these images ``(C, *S)``, and the same reconstructed; None of a model that cannot.
        samples: images ``(C, *S)``.
        asked: for each sample, the position in ``masks`` of the map that it was given.
        subjects: whose each of ``masks`` is.
        seed: of the bootstrap.

    Returns:
        ``labels``: for each label and row (:data:`OF_SAMPLES`, :data:`OF_HELD_OUT`, :data:`REBUILT` and, if more than
        one subject was asked for, :data:`CHANCE`) ``mean``, ``std``, ``interval`` and ``n``, see :func:`summary`; and
        ``protocol``.
    """
    truth = [segmenter.labels.classes(torch.from_numpy(mask)) for mask in masks]  # (*S) each
    on_real, on_rebuilt, on_samples = (
        [torch.from_numpy(segmenter.segment(image)) for image in track(images, f"segmenting {name}")]  # (*S) each
        for name, images in (("held-out images", real), ("reconstructions", rebuilt or ()), ("samples", samples))
    )
    everyone, whose = range(len(masks)), [subjects[k] for k in asked]
    pairs = {
        OF_SAMPLES: (asked, on_samples),
        OF_HELD_OUT: (everyone, on_real),
        REBUILT: (everyone, on_rebuilt),
        CHANCE: (asked, [on_samples[other] for other in other_subjects(whose)]),
    }
    labels: dict[str, dict[str, Any]] = {name: {} for name in segmenter.labels.names}
    for row, (positions, found) in pairs.items():
        if not found:  # no reconstructions; or of one subject alone, and there is no other
            continue
        scores = [dice_per_class(one, truth[k], len(segmenter.labels)) for k, one in zip(positions, found, strict=True)]
        for name, values in zip(segmenter.labels.names, np.array(scores).T, strict=True):  # (N,)
            labels[name][row] = summary(values, [subjects[k] for k in positions], seed)
    return {"labels": labels, "protocol": PROTOCOL}


def other_subjects(subjects: Sequence[str]) -> list[int]:
    """For each sample another one of another subject: the first from half the list further on; empty if there is none.

    Half the list away, because neighbours in a table are often alike.
    """
    n = len(subjects)
    if len(set(subjects)) < 2:
        return []
    further = [[(i + n // 2 + step) % n for step in range(n)] for i in range(n)]
    return [next(j for j in order if subjects[j] != subjects[i]) for i, order in enumerate(further)]


def summary(values: np.ndarray, subjects: Sequence[str], seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Mean and standard deviation of scores; a bootstrap interval of the mean (Efron & Tibshirani 1993, chapter 13).

    Samples that were asked with one subject's map are not independent, so subjects are drawn, each with all its scores.

    Args:
        values: ``(N,)``; NaN is left out.
        subjects: whose each is, ``(N,)``.

    Returns:
        ``mean``, ``std``, ``interval`` (95 %, percentiles) and ``n``, of those that are not NaN. Of none ``mean``,
        ``std`` and ``interval`` are None; of one subject ``interval`` is.
    """
    kept = ~np.isnan(values)
    values, whose = values[kept], np.asarray(subjects)[kept]
    n, groups = len(values), np.unique(whose)
    if not n:
        return {"mean": None, "std": None, "interval": None, "n": 0}
    result = {"mean": float(values.mean()), "std": float(values.std()), "interval": None, "n": n}
    if len(groups) > 1:
        sums = np.array([values[whose == one].sum() for one in groups])  # (G,)
        counts = np.array([(whose == one).sum() for one in groups])  # (G,)
        drawn = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)  # (resamples,)
        result["interval"] = [float(v) for v in np.percentile(means, [2.5, 97.5])]
    return result


def _in_words(classes: LabelClasses) -> str:
    return ", ".join(f"{name} ({' '.join(map(str, values))})" for name, values in classes.values.items())
