"""How stored intensities become the model's range, and an error when the recipe does not suit the data.

=============  =====================================================================================
``percentile`` the ``lower`` and ``upper`` percentile of each volume (all voxels) map onto ``range``;
               for intensities without a unit, such as MR
``window``     the fixed intensities ``lower`` and ``upper`` map onto ``range``; for CT in HU and for
               data on a known common scale, such as 8-bit pictures
``zscore``     zero mean, unit standard deviation of each volume; ``lower`` and ``upper`` are optional
               limits in standard deviations; has no fixed range. Black and white, in pictures and in
               measures that need a range, are the limits, where there are none 5 standard deviations
=============  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ldm.errors import LdmError, nearest

KINDS = ("percentile", "window", "zscore")
_DEFAULT_LIMITS = {"percentile": (0.0, 99.5), "zscore": (None, None)}
# Hounsfield values that only air and padding have; MR has neither air at -1000 nor such a minimum.
_AIR_HU = -500.0
_PADDING_HU = (-1000.0, -1024.0, -2000.0, -2048.0, -3024.0)
_SATURATED = 0.99
_SHOWN = (-5.0, 5.0)  # standard deviations that are black and white where z-scores have no limits


@dataclass(frozen=True)
class IntensityRecipe:
    """One intensity recipe, applied to each channel of each image on its own.

    kind:         ``percentile``, ``window`` or ``zscore``.
    lower, upper: percentiles (0..100), stored intensities, or standard deviations (see the module's table).
    range:        (a, b), the model's range; background is a. Not used by ``zscore``.
    clip:         whether values beyond the limits are cut off.
    """

    kind: str = "percentile"
    lower: float | None = None
    upper: float | None = None
    range: tuple[float, float] = (0.0, 1.0)
    clip: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LdmError(
                f"data.intensity.kind: unknown '{self.kind}'.{nearest(self.kind, KINDS)} Legal: {', '.join(KINDS)}."
            )
        lower, upper = _DEFAULT_LIMITS.get(self.kind, (None, None))
        set_field = object.__setattr__  # the dataclass is frozen; only its own set-up may fill in defaults
        set_field(self, "lower", _number("lower", lower if self.lower is None else self.lower))
        set_field(self, "upper", _number("upper", upper if self.upper is None else self.upper))
        set_field(self, "range", _checked_range(self.range))
        if self.kind == "window" and (self.lower is None or self.upper is None):
            raise LdmError("data.intensity: a window needs 'lower' and 'upper', e.g. -1000 and 400 HU for lung CT.")
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise LdmError(f"data.intensity: lower {self.lower:g} must be below upper {self.upper:g}.")
        if self.kind == "percentile" and not 0 <= self.lower < self.upper <= 100:
            raise LdmError(f"data.intensity: percentiles {self.lower:g} and {self.upper:g} must lie in 0..100.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> IntensityRecipe:
        """Build from the ``data.intensity`` block; an unknown key is an LdmError that names the nearest."""
        legal = [item.name for item in fields(cls)]
        for key in config or {}:
            if key not in legal:
                raise LdmError(f"data.intensity: unknown key '{key}'.{nearest(key, legal)} Legal: {', '.join(legal)}.")
        return cls(**dict(config or {}))

    @property
    def has_range(self) -> bool:
        """Whether every result lies in ``range``."""
        return self.kind != "zscore" and self.clip

    @property
    def shown_range(self) -> tuple[float, float]:
        """(black, white) of pictures, and the range of measures that need one; the same for every image.

        ``range``; of z-scores their limits, 5 standard deviations where they are not cut off.
        """
        if self.kind != "zscore":
            return self.range
        limits = (self.lower, self.upper) if self.clip else (None, None)
        low, high = (shown if limit is None else limit for limit, shown in zip(limits, _SHOWN, strict=True))
        return low, high

    def apply(self, array: np.ndarray, name: str) -> np.ndarray:
        """Map one channel (any shape) into the model's range; float32.

        name: file or record named in errors.
        Raises LdmError when the array is constant or not finite, or when it cannot be the kind of data that
        the recipe is for.
        """
        self.check(array, name)
        if self.kind == "zscore":
            values = (array - array.mean(dtype=np.float64)) / array.std(dtype=np.float64)
            limits = (self.lower, self.upper)
            if self.clip and limits != (None, None):
                values = np.clip(values, *limits)
            return values.astype(np.float32)
        lower, upper = self._limits(array, name)
        a, b = self.range
        values = (array.astype(np.float64) - lower) / (upper - lower) * (b - a) + a
        return (np.clip(values, a, b) if self.clip else values).astype(np.float32)

    def invert(self, array: np.ndarray) -> np.ndarray:
        """Back from the model's range to stored units where these are known (``window``), else unchanged."""
        if self.kind != "window":
            return array
        a, b = self.range
        return ((array.astype(np.float64) - a) / (b - a) * (self.upper - self.lower) + self.lower).astype(np.float32)

    def undo(self, array: np.ndarray, stored: np.ndarray, name: str) -> np.ndarray:
        """Back from the model's range to the units of the one image that the recipe was applied to; float32.

        Other than `invert` it knows that image, and so its percentiles, or its mean and standard deviation.

        array:  (*S) of one channel.
        stored: the image as it is stored, of any shape.
        name: file or record named in errors.
        Raises LdmError when the recipe cannot be applied to ``stored``.
        """
        if self.kind == "zscore":
            restored = array.astype(np.float64) * stored.std(dtype=np.float64) + stored.mean(dtype=np.float64)
            return restored.astype(np.float32)
        lower, upper = self._limits(stored, name)
        a, b = self.range
        return ((array.astype(np.float64) - a) / (b - a) * (upper - lower) + lower).astype(np.float32)

    def again(self, array: np.ndarray) -> np.ndarray:
        """Undo `invert`: stored units into the model's range. Unlike `apply`, nothing is fitted or checked."""
        if self.kind != "window":
            return array
        a, b = self.range
        return ((array.astype(np.float64) - self.lower) / (self.upper - self.lower) * (b - a) + a).astype(np.float32)

    def background(self, array: np.ndarray) -> float:
        """Value for padding an image to which the recipe was applied: the lowest value there is."""
        return float(array.min()) if self.kind == "zscore" else self.range[0]

    def check(self, array: np.ndarray, name: str) -> None:
        """Raise LdmError when ``array`` does not suit the recipe (see `apply`)."""
        if not np.isfinite(array).all():
            bad = int(np.size(array) - np.isfinite(array).sum())
            raise LdmError(f"{name}: {bad} voxels are NaN or infinite. Mend or leave out this image.")
        low, high = float(array.min()), float(array.max())
        if low == high:
            raise LdmError(f"{name}: is constant (every voxel is {low:g}). Leave out this image.")
        if self.kind == "window":
            self._check_window(array, low, name)
        elif _looks_like_ct(array, low, high):
            raise LdmError(
                f"{name}: min {low:g} under a '{self.kind}' recipe: this looks like CT. "
                "Use data.intensity.kind=window with lower and upper in HU, e.g. -1000 and 1000."
            )

    def _limits(self, array: np.ndarray, name: str) -> tuple[float, float]:
        if self.kind == "window":
            return self.lower, self.upper
        lower, upper = (float(value) for value in np.percentile(array, (self.lower, self.upper)))
        if not lower < upper:
            raise LdmError(
                f"{name}: percentiles {self.lower:g} and {self.upper:g} are both {lower:g}: nearly all "
                "voxels are alike. Raise data.intensity.upper or leave out this image."
            )
        return lower, upper

    def _check_window(self, array: np.ndarray, low: float, name: str) -> None:
        if self.lower <= -100 and low >= 0:
            raise LdmError(
                f"{name}: no voxel is below 0 under a window from {self.lower:g} to {self.upper:g}: "
                "these are not HU (MR, or CT stored without its intercept). For MR use kind=percentile."
            )
        inside = array[array > low]  # the minimum is background or padding and tells nothing
        saturated = float(np.mean((inside < self.lower) | (inside > self.upper)))
        if saturated > _SATURATED:
            raise LdmError(
                f"{name}: the window {self.lower:g} to {self.upper:g} saturates {saturated:.1%} of "
                f"the voxels ({low:g} to {array.max():g}). Set data.intensity.lower and upper to the data's "
                "scale, or use data.intensity.kind=percentile."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe description; ``from_config`` restores it."""
        return asdict(self) | {"range": list(self.range)}


def _looks_like_ct(array: np.ndarray, low: float, high: float) -> bool:
    """Whether negative values are Hounsfield air or padding rather than ringing of an interpolated MR."""
    if not -4096 <= low <= _AIR_HU or high > 32767:
        return False
    return low in _PADDING_HU or float(np.mean(array <= _AIR_HU)) > 1e-3


def _number(key: str, value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
        raise LdmError(f"data.intensity.{key}: '{value}' is not a number.")
    return None if value is None else float(value)


def _checked_range(value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2 or not -math.inf < value[0] < value[1] < math.inf:
        raise LdmError(f"data.intensity.range: {list(value)} must be two numbers, low then high, e.g. [0, 1].")
    return float(value[0]), float(value[1])
