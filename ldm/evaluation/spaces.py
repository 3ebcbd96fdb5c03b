"""Spaces in which an audit measures how near two images are."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.matcher import Matcher, pooled
from ldm.networks.autoencoder import AutoencoderKL
from ldm.precision import autocast

BATCH = 8
COARSE_SIDE = 32
SHIFT = 0.06  # of each side; planted copies are shifted by 0.04
PARTS = ("orientation", "spacing", "shape", "intensity", "channels")  # of a preprocessing, that have to agree


class Space(ABC):
    """Where images become vectors. A copy may have been changed, so that variants of an image are looked for too.

    Attributes:
        name: for results.
        words: what it is, for readers.
    """

    name: ClassVar[str]
    words: ClassVar[str]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Vectors ``(B, F)`` of images ``(B, C, *S)``; differences count by their root mean square."""

    @abstractmethod
    def variants(self, image: Tensor) -> Tensor:
        """Vectors ``(V, F)`` of an image ``(C, *S)`` and of V - 1 variants of it; the image itself comes first."""

    @torch.no_grad()
    def vectors(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """``(N, F)`` float32 of images ``(C, *S)``."""
        return np.concatenate([self.encode(batch).float().cpu().numpy() for batch in batches(images)])

    @torch.no_grad()
    def all_variants(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """``(V, F)`` float32 of each image ``(C, *S)``: one at a time, as those of many do not fit in memory."""
        for image in images:
            yield self.variants(torch.from_numpy(np.asarray(image, np.float32))).float().cpu().numpy()


class FlipSpace(Space):
    """A space whose variants are flips of the image.

    Args:
        flip_axes: spatial axes that copies may be flipped along; every combination is a variant.
    """

    def __init__(self, flip_axes: Sequence[int]) -> None:
        self.flips = combinations(flip_axes)

    def variants(self, image: Tensor) -> Tensor:
        """See :meth:`Space.variants`."""
        return self.encode(torch.stack(flipped(image, self.flips)))  # (V, F)


class MatcherSpace(FlipSpace):
    """Embeddings of a matcher, or of any function of images ``(B, C, *S)`` that gives ``(B, E)``.

    A matcher learns to ignore flips, but seldom all of them; they are few enough to be tried. Scaled so that the
    root-mean-square distance of two unit vectors is their Euclidean distance, 0 to 2.

    Args:
        matcher: images -> unit vectors.
        flip_axes: see :class:`FlipSpace`.
    """

    name = "features"
    words = "features of a network that was trained to recognise training scans, flips considered"

    def __init__(self, matcher: Callable[[Tensor], Tensor], flip_axes: Sequence[int]) -> None:
        super().__init__(flip_axes)
        self.matcher = matcher

    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Space.encode`."""
        vectors = self.matcher(images)  # (B, E)
        return vectors * vectors.shape[1] ** 0.5


class ScaledLatentSpace(FlipSpace):
    """Posterior means in the model's scaled latent space.

    Args:
        model: whose first stage encodes.
        flip_axes: see :class:`FlipSpace`.
    """

    name = "latents"
    words = "scaled latents of the model, flips considered"

    def __init__(self, model: LatentDiffusionModel, flip_axes: Sequence[int]) -> None:
        super().__init__(flip_axes)
        self.model = model

    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Space.encode`."""
        with autocast(self.model.device, "float32"):
            mean, _ = self.model.first_stage.encode(images.to(self.model.device))
            return self.model.latent_space.to_scaled(mean.float()).flatten(1)  # (B, F)


class CorrelationSpace(Space):
    """Normalised cross-correlation of coarse images, the highest over flips and small shifts. Nothing is trained.

    Images are averaged over blocks until their longest side is about :data:`COARSE_SIDE`. What a shift of up to
    :data:`SHIFT` could bring in from outside is cut off; the rest is brought to the same mean and length, channel by
    channel, so that brightness and contrast do not count. The distance of two vectors is ``sqrt(2 - 2 r)``.

    Args:
        flip_axes: see :class:`FlipSpace`.
    """

    name = "correlation"
    words = "correlation of coarse images, flips and shifts considered"

    def __init__(self, flip_axes: Sequence[int]) -> None:
        self.flips = combinations(flip_axes)

    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Space.encode`."""
        coarse = self._coarse(images)  # (B, C, *s)
        return standardised(cut(coarse, [0] * (coarse.ndim - 2), margins(coarse)))  # (B, F)

    def variants(self, image: Tensor) -> Tensor:
        """See :meth:`Space.variants`."""
        coarse = self._coarse(image[None])  # (1, C, *s)
        margin = margins(coarse)
        shifts = sorted(itertools.product(*(range(-m, m + 1) for m in margin)), key=any)  # none first
        turned = flipped(coarse[0], self.flips)  # each (C, *s)
        return standardised(torch.stack([cut(one, shift, margin) for one in turned for shift in shifts]))  # (V, F)

    def _coarse(self, images: Tensor) -> Tensor:
        return pooled(images.float(), max(1, round(max(images.shape[2:]) / COARSE_SIDE)))


def margins(images: Tensor) -> list[int]:
    """How far ``(B, C, *S)`` may be shifted along each axis: a share of its side, and never all of it."""
    return [min(math.ceil(SHIFT * side), (side - 1) // 2) for side in images.shape[2:]]


def cut(images: Tensor, shift: Sequence[int], margin: Sequence[int]) -> Tensor:
    """Images ``(..., *S)`` without a margin at either end of each axis, which is moved along it by ``shift``."""
    sides = images.shape[-len(margin) :]
    return images[(..., *(slice(m + s, n - m + s) for s, m, n in zip(shift, margin, sides, strict=True)))]


def standardised(images: Tensor) -> Tensor:
    """``(B, C, *S)`` -> ``(B, F)`` whose mean square is 1, every channel with mean 0 and the same part in it."""
    x = images.flatten(2)  # (B, C, P)
    x = x - x.mean(2, keepdim=True)
    x = x / x.square().mean(2, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    return x.flatten(1)  # (B, C P)


def audit_spaces(
    matcher: Callable[[Tensor], Tensor], model: LatentDiffusionModel | None, flip_axes: Sequence[int]
) -> list[Space]:
    """Every space that an audit can look in: that of latents only if the model has a first stage of its own.

    Args:
        matcher: see :class:`MatcherSpace`.
        model: that drew the images; None if it is not known.
        flip_axes: see :class:`FlipSpace`.
    """
    latents = [ScaledLatentSpace(model, flip_axes)] if has_autoencoder(model) else []
    return [MatcherSpace(matcher, flip_axes), CorrelationSpace(flip_axes), *latents]


def has_autoencoder(model: LatentDiffusionModel | None) -> bool:
    """Whether images go through an autoencoder, and not straight into the diffusion model."""
    return isinstance(getattr(model, "first_stage", None), AutoencoderKL)


def combinations(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every choice of some of the axes, none of them first."""
    return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


def flipped(image: Tensor, flips: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """An image ``(C, *S)``, flipped along each choice of spatial axes."""
    return [image.flip([1 + axis for axis in axes]) for axes in flips]


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
