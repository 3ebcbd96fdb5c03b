"""Several label maps of one image, and what their disagreement tells (Wolleb et al. 2022).

A diffusion model draws another label map from every noise. Their mean is the segmentation, their spread the
uncertainty. Members of any other kind (networks trained from several seeds, dropout at test time) go the same way.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel

#: sample numbers are below this
NUMBERS = 2**32


@dataclass(frozen=True)
class Ensemble:
    """Members of one image, as probabilities of classes.

    Attributes:
        probabilities: ``(M, K + 1, *S)`` float32 of M members, background first, summing to one over classes.
    """

    probabilities: np.ndarray

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean over members, ``(K + 1, *S)``."""
        return self.probabilities.mean(0, dtype=np.float64).astype(np.float32)

    @property
    def labels(self) -> np.ndarray:
        """Class index of the largest mean, ``(*S)`` uint8; with one class that is a mean above one half."""
        return self.mean.argmax(0).astype(np.uint8)

    @cached_property
    def member_labels(self) -> np.ndarray:
        """Class indices of each member on its own, ``(M, *S)`` uint8."""
        return self.probabilities.argmax(1).astype(np.uint8)

    @cached_property
    def variance(self) -> np.ndarray:
        """Half the variance over members, summed over classes, ``(*S)``; with one class that is its variance."""
        return self.probabilities.var(0, dtype=np.float64).sum(0).astype(np.float32) / 2

    @cached_property
    def entropy(self) -> np.ndarray:
        """Entropy of the mean in nats, ``(*S)``: 0 to log(K + 1)."""
        p = np.clip(self.mean, 1e-12, 1.0)
        return np.maximum(-(p * np.log(p)).sum(0), 0.0)


def class_probabilities(masks: np.ndarray) -> np.ndarray:
    """Masks ``(M, K, *S)`` in [-1, 1] -> probabilities ``(M, K + 1, *S)``, background first.

    A mask's value is the share of "inside"; what no class takes is background.
    """
    inside = np.clip((masks + 1) / 2, 0, 1)  # (M, K, *S)
    background = np.clip(1 - inside.sum(1, keepdims=True), 0, 1)  # (M, 1, *S)
    shares = np.concatenate([background, inside], axis=1)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def draw_ensembles(
    model: LatentDiffusionModel,
    images: Sequence[np.ndarray],
    names: Sequence[str],
    members: int,
    seed: int = 0,
    batch_size: int = 16,
    precision: str = "auto",
    **options: Any,
) -> list[Ensemble]:
    """Draw ``members`` label maps of each image.

    The noise of a member follows from (seed, name of the image, its number), whatever else is drawn beside.

    Args:
        model: one that generates label maps.
        images: ``(C, *S)`` each, what the model is given, in its range and on its grid.
        names: one an image.
        members: label maps an image.
        seed, batch_size, precision: see :meth:`LatentDiffusionModel.sample_batches`.
        options: sampling options that differ from the model's defaults.

    Raises:
        LdmError: the model generates images, or ``members`` is below 1.
    """
    if model.classes is None:
        raise LdmError("This model generates images, not label maps; train one with ldm=segmentation.")
    if members < 1:
        raise LdmError(f"members is {members}; legal: 1 or more, 5 in the paper.")
    if not images:
        return []
    given = [image for image in images for _ in range(members)]
    numbers = [(zlib.crc32(name.encode()) + member) % NUMBERS for name in names for member in range(members)]
    rows = [{} for _ in given]
    drawn = model.sample_batches(rows, numbers, seed, batch_size, precision, {"image": given}, **options)
    masks = np.concatenate([batch.images for batch in drawn])  # (N * M, K, *S)
    return [Ensemble(class_probabilities(part)) for part in np.split(masks, len(images))]
