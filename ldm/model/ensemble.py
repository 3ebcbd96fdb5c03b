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
import torch

from ldm.data.augmentation import Augmentation, Change
from ldm.data.preprocessing import Preprocessing
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


@dataclass(frozen=True)
class Views:
    """What members see of an image: the first one sees it as it is, each other one with a random change.

    A member's change is the same for all images; its map is moved back. What a network makes of an image that it could
    as well have seen tells what it is not sure of, beyond what its own noise tells (Wang et al. 2019,
    Neurocomputing 338).

    Attributes:
        augmentation: the changes, as of training.
        preprocessing: of the images.
        seed: of the changes.

    Raises:
        LdmError: it changes nothing, or ``gamma`` of images without a range.
    """

    augmentation: Augmentation
    preprocessing: Preprocessing
    seed: int = 0

    def __post_init__(self) -> None:
        if self.augmentation == Augmentation():
            raise LdmError("augment changes nothing: members would see the same. Name changes, or leave it out.")
        if self.augmentation.gamma and self.preprocessing.value_range is None:
            raise LdmError("augment.gamma: z-scored images have no range to take a power in; set it to 0.")

    def change(self, shape: Sequence[int], member: int) -> Change | None:
        """The change of a member's images ``(*S)``; None of the first."""
        if member == 0:
            return None
        generator = torch.Generator().manual_seed(self.seed * NUMBERS + member)
        return self.augmentation.draw(shape, generator, self.preprocessing.voxel_size)

    def seen(self, image: np.ndarray, member: int) -> np.ndarray:
        """What a member sees of an image ``(C, *S)``."""
        change = self.change(image.shape[1:], member)
        if change is None:
            return image
        value_range, array = self.preprocessing.value_range, torch.from_numpy(image)
        background = float(image.min()) if value_range is None else value_range[0]
        return change.recoloured(change.moved(array, "bilinear", background), background, value_range).numpy()

    def back(self, probabilities: np.ndarray, member: int) -> np.ndarray:
        """A member's probabilities ``(K + 1, *S)`` where the image was; outside its view all is background."""
        change = self.change(probabilities.shape[1:], member)
        if change is None:
            return probabilities
        inside = change.moved_back(torch.from_numpy(probabilities[1:])).numpy()  # (K, *S)
        return np.concatenate([1 - inside.sum(0, keepdims=True), inside]).clip(0, 1)


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
    views: Views | None = None,
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
        views: what members see; None is the image.
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
    numbered = range(members)
    given = [image if views is None else views.seen(image, member) for image in images for member in numbered]
    numbers = [(zlib.crc32(name.encode()) + member) % NUMBERS for name in names for member in numbered]
    rows = [{} for _ in given]
    drawn = model.sample_batches(rows, numbers, seed, batch_size, precision, {"image": given}, **options)
    masks = np.concatenate([batch.images for batch in drawn])  # (N * M, K, *S)
    ensembles = np.split(class_probabilities(masks), len(images))  # (M, K + 1, *S) each
    if views is not None:
        ensembles = [np.stack([views.back(one[member], member) for member in numbered]) for one in ensembles]
    return [Ensemble(probabilities) for probabilities in ensembles]
