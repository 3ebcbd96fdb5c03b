"""Spaces in which an audit measures how near two images are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.matcher import Matcher
from ldm.precision import autocast

BATCH = 8
PARTS = ("orientation", "spacing", "shape", "intensity", "channels")  # of a preprocessing, that have to agree


class Space(Protocol):
    """Where images become vectors.

    Attributes:
        name: for results.
        words: what it is, for readers.
    """

    name: str
    words: str

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Vectors ``(N, V, F)`` of images ``(C, *S)``, each in V variants, the first of which is the image itself."""


class MatcherSpace:
    """Embeddings of a matcher, or of any function of images ``(B, C, *S)`` that gives ``(B, E)``, and of their flips.

    A matcher learns to ignore flips, but seldom all of them; they are few enough to be tried. Scaled so that the
    root-mean-square distance of two unit vectors is their Euclidean distance, 0 to 2.

    Args:
        matcher: images -> unit vectors.
        flip_axes: see :class:`ScaledLatentSpace`.
    """

    name = "features"
    words = "features of a network that was trained to recognise training scans, flips considered"

    def __init__(self, matcher: Callable[[Tensor], Tensor], flip_axes: Sequence[int]) -> None:
        self.matcher, self.flips = matcher, combinations(flip_axes)

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """``(N, V, E)`` float32."""
        vectors = with_flips(images, self.flips, self.matcher)  # (N, V, E)
        return vectors * np.float32(np.sqrt(vectors.shape[2]))


class ScaledLatentSpace:
    """Posterior means in the model's scaled latent space, of the image and of its flips.

    Args:
        model: whose first stage encodes.
        flip_axes: spatial axes that copies may be flipped along; every combination is a variant.
    """

    name = "latents"
    words = "scaled latents of the model, flips considered"

    def __init__(self, model: LatentDiffusionModel, flip_axes: Sequence[int]) -> None:
        self.model, self.flips = model, combinations(flip_axes)

    def __call__(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """``(N, V, C h w ...)`` float32."""
        return with_flips(images, self.flips, self._encoded)

    def _encoded(self, images: Tensor) -> Tensor:
        with autocast(self.model.device, "float32"):
            mean, _ = self.model.first_stage.encode(images.to(self.model.device))
            return self.model.latent_space.to_scaled(mean.float()).flatten(1)  # (B, F)


def combinations(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every choice of some of the axes, none of them first."""
    return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


@torch.no_grad()
def with_flips(
    images: Iterable[np.ndarray], flips: Sequence[tuple[int, ...]], encode: Callable[[Tensor], Tensor]
) -> np.ndarray:
    """``(N, V, F)`` float32: what ``encode`` makes of each image ``(C, *S)`` and of its flips."""
    found = []
    for batch in batches(images):  # (B, C, *S)
        variants = [encode(batch.flip([2 + axis for axis in axes])) for axes in flips]  # (B, F) each
        found.append(torch.stack(variants, 1).float().cpu().numpy())  # (B, V, F)
    return np.concatenate(found)


def batches(images: Iterable[np.ndarray], size: int = BATCH) -> Iterator[Tensor]:
    """Images ``(C, *S)`` as batches ``(B, C, *S)`` float32."""
    rest = iter(images)
    while batch := list(itertools.islice(rest, size)):
        yield torch.from_numpy(np.stack(batch).astype(np.float32))


def checked_flips(flip_axes: Sequence[int] | None, spatial_dims: int) -> tuple[int, ...]:
    """Spatial axes that copies may be flipped along; None is all of them.

    Raises:
        LdmError: an axis that does not exist.
    """
    axes = tuple(range(spatial_dims)) if flip_axes is None else tuple(flip_axes)
    if any(axis not in range(spatial_dims) for axis in axes):
        raise LdmError(f"flip_axes is {list(axes)}; legal are axes of {', '.join(map(str, range(spatial_dims)))}.")
    return axes


@torch.no_grad()
def reconstruction(model: LatentDiffusionModel, image: np.ndarray) -> np.ndarray:
    """An image ``(C, *S)`` through the first stage, as any sample comes out of it."""
    with autocast(model.device):
        mean, _ = model.first_stage.encode(torch.from_numpy(image)[None].float().to(model.device))
        decoded = model.decode(model.latent_space.to_scaled(mean.float()))  # (1, C, *S)
    return decoded[0].float().cpu().numpy()


def check_matcher(matcher: Matcher, path: Path, preprocessing: Preprocessing, cohort: Any) -> None:
    """Refuse a matcher that was made for other images, or that knows other scans than the model does.

    Args:
        matcher: read from ``path``.
        preprocessing: of the images that it will see.
        cohort: the :class:`ldm.data.cohort.Cohort` that is audited against.

    Raises:
        LdmError: it was trained on another cohort or split, or on images that were prepared otherwise.
    """
    again = "Train it again with the same data settings: ldm train-matcher."
    ours, theirs = preprocessing.to_dict(), matcher.preprocessing.to_dict()
    differing = [part for part in PARTS if ours[part] != theirs[part]]
    if differing:
        said = "; ".join(f"{part} {theirs[part]} there, {ours[part]} here" for part in differing)
        raise LdmError(f"matcher_path={path}: was trained on images that were prepared otherwise ({said}). {again}")
    if (matcher.facts["cohort"], matcher.facts["split_sha256"]) != (cohort.name, cohort.split_hash):
        raise LdmError(
            f"matcher_path={path}: was trained on another split (of cohort '{matcher.facts['cohort']}') than "
            f"data.split gives for '{cohort.name}' now. Held-out scans that it knows would spoil the threshold. {again}"
        )
