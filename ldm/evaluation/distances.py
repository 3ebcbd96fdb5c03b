"""Distances between distributions of images in the features of a network, with everything they depend on.

A Fréchet distance or a KID alone says nothing: it depends on the features, the number of images, the reference, the
intensities and the size. So every set is measured at the same n against the same reference, beside two yardsticks, real
images that nothing was trained on (the floor) and the same blurred (the control), and the protocol stands beside the
numbers. A metric that does not rank all of the controls below real images is named as one that cannot be trusted here.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from ldm.data.datamodule import CohortDataModule
from ldm.diffusion import noise
from ldm.errors import LdmError
from ldm.evaluation.features import FeatureNetwork, extract
from ldm.evaluation.repeats import spread_over_seeds
from ldm.metrics.frechet import frechet_distance, frechet_infinity, frechet_interval
from ldm.metrics.kernels import kernel_distance, kernel_interval, median_distance, mmd, mmd_interval
from ldm.metrics.neighbours import neighbour_intervals, precision_recall_density_coverage
from ldm.metrics.ratio import frechet_ratios, numbered
from ldm.model.file import package_versions
from ldm.model.generative import Generative
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.output import as_written
from ldm.networks.autoencoder import AutoencoderKL
from ldm.precision import autocast

logger = logging.getLogger(__name__)

SMALLEST = 8  # images that each set has to have
SUBJECTS = 3  # whose these have to be: with fewer there is no interval over subjects
EXTRAPOLATED_FROM = 100  # subjects; a line through the distances of fewer images ends anywhere
NEIGHBOURS = 5
BLUR = 1.0  # voxels, standard deviation

FLOOR = "held-out images"
CONTROL = "held-out images, blurred"
RECONSTRUCTED = "held-out images, reconstructed"
PRIOR = "first stage alone: decoded draws of N(0, I)"
SAMPLES = "samples of the model"
FURTHER = "samples, seed {}"
OTHER = "samples, drawn as: {}"

# which way is better, of every metric of a row
BETTER = {"frechet": -1, "kid": -1, "mmd": -1, "precision": 1, "recall": 1, "density": 1, "coverage": 1}


def model_distances(
    network: FeatureNetwork,
    model: Generative,
    datamodule: CohortDataModule,
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray] | None,
    samples: Sequence[np.ndarray],
    control: Iterable[np.ndarray],
    n_ref: int = 1000,
    seed: int = 0,
    further: Mapping[int, Sequence[np.ndarray]] | None = None,
    subjects: Sequence[str] | None = None,
    others: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> dict[str, Any] | None:
    """What ``metrics.json`` holds under ``distances`` for a model and the held-out images of its cohort.

    The reference are at most ``n_ref`` images of the training split. All sets have n images, the smaller of held-out
    images and samples; sample i was asked as held-out image i, so the first n of both have the same covariates. All
    that is given was written to files and read again, or is what files would give back; so is what is added here.

    Args:
        network: see :mod:`ldm.evaluation.features`.
        model: what is evaluated.
        datamodule: its cohort.
        real, rebuilt: held-out images and their reconstructions, each ``(C, *S)``; None of a model that cannot.
        samples: asked with the covariates of ``real`` in turn.
        control: held-out images in the order of ``real``, each :func:`blurred`; not taken further than the first n.
        n_ref: size of the reference.
        seed: of the reference, the draws and the resamples.
        further: seed -> samples asked alike, drawn with other noise; a row each, and the spread over all seeds.
        subjects: whose each of ``real`` is; None is another subject each.
        others: name -> samples asked alike, drawn in another way; a row each.

    Returns:
        None, with a warning, when there are too few images or subjects.
    """
    n, train = min(len(real), len(samples)), datamodule.dataset("train")
    chosen = np.random.default_rng(seed).permutation(len(train))[:n_ref]
    records = datamodule.cohort.split("train")
    whose = range(n) if subjects is None else subjects[:n]
    theirs = [records[position].subject for position in chosen]
    for what, owners in (("held-out images with samples", whose), ("training images", theirs)):
        if (lacking := too_few(owners)) is not None:
            logger.warning("Distances are left out: of %s there are %s.", what, lacking)
            return None
    channels = [datamodule.preprocessing.channels.index(name) for name in model.preprocessing.channels]
    written = functools.partial(as_written, model.preprocessing)
    reference = (written(train[position]["image"][channels].numpy()) for position in chosen)
    sets: dict[str, Iterable[np.ndarray]] = {
        FLOOR: real[:n],
        CONTROL: itertools.islice(control, n),
    }
    if rebuilt is not None:
        sets[RECONSTRUCTED] = rebuilt[:n]
    if isinstance(getattr(model, "first_stage", None), AutoencoderKL):
        sets[PRIOR] = map(written, prior_images(model, n, seed))
    sets[SAMPLES] = samples[:n]
    again = {FURTHER.format(number): images for number, images in (further or {}).items()}
    sets |= {name: images[:n] for name, images in again.items()}
    sets |= {OTHER.format(name): images[:n] for name, images in (others or {}).items()}
    result = compare(
        extract(network, reference),
        {name: extract(network, images) for name, images in sets.items()},
        FLOOR,
        CONTROL,
        {
            "features": network.identity,
            "reference": {"images": "training split", "n": len(chosen), "of": len(train)},
            "available": {"held-out images": len(real), "samples": len(samples)},
            "images": "as written to files and read again",
            "image_size": list(real[0].shape),
            "value_range": None if model.preprocessing.value_range is None else list(model.preprocessing.value_range),
        },
        seed,
        controls=[name for name in (CONTROL, RECONSTRUCTED, PRIOR) if name in sets],
        subjects=whose,
        reference_subjects=theirs,
    )
    if again:
        result["seeds"] = over_seeds([result["rows"][name] for name in (SAMPLES, *again)])
    return result


def too_few(whose: Sequence[Any]) -> str | None:
    """What a set of images has too few of for distances, and what would do; None if nothing.

    Args:
        whose: subject of each image.
    """
    if len(whose) < SMALLEST:
        return f"{len(whose)}; legal: {SMALLEST} or more"
    count = len(set(whose))
    return f"those of {count} subjects; legal: {SUBJECTS} subjects or more" if count < SUBJECTS else None


def compare(
    reference: np.ndarray,
    sets: Mapping[str, np.ndarray],
    floor: str,
    control: str,
    protocol: Mapping[str, Any],
    seed: int = 0,
    controls: Sequence[str] = (),
    subjects: Sequence[str] | None = None,
    reference_subjects: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Distances of every set from the reference.

    Args:
        reference: features ``(R, F)``.
        sets: name -> features ``(N, F)``; of each the first n, the smallest N.
        floor: the set of real images, whose Fréchet distance is the unit of ``frechet_ratio``.
        control: the set of worse images.
        protocol: what is known beside the features.
        seed: of the resamples.
        controls: all sets that are worse than real images in a known way; ``control`` alone if none are named.
        subjects: whose image i of every set is, or was made after; None is another subject each.
        reference_subjects: the same for the reference.

    Returns:
        ``rows``: name -> numbers; ``floor``, ``control``, ``controls``: which rows these are; ``control_is_worse``:
        whether the Fréchet distance sees what is wrong with the control, without which it says nothing; ``untrusted``:
        metric -> the controls that it does not rank below the floor; ``protocol``.

    Raises:
        LdmError: a set has fewer than 3 images or subjects, or features are not finite or all alike.
    """
    n = min(len(reference), *(len(features) for features in sets.values()))
    axes, reduction = principal_directions(np.concatenate([reference, sets[floor][:n]]), n)
    if "caution" in reduction:
        logger.warning("%s", reduction["caution"])
    bandwidth = median_distance(reference)
    whose = numbered(None if subjects is None else subjects[:n], n), numbered(reference_subjects, len(reference))
    rows = {name: _row(reference, features[:n], axes, bandwidth, seed, whose) for name, features in sets.items()}
    ratios = frechet_ratios(
        reference @ axes,
        {name: features[:n] @ axes for name, features in sets.items()},
        floor,
        None if subjects is None else subjects[:n],
        reference_subjects,
        seed,
    )
    for name, ratio in ratios.pop("ratios").items():
        rows[name]["frechet_ratio"] = None if ratio is None else ratio["value"]
        rows[name]["frechet_ratio_interval"] = None if ratio is None else ratio["interval"]
    controls = list(controls) or [control]
    return {
        "rows": rows,
        "floor": floor,
        "control": control,
        "controls": controls,
        "control_is_worse": rows[control]["frechet"] > rows[floor]["frechet"],
        "untrusted": untrusted(rows, floor, controls),
        "protocol": {
            **protocol,
            "n": n,
            "frechet": reduction,
            "frechet_ratio": {
                **ratios,
                "interval": "95 %, jackknife over subjects, set and reference at once",
            },
            "frechet_interval": "95 %, 200 bootstrap resamples of the subjects of both sets, centred on the distance",
            "kid": "kernel (x.y / F + 1)^3, unbiased, all pairs; 95 % interval: jackknife over subjects of both",
            "mmd": {"kernel": "Gaussian, unbiased; interval as of KID", "bandwidth": bandwidth},
            "neighbours": {
                "k": min(NEIGHBOURS, n - 1),
                "reference_images": n,
                "interval": "95 %, jackknife over subjects, both sets at once",
            },
            "blur": f"Gaussian, standard deviation {BLUR:g} voxel",
            "seed": seed,
            "versions": package_versions(),
        },
    }


def _row(
    reference: np.ndarray,
    features: np.ndarray,
    axes: np.ndarray,
    bandwidth: float,
    seed: int,
    whose: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    n = len(features)
    ours, theirs = features @ axes, reference @ axes  # (N, D), (R, D)
    extrapolates = min(len(np.unique(one)) for one in whose) >= max(EXTRAPOLATED_FROM, 2 * axes.shape[1] + 1)
    subjects = {"whose_a": whose[0], "whose_b": whose[1]}
    # As many reference images as there are others: what a ball holds depends on how dense its set is.
    neighbours = reference[:n], features, min(NEIGHBOURS, n - 1)
    return {
        "n": n,
        "frechet": frechet_distance(ours, theirs),
        "frechet_interval": list(frechet_interval(ours, theirs, seed=seed, **subjects)),
        "frechet_infinity": frechet_infinity(ours, theirs, seed=seed, **subjects) if extrapolates else None,
        "kid": kernel_distance(features, reference),
        "kid_interval": list(kernel_interval(features, reference, *whose)),
        "mmd": mmd(features, reference, bandwidth),
        "mmd_interval": list(mmd_interval(features, reference, bandwidth, *whose)),
        **precision_recall_density_coverage(*neighbours),
        **neighbourhood(*neighbours, whose),
    }


def neighbourhood(
    reference: np.ndarray, features: np.ndarray, k: int, whose: tuple[np.ndarray, np.ndarray]
) -> dict[str, list[float] | None]:
    """Intervals of precision, recall, density and coverage; None of sets so small that no image can be left out."""
    whose_reference = numbered(list(whose[1][: len(reference)]), len(reference))
    try:
        found = neighbour_intervals(reference, features, k, whose_reference, whose[0])
    except LdmError:
        found = dict.fromkeys(("precision", "recall", "density", "coverage"))
    return {f"{name}_interval": one for name, one in found.items()}


def untrusted(rows: Mapping[str, Mapping[str, Any]], floor: str, controls: Sequence[str]) -> dict[str, list[str]]:
    """Metrics that do not rank images known to be worse below real ones: metric -> these images.

    A tie counts: a metric that is at its end for both sees no difference. Images that have the Fréchet distance of the
    real ones, such as perfect reconstructions, are none that are known to be worse.
    """
    worse = [name for name in controls if rows[name]["frechet"] != rows[floor]["frechet"]]
    above = {
        metric: [name for name in worse if sign * rows[name][metric] >= sign * rows[floor][metric]]
        for metric, sign in BETTER.items()
    }
    return {metric: names for metric, names in above.items() if names}


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metric -> ``values``, their ``mean`` and standard deviation ``std`` over repeated generation."""
    names = [name for name in (*BETTER, "frechet_ratio") if all(row[name] is not None for row in rows)]
    return {name: spread_over_seeds([row[name] for row in rows]) for name in names}


def principal_directions(real: np.ndarray, n: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Directions in which the Fréchet distance of n images is taken, and what is said of them.

    With fewer than 2 F images most of a covariance of F features is noise. Then n / 10 directions, at least 2, are
    kept: those in which the features of real images vary most. Those of the reference alone would be the ones that
    the reference's own images happen to vary in, and any other images, real ones too, would seem to vary less.

    Args:
        real: features ``(R, F)`` of the reference and the floor.
        n: images of each set.

    Returns:
        ``(F, D)`` orthonormal columns, and a description, with a ``caution`` where there are more features than images.
    """
    size = real.shape[1]
    if n >= 2 * size:
        return np.eye(size), {"directions": size, "of": size, "rule": "all features, as n >= 2 F"}
    kept = min(max(2, n // 10), size)
    centred = real - real.mean(0)  # (R, F)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    caution = (
        f"There are more features ({size}) than images ({n}): the Fréchet distance is taken in {kept} directions, "
        "is not the one over all features that is published elsewhere, and is blind to differences in others. "
        "KID needs no covariance and sees all features."
    )
    return directions[:kept].T, {
        "directions": kept,
        "of": size,
        "rule": "as n < 2 F, the first max(2, n / 10) principal directions of the features of all real images",
        "explained_variance": float(np.square(spread[:kept]).sum() / np.square(spread).sum()),
        **({"caution": caution} if size > n else {}),
    }


def blurred(image: np.ndarray) -> np.ndarray:
    """An image ``(C, *S)`` that lost fine detail: what every distance should see."""
    return gaussian_filter(image, [0, *[BLUR] * (image.ndim - 1)])


@torch.no_grad()
def prior_images(model: LatentDiffusionModel, n: int, seed: int) -> Iterable[np.ndarray]:
    """What the first stage generates without the diffusion model: ``(C, *S)`` decoded from raw latents of N(0, I)."""
    for index in range(n):
        z = noise.draw([noise.step_generator(seed, 0, index)], model.latent_shape).to(model.device)  # (1, C, *S)
        with autocast(model.device):
            image = model.decode(model.latent_space.to_scaled(z))  # (1, C, *S)
        yield image[0].float().cpu().numpy()
