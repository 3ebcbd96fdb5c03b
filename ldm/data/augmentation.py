"""Random but reproducible changes to a training image, with the anatomical scale they caused.

Enlarging a brain enlarges its ventricles: whoever trains a model on volumes in mm3 has to know.
`Augmentation` therefore returns the linear scale s, by which `CovariateSchema.rescale` corrects covariates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from ldm.errors import LdmError, nearest

#: settings of `Augmentation` that are numbers
NUMBERS = ("scale", "shift", "rotate", "gamma", "brightness", "missing_share")


@dataclass(frozen=True)
class Augmentation:
    """Settings of the random changes; the default changes nothing.

    flip_axes:  spatial axes (0 is left-right in RAS) that are flipped in half of the images. Labels and
                covariates that name a side do not follow a left-right flip; leave axis 0 out for these.
    scale:      anatomy is scaled by s, log-uniform in [1 / (1 + scale), 1 + scale], alike along all axes.
    shift:      largest shift along each axis, in voxels.
    rotate:     largest rotation about each axis, in degrees.
    gamma:      intensities, in the unit range, are raised to a power from [1 / (1 + gamma), 1 + gamma].
    brightness: intensities above background are multiplied by 1 - brightness to 1 + brightness.
    missing:    (channel, other) pairs of image channels, by number: the first is replaced by the second in a share of
                the images, each pair on its own, as cohorts fill a sequence that was not taken. For models that are
                given the image; one that generates images would learn to make such.
    missing_share: that share, 0 to 1.
    """

    flip_axes: tuple[int, ...] = ()
    scale: float = 0.0
    shift: float = 0.0
    rotate: float = 0.0
    gamma: float = 0.0
    brightness: float = 0.0
    missing: tuple[tuple[int, int], ...] = ()
    missing_share: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "flip_axes", tuple(int(axis) for axis in self.flip_axes))
        for name in NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise LdmError(f"data.augment.{name}: {value!r} is not a number of 0 or more.")
        if self.brightness >= 1:
            raise LdmError(f"data.augment.brightness: {self.brightness} must be below 1.")
        if self.missing_share > 1:
            raise LdmError(f"data.augment.missing_share: {self.missing_share} is not a share of 0 to 1.")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None, channels: Sequence[str] | None = None, where: str = "data.augment"
    ) -> Augmentation:
        """Build from the ``data.augment`` block, for images of these ``channels``; None: any, and none is replaced.

        Raises LdmError for an unknown key or channel, with the nearest, and for half of what ``missing`` needs.
        """
        legal = [item.name for item in fields(cls)]
        for key in config or {}:
            if key not in legal:
                raise LdmError(f"{where}: unknown key '{key}'.{nearest(key, legal)} Legal: {', '.join(legal)}.")
        given = {key: value for key, value in (config or {}).items() if value is not None}
        missing = given.pop("missing", {})
        if not isinstance(missing, Mapping):
            raise LdmError(f"{where}.missing: {missing!r} is not a mapping of images such as {{T1: FLAIR}}.")
        if bool(missing) != bool(given.get("missing_share", 0)):
            raise LdmError(f"{where}: missing and missing_share go together, e.g. {{T1: FLAIR}} and 0.1.")
        if channels is None:
            return cls(**given)
        for name in itertools.chain(*missing.items()):
            if name not in channels:
                legal = ", ".join(channels)
                raise LdmError(f"{where}.missing: there is no image '{name}'.{nearest(name, channels)} Legal: {legal}.")
        pairs = tuple((channels.index(one), channels.index(other)) for one, other in missing.items())
        return cls(**given, missing=pairs)

    @property
    def moves(self) -> bool:
        """Whether anything but flips and intensities is changed, so that voxels are interpolated."""
        return bool(self.scale or self.shift or self.rotate)

    def __call__(
        self,
        image: torch.Tensor,
        labels: torch.Tensor | None,
        generator: torch.Generator | int,
        spacing: Sequence[float] | None = None,
        value_range: tuple[float, float] | None = (0.0, 1.0),
    ) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """Change one image.

        image:       float (C, *S), 2-D or 3-D.
        labels:      uint8 (*S) or None; moved along with the image, to the nearest voxel.
        generator:   source of all randomness, or a seed; the same one gives the same result.
        spacing:     voxel size along each axis, so that a rotation stays rigid on anisotropic grids.
        value_range: (background, maximum) of the image; None for z-scored images.

        Returns the image, the labels, and the linear scale s of the anatomy (1.1 is 10 % longer).
        Raises LdmError for a flip axis that does not exist, and for gamma without a range.
        """
        background = float(image.min()) if value_range is None else value_range[0]
        change = self.draw(image.shape[1:], generator, spacing)
        moved = None if labels is None else change.moved(labels[None].float(), "nearest")[0].to(labels.dtype)
        return change.recoloured(change.moved(image, "bilinear", background), background, value_range), moved, change.s

    def draw(
        self, shape: Sequence[int], generator: torch.Generator | int, spacing: Sequence[float] | None = None
    ) -> Change:
        """What one image of a spatial shape goes through.

        generator, spacing: see :meth:`__call__`.

        Raises LdmError for a flip axis that does not exist.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        ndim, theta, s = len(shape), None, 1.0
        if any(not 0 <= axis < ndim for axis in self.flip_axes):
            raise LdmError(f"data.augment.flip_axes: {list(self.flip_axes)} must lie in 0..{ndim - 1}.")
        if self.moves:
            # One draw each, always in this order: a setting of 0 does not shift the others' random numbers.
            s = (1 + self.scale) ** _uniform(1, generator).item()
            shift = self.shift * _uniform(ndim, generator)
            angles = math.radians(self.rotate) * _uniform(3 if ndim == 3 else 1, generator)
            theta = _theta(shape, s, shift, angles, spacing)
        axes = tuple(axis for axis in self.flip_axes if _uniform(1, generator).item() < 0)
        power = (1 + self.gamma) ** _uniform(1, generator).item() if self.gamma else None
        factor = 1 + self.brightness * _uniform(1, generator).item() if self.brightness else None
        shares = [(_uniform(1, generator).item() + 1) / 2 for _ in self.missing]
        copies = tuple(pair for pair, u in zip(self.missing, shares, strict=True) if u < self.missing_share)
        return Change(s, theta, axes, power, factor, copies)


@dataclass(frozen=True)
class Change:
    """What `Augmentation` has drawn for one image.

    s:      the anatomy is longer by this factor.
    theta:  (ndim, ndim + 1), see `_theta`; None leaves every voxel where it is.
    axes:   spatial axes that are flipped, after that.
    power:  of intensities in the unit range; None leaves them.
    factor: of intensities above background; None leaves them.
    copies: (channel, other) pairs of image channels: the first becomes what the second is.
    """

    s: float
    theta: torch.Tensor | None
    axes: tuple[int, ...]
    power: float | None
    factor: float | None
    copies: tuple[tuple[int, int], ...] = ()

    def moved(self, array: torch.Tensor, mode: str, background: float = 0.0) -> torch.Tensor:
        """(C, *S) with its voxels where the change puts them; ``background`` is what comes from outside."""
        if self.theta is not None:
            array = _moved(array - background, self.theta, mode) + background
        return array.flip([axis + 1 for axis in self.axes]) if self.axes else array

    def moved_back(self, array: torch.Tensor) -> torch.Tensor:
        """(C, *S) of a changed image with its voxels where they were, interpolated; 0 where the image did not reach."""
        array = array.flip([axis + 1 for axis in self.axes]) if self.axes else array
        if self.theta is None:
            return array
        linear = torch.linalg.inv(self.theta[:, :-1])  # x = L y + t, so that y = L^-1 x - L^-1 t
        inverse = torch.cat([linear, -(linear @ self.theta[:, -1:])], dim=1)
        return _moved(array, inverse, "bilinear")

    def recoloured(
        self, image: torch.Tensor, background: float, value_range: tuple[float, float] | None
    ) -> torch.Tensor:
        """An image (C, *S) with its intensities changed, and channels replaced.

        Raises LdmError for gamma without a range.
        """
        if self.copies:
            sources = dict(self.copies)
            image = image[[sources.get(channel, channel) for channel in range(len(image))]]
        if self.power is not None:
            if value_range is None:
                raise LdmError("data.augment.gamma: z-scored images have no range to take a power in; set it to 0.")
            span = value_range[1] - background
            image = ((image - background) / span).clamp(0, 1) ** self.power * span + background
        if self.factor is not None:
            image = (image - background) * self.factor + background
            image = image if value_range is None else image.clamp(*value_range)
        return image


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` float64 numbers, uniform in [-1, 1)."""
    return torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1


def _theta(
    shape: Sequence[int],
    s: float,
    shift: torch.Tensor,
    angles: torch.Tensor,
    spacing: Sequence[float] | None,
) -> torch.Tensor:
    """(ndim, ndim + 1) matrix for `affine_grid`: where, in [-1, 1] coordinates, each output voxel comes from.

    An output voxel p comes from c + D^-1 R^T D (p - c - shift) / s: D scales voxels to mm, R rotates, c is
    the centre of the grid.
    """
    ndim = len(shape)
    to_mm = torch.diag(torch.tensor(spacing if spacing is not None else (1.0,) * ndim, dtype=torch.float64))
    linear = torch.linalg.inv(to_mm) @ _rotation(angles).T @ to_mm / s
    # affine_grid's unit is half the distance between the outer voxel centres (1 for an axis of one voxel).
    half = torch.tensor([max(size - 1, 1) / 2 for size in shape], dtype=torch.float64)
    linear, offset = linear * half / half[:, None], -(linear @ shift) / half
    # grid_sample counts axes from the last one.
    return torch.cat([linear.flip(0, 1), offset.flip(0)[:, None]], dim=1)


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rotation in the plane for one angle, about axes 0, 1 and 2 in turn for three (radians)."""
    if len(angles) == 1:
        return _plane_rotation(angles[0], 0, 1, 2)
    planes = ((1, 2), (0, 2), (0, 1))
    first, second, third = (_plane_rotation(a, i, j, 3) for a, (i, j) in zip(angles, planes, strict=True))
    return third @ second @ first


def _plane_rotation(angle: torch.Tensor, i: int, j: int, ndim: int) -> torch.Tensor:
    matrix = torch.eye(ndim, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = torch.cos(angle)
    matrix[i, j], matrix[j, i] = -torch.sin(angle), torch.sin(angle)
    return matrix


def _moved(image: torch.Tensor, theta: torch.Tensor, mode: str) -> torch.Tensor:
    """Resample (C, *S) once; what comes from outside the image is 0."""
    grid = F.affine_grid(theta[None].to(image.dtype), (1, *image.shape), align_corners=True)
    return F.grid_sample(image[None], grid, mode=mode, padding_mode="zeros", align_corners=True)[0]
