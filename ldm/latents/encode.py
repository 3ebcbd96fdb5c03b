"""Encode a cohort into posteriors, with augmented variants whose covariates follow the augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.conditioning.planes import label_fractions, space_to_depth
from ldm.data.augmentation import Augmentation
from ldm.data.labels import LabelClasses
from ldm.data.schema import CovariateSchema
from ldm.diffusion.noise import step_generator
from ldm.latents.cache import CacheItem
from ldm.precision import autocast


@dataclass(frozen=True)
class CohortEncoder:
    """Runs the frozen first stage over one split, ``variants`` times.

    Variant 0 is every image as it is; the others are augmented, each with random numbers named by (seed,
    variant, position), so a resumed run encodes the same.

    Attributes:
        first_stage: frozen network.
        dataset: items with ``image`` ``(C, *S)``, ``covariates`` ``(K,)``, ``index`` and perhaps ``labels`` ``(*S)``.
        schema: corrects the covariates of scaled anatomy.
        augmentation: of the variants after the first.
        variants: encoded versions of each image.
        label_classes: the classes of label maps that travel along as planes, or None.
        diffused: channels of the image that are encoded; None for all.
        conditions: channels of the image that travel along as planes instead.
        targets: classes whose masks are encoded in place of image channels, or None.
        spacing: voxel size in mm, for rotations.
        value_range: intensity range of the images.
    """

    first_stage: nn.Module
    dataset: Dataset
    schema: CovariateSchema
    augmentation: Augmentation
    variants: int = 1
    label_classes: LabelClasses | None = None
    diffused: tuple[int, ...] | None = None
    conditions: tuple[int, ...] = ()
    targets: LabelClasses | None = None
    spacing: tuple[float, ...] | None = None
    value_range: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 4
    device: str = "cpu"

    def __len__(self) -> int:
        return self.variants * len(self.dataset)

    def items(self, start: int = 0) -> Iterator[CacheItem]:
        """Posteriors of items ``start``, ``start + 1``, ..., variant by variant."""
        for first in range(start, len(self), self.batch_size):
            numbers = range(first, min(first + self.batch_size, len(self)))
            yield from self._encode([self._item(number) for number in numbers])

    def _item(self, number: int) -> dict[str, Any]:
        variant, position = divmod(number, len(self.dataset))
        item = {**self.dataset[position], "variant": variant}
        if variant:
            image, labels, scale = self.augmentation(
                item["image"],
                item.get("labels"),
                step_generator(self.seed, variant, position),
                self.spacing,
                self.value_range,
            )
            covariates = torch.from_numpy(self.schema.rescale(item["covariates"].numpy(), scale))
            item |= {"image": image, "covariates": covariates}
            if labels is not None:
                item["labels"] = labels
        return item

    @torch.no_grad()
    def _encode(self, items: list[Mapping[str, Any]]) -> Iterator[CacheItem]:
        encoded = torch.stack([self._encoded(item) for item in items]).to(self.device)  # (B, C, *S)
        with autocast(torch.device(self.device)):
            means, stds = self.first_stage.encode(encoded)  # (B, c, *s) each
        for item, mean, std in zip(items, means.float().cpu(), stds.float().cpu(), strict=True):
            planes = self._planes(item, tuple(mean.shape[1:]))
            yield CacheItem(mean, std, item["covariates"].numpy(), int(item["index"]), item["variant"], planes)

    def _encoded(self, item: Mapping[str, Any]) -> Tensor:
        """What of an item is encoded: masks of classes, or channels of the image; ``(C, *S)``."""
        if self.targets is not None:
            return self.targets.masks(item["labels"])
        return item["image"] if self.diffused is None else item["image"][list(self.diffused)]

    def _planes(self, item: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        planes = {}
        if self.label_classes is not None:
            classes = self.label_classes.classes(item["labels"])  # (*S)
            planes["labels"] = label_fractions(classes, len(self.label_classes), size)
        if self.conditions:
            planes["images"] = space_to_depth(item["image"][list(self.conditions)], size)
        return planes

    @property
    def plane_channels(self) -> dict[str, int]:
        """Channels of every kind of planes that travel along."""
        channels = {} if self.label_classes is None else {"labels": len(self.label_classes)}
        if self.conditions:
            cells = self.first_stage.downsampling_factor**self.first_stage.spatial_dims
            channels["images"] = len(self.conditions) * cells
        return channels
