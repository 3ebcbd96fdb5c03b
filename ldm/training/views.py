"""Pairs of views of one scan: what a matcher has to see through, and the batches that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.augmentation import Augmentation
from ldm.data.datamodule import CohortDataModule, CohortDataset
from ldm.data.ordered import OrderedDataModule
from ldm.errors import LdmError, nearest
from ldm.model.matcher import pooled

COARSE = 3  # cells a side of the field of which a bias field is interpolated


@dataclass(frozen=True)
class Views:
    """How far a view may be from the scan it shows; every strength is drawn anew, from nothing up to this.

    flip_axes:  spatial axes, each flipped in half of the views; None for all.
    shift:      along each axis, as a share of the longest side.
    scale, rotate, gamma, brightness: see :class:`ldm.data.augmentation.Augmentation`.
    bias:       natural logarithm of a smooth field that intensities above background are multiplied by.
    blend:      share of another scan that is mixed in, in half of the views.
    noise:      standard deviation, as a share of the intensity range.
    blur:       standard deviation of a Gaussian, in voxels.
    """

    flip_axes: tuple[int, ...] | None = None
    shift: float = 0.06
    scale: float = 0.08
    rotate: float = 8.0
    gamma: float = 0.5
    brightness: float = 0.2
    bias: float = 0.3
    blend: float = 0.25
    noise: float = 0.08
    blur: float = 1.5

    def __post_init__(self) -> None:
        if self.flip_axes is not None:
            object.__setattr__(self, "flip_axes", tuple(int(axis) for axis in self.flip_axes))
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
                raise LdmError(f"matcher.views.{item.name}: {value!r} is not a number of 0 or more.")
        for name in ("shift", "blend", "brightness"):
            if getattr(self, name) >= 1:
                raise LdmError(f"matcher.views.{name}: {getattr(self, name)} must be below 1.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Views:
        """Build from the ``matcher.views`` block; an unknown key is an LdmError that names the nearest."""
        legal = [item.name for item in fields(cls)]
        for key in config:
            if key not in legal:
                raise LdmError(f"matcher.views.{key} is not a setting.{nearest(key, legal)} Legal: {', '.join(legal)}.")
        return cls(**config)

    def __call__(
        self,
        image: Tensor,
        other: Tensor,
        generator: torch.Generator,
        voxel_size: tuple[float, ...] | None = None,
        value_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> Tensor:
        """One view ``(C, *S)`` of ``image`` ``(C, *S)``, perhaps with a little of ``other`` in it.

        Args:
            generator: source of all randomness.
            voxel_size: in mm, so that rotations stay rigid.
            value_range: (background, maximum) of the images; None for z-scored images, which gamma leaves alone.
        """
        draw = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        if draw[0] < 0.5:
            share = self.blend * draw[1]
            image = (1 - share) * image + share * other
        image, _, _ = self._augmentation(image, value_range)(image, None, generator, voxel_size, value_range)
        low, high = value_range or (float(image.min()), float(image.max()))
        image = (image - low) * self._bias_field(image, generator) + low
        sigma = self.blur * draw[2]
        image = torch.from_numpy(gaussian_filter(image.numpy(), (0, *[sigma] * (image.ndim - 1))))  # (C, *S)
        image = image + self.noise * draw[3] * (high - low) * torch.randn(image.shape, generator=generator)
        return image if value_range is None else image.clamp(*value_range)

    def _augmentation(self, image: Tensor, value_range: tuple[float, float] | None) -> Augmentation:
        axes = tuple(range(image.ndim - 1)) if self.flip_axes is None else self.flip_axes
        longest = max(image.shape[1:])
        gamma = 0.0 if value_range is None else self.gamma
        return Augmentation(axes, self.scale, self.shift * longest, self.rotate, gamma, self.brightness)

    def _bias_field(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """``(1, *S)``, positive and smooth."""
        axes = image.ndim - 1
        coarse = self.bias * (2 * torch.rand((1, 1, *[COARSE] * axes), generator=generator) - 1)
        mode = "bilinear" if axes == 2 else "trilinear"
        return F.interpolate(coarse, size=image.shape[1:], mode=mode, align_corners=True)[0].exp()


class ViewDataset(Dataset):
    """Two views of every scan of a split.

    An item has ``views`` ``(2, C, *S)``, ``index``, the record's position in the cohort, and ``subject``, the number of
    its subject. The views depend on (seed, epoch, index) alone; with ``fixed`` on (seed, index). They are of scans that
    were averaged over blocks of ``pool`` voxels a side.
    """

    def __init__(self, dataset: CohortDataset, views: Views, seed: int = 0, fixed: bool = False, pool: int = 1) -> None:
        self.dataset, self.views, self.seed, self.fixed, self.pool = dataset, views, seed, fixed, pool
        names = sorted({record.subject for record in dataset.cohort.records})
        self.subjects = {name: number for number, name in enumerate(names)}
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers that outlive an epoch see the next

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of this epoch; `EpochSampler.set_epoch` calls it."""
        self._epoch[0] = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = self.dataset[position]
        entropy = np.random.SeedSequence((self.seed, int(self._epoch[0]), item["index"])).generate_state(2, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> np.uint64(1)))
        other = self.dataset[int(entropy[1] % len(self.dataset))]["image"]  # may be the scan itself: no blend then
        recipe = self.dataset.preprocessing
        voxel_size = recipe.voxel_size and tuple(size * self.pool for size in recipe.voxel_size)
        image, other = (pooled(one[None], self.pool)[0] for one in (item["image"], other))  # (C, *S)
        views = [self.views(image, other, generator, voxel_size, recipe.value_range).float() for _ in range(2)]
        subject = self.subjects[self.dataset.cohort.records[item["index"]].subject]
        return {"views": torch.stack(views), "index": item["index"], "subject": subject}


class ViewDataModule(OrderedDataModule):
    """Views of the training and validation split; other views every epoch in training, always the same in validation.

    Args:
        datamodule: the cohort, prepared.
        views: how far views may be from their scan.
        batch_size: scans of each process and step; each is there twice.
        seed: of order and views.
        pool: see :class:`ViewDataset`.
    """

    def __init__(
        self, datamodule: CohortDataModule, views: Views, batch_size: int, seed: int = 0, pool: int = 1
    ) -> None:
        super().__init__(batch_size, seed, datamodule.num_workers)
        self.cohort = datamodule.cohort
        self.train = ViewDataset(datamodule.dataset("train"), views, seed, pool=pool)
        self.valid = ViewDataset(datamodule.dataset("valid"), views, seed, fixed=True, pool=pool)

    def training_set(self) -> ViewDataset:
        """See :class:`OrderedDataModule`."""
        return self.train

    def validation_set(self) -> ViewDataset:
        """See :class:`OrderedDataModule`."""
        return self.valid
