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
from ldm.diffusion.noise import step_generator
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
    """What members see of an image: the first one sees it as it is, each other one after a random change.

    A member's change is the same for all images, and its map is moved back. What a network says of an image that it
    could as well have seen tells what it is not sure of, beyond what its own noise tells (Wang et al. 2019,
    Neurocomputing 338). Of flips alone there are few, so that several members see the same.

    Attributes:
        augmentation: the changes, such as those of training.
        preprocessing: of the images.
        seed: of the changes.

    Raises:
        LdmError: it changes nothing, ``gamma`` of images without a range, or a flip along an axis that is not there.
    """

    augmentation: Augmentation
    preprocessing: Preprocessing
    seed: int = 0

    def __post_init__(self) -> None:
        dims, axes = self.preprocessing.spatial_dims, self.augmentation.flip_axes
        if self.augmentation == Augmentation():
            raise LdmError("augment changes nothing: members would see the same. Name changes, or leave it out.")
        if self.augmentation.gamma and self.preprocessing.value_range is None:
            raise LdmError("augment.gamma: z-scored images have no range to take a power in; set it to 0.")
        if any(not 0 <= axis < dims for axis in axes):
            raise LdmError(f"augment.flip_axes: {list(axes)} must lie in 0..{dims - 1}.")

    def change(self, shape: Sequence[int], member: int) -> Change | None:
        """The change of a member's images ``(*S)``; None of the first."""
        if member == 0:
            return None
        return self.augmentation.draw(shape, step_generator(self.seed, 0, member), self.preprocessing.voxel_size)

    def seen(self, image: np.ndarray, member: int) -> np.ndarray:
        """What a member sees of an image ``(C, *S)``."""
        change = self.change(image.shape[1:], member)
        if change is None:
            return image
        value_range, array = self.preprocessing.value_range, torch.from_numpy(image)
        background = float(image.min()) if value_range is None else value_range[0]
        return change.recoloured(change.moved(array, "bilinear", background), background, value_range).numpy()

    def back(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities ``(M, K + 1, *S)`` of all members where the image was; what one did not see is the first's."""
        first = probabilities[0]
        return np.stack([first, *(self._back(one, m, first) for m, one in enumerate(probabilities[1:], 1))])

    def _back(self, one: np.ndarray, member: int, first: np.ndarray) -> np.ndarray:
        change = self.change(one.shape[1:], member)
        moved = change.moved_back(torch.from_numpy(one)).numpy()  # (K + 1, *S)
        seen = moved.sum(0)  # (*S), as classes sum to one
        return (moved + (1 - seen) * first).clip(0, 1)


def class_probabilities(masks: np.ndarray) -> np.ndarray:
    """Masks ``(M, K, *S)`` in [-1, 1] -> probabilities ``(M, K + 1, *S)``, background first.

    A mask's value is the share of "inside"; what no class takes is background.
    """
    inside = np.clip((masks + 1) / 2, 0, 1)  # (M, K, *S)
    background = np.clip(1 - inside.sum(1, keepdims=True), 0, 1)  # (M, 1, *S)
    shares = np.concatenate([background, inside], axis=1)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def draw_ensembles(
    models: Sequence[LatentDiffusionModel],
    images: Sequence[np.ndarray],
    names: Sequence[str],
    members: int,
    seed: int = 0,
    batch_size: int = 16,
    precision: str = "auto",
    views: Views | None = None,
    **options: Any,
) -> list[Ensemble]:
    """Draw ``members`` label maps of each image, the models in turn.

    The noise of a member follows from (seed, name of the image, its number), whatever else is drawn beside.

    Args:
        models: one or several that generate label maps of the same classes from the same images.
        images: ``(C, *S)`` each, what a model is given, in its range and on its grid.
        names: one an image.
        members: label maps an image.
        seed, batch_size, precision: see :meth:`LatentDiffusionModel.sample_batches`.
        views: what members see; None is the image.
        options: sampling options that differ from the models' defaults.

    Raises:
        LdmError: a model generates images, or ``members`` is below the number of models.
    """
    if any(model.classes is None for model in models):
        raise LdmError("This model generates images, not label maps; train one with ldm=segmentation.")
    if members < len(models):
        one = "1 or more, 5 in the paper" if len(models) == 1 else f"{len(models)} or more, one of each model"
        raise LdmError(f"members is {members}; legal: {one}.")
    if not images:
        return []
    drawn = np.empty((len(images), members, len(models[0].classes.names) + 1, *images[0].shape[1:]), np.float32)
    for first, model in enumerate(models):
        own = range(first, members, len(models))
        given = [image if views is None else views.seen(image, member) for image in images for member in own]
        numbers = [(zlib.crc32(name.encode()) + member) % NUMBERS for name in names for member in own]
        rows = [{} for _ in given]
        batches = model.sample_batches(rows, numbers, seed, batch_size, precision, {"image": given}, **options)
        masks = np.concatenate([batch.images for batch in batches])  # (N * own, K, *S)
        drawn[:, own] = class_probabilities(masks).reshape(len(images), len(own), *drawn.shape[2:])
    return [Ensemble(one if views is None else views.back(one)) for one in drawn]  # (M, K + 1, *S) each
