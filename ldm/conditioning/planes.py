"""Label maps and images as conditions: planes on the latent grid.

They are concatenated to the noisy latent, modulate the decoder (SPADE), or steer a frozen model through a control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.conditioning.base import Conditioning, InputConditioner
from ldm.data.labels import LabelClasses
from ldm.errors import LdmError, nearest

#: mode -> what its planes are counted as
MODES = {"concat": "plane_channels", "spade": "spade_channels", "control": "control_channels"}


class PlaneConditioner(InputConditioner):
    """Planes ``(B, P, *S)`` on the latent grid; where one is NaN, its learned null stands in.

    A control needs none: where it is not given, the frozen model is on its own.

    Args:
        channels: names of the planes.
        factor: of the first stage: sides of an image over those of the latent.
        mode: ``concat``, ``spade`` or ``control``.
        drop_rate: probability that a sample's planes are hidden.
        where: its place in the configuration, for messages.

    Raises:
        LdmError: an unknown mode.
    """

    #: what a cached latent calls the planes
    cached_as = ""

    def __init__(
        self,
        channels: Sequence[str],
        factor: int,
        mode: str = "concat",
        drop_rate: float = 0.1,
        where: str = "ldm.conditioners",
    ) -> None:
        super().__init__(drop_rate, where)
        if mode not in MODES:
            raise LdmError(f"{where}.mode '{mode}' is unknown; legal: {', '.join(MODES)}.{nearest(mode, MODES)}")
        self.channels, self.factor, self.mode, self.where = tuple(channels), factor, mode, where
        setattr(self, MODES[mode], len(self.channels))
        self.learns_null = mode != "control"
        if self.learns_null:
            self.null = nn.Parameter(torch.zeros(len(self.channels)))

    def not_given(self, count: int, size: Sequence[int]) -> Tensor:
        """``(count, P, *size)`` of NaN."""
        return torch.full((count, len(self.channels), *size), torch.nan)

    def forward(self, value: Tensor) -> Conditioning:
        """Condition on ``(B, P, *S)``."""
        if value.ndim < 3 or value.shape[1] != len(self.channels):
            raise LdmError(
                f"{self.where}: expected (B, {len(self.channels)}, *S), a plane for each of "
                f"{', '.join(self.channels)}; got {tuple(value.shape)}."
            )
        if self.mode == "control":
            return Conditioning(control=value)
        null = self.null.view(1, -1, *(1,) * (value.ndim - 2))  # (1, P, 1, ...)
        planes = torch.where(value.isnan(), null.to(value.dtype), value)  # (B, P, *S)
        return Conditioning(spade=planes) if self.mode == "spade" else Conditioning(planes=planes)

    def _check_size(self, size: Sequence[int], array: np.ndarray, what: str) -> None:
        sides, grid = array.shape[-len(size) :], tuple(self.factor * side for side in size)
        if sides != grid:
            raise LdmError(
                f"{self.where}: {what} of shape {array.shape} is not on the model's grid; legal: {grid}. A file is "
                "brought there by itself."
            )


class MaskConditioner(PlaneConditioner):
    """A label map, as the share of each class in every cell of the latent grid.

    Args:
        labels: ``data.label_names``.
        unnamed: values that the cohort has beside these; with 0 they are background, the first plane.
        factor, mode, drop_rate, where: see :class:`PlaneConditioner`.
    """

    cached_as = "labels"

    def __init__(
        self,
        labels: Mapping[str, Any],
        unnamed: Sequence[int],
        factor: int,
        mode: str = "concat",
        drop_rate: float = 0.1,
        where: str = "ldm.conditioners",
    ) -> None:
        classes = LabelClasses.from_config(labels)
        super().__init__(("background", *classes.names), factor, mode, drop_rate, where)
        self.classes, self.unnamed = classes, tuple(unnamed)

    def encode(self, value: Any, row: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """``(L, *size)`` of a label map ``(*S)`` with the stored values, on the model's grid; NaN for None.

        Raises:
            LdmError: a value that the cohort does not have, or another shape.
        """
        if value is None:
            return self.not_given(1, size)[0]
        array = np.asarray(value)
        if array.ndim != len(size):
            raise LdmError(f"{self.where}: a label map has {len(size)} axes, got shape {array.shape}.")
        self._check_size(size, array, "a label map")
        legal = dict.fromkeys((0, *self.unnamed), "background") | {
            v: name for name, values in self.classes.values.items() for v in values
        }
        strange = [f"{one:g}" for one in np.unique(array) if one not in legal]
        if strange:
            shown = ", ".join(f"{v} {name}" for v, name in legal.items())
            raise LdmError(f"{self.where}: label value(s) {', '.join(strange[:6])} are unknown; legal: {shown}.")
        classes = self.classes.classes(torch.from_numpy(array.astype(np.uint8)))  # (*S)
        return label_fractions(classes, len(self.classes), tuple(size))


class ImageConditioner(PlaneConditioner):
    """Other channels of the same subject, in the model's intensity range; every voxel of a latent cell is a plane.

    Args:
        channels: their names in ``data.image``.
        spatial_dims: 2 or 3.
        factor, mode, drop_rate, where: see :class:`PlaneConditioner`.
    """

    cached_as = "images"

    def __init__(
        self,
        channels: Sequence[str],
        spatial_dims: int,
        factor: int,
        mode: str = "concat",
        drop_rate: float = 0.1,
        where: str = "ldm.conditioners",
    ) -> None:
        names = [f"{name}/{cell}" for name in channels for cell in range(factor**spatial_dims)]
        super().__init__(names, factor, mode, drop_rate, where)
        self.images = tuple(channels)

    def encode(self, value: Any, row: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """``(C' * cells, *size)`` of an image ``(C', *S)`` in the model's range and on its grid; NaN for None.

        Raises:
            LdmError: another number of channels, or another shape.
        """
        if value is None:
            return self.not_given(1, size)[0]
        array = np.asarray(value, dtype=np.float32)
        if array.ndim != len(size) + 1 or len(array) != len(self.images):
            raise LdmError(
                f"{self.where}: expected an image with {len(self.images)} channel(s) ({', '.join(self.images)}) "
                f"and {len(size)} axes, got shape {array.shape}."
            )
        self._check_size(size, array, "an image")
        return space_to_depth(torch.from_numpy(array), tuple(size))


def label_fractions(classes: Tensor, num_classes: int, size: tuple[int, ...]) -> Tensor:
    """Share of each class in every cell of the latent grid.

    Args:
        classes: ``(*S)`` class indices below ``num_classes``.
        num_classes: L, background included.
        size: latent grid.

    Returns:
        ``(L, *size)`` in [0, 1], summing to one over classes.
    """
    one_hot = torch.movedim(F.one_hot(classes.long(), num_classes), -1, 0).float()  # (L, *S)
    pool = F.adaptive_avg_pool3d if classes.ndim == 3 else F.adaptive_avg_pool2d
    return pool(one_hot, size)


def space_to_depth(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """Every voxel of a latent cell as a plane: ``(C, *S)`` -> ``(C * f^d, *size)`` with ``S = f size``."""
    split = [len(image), *(n for a, b in zip(image.shape[1:], size, strict=True) for n in (b, a // b))]
    axes = range(1, len(split))
    cells = image.reshape(split).permute(0, *axes[1::2], *axes[0::2])  # (C, f, ..., *size)
    return cells.reshape(-1, *size)
