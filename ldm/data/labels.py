"""Label values of a cohort as class indices: 0 for background, 1, 2, ... in the order of ``data.label_names``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.intensity import IntensityRecipe
from ldm.errors import LdmError

#: how a mask that is generated is stored: 0 and 1 in files, -1 and 1 for the model (Wolleb et al. 2022)
MASK_INTENSITY = IntensityRecipe("window", lower=0.0, upper=1.0, range=(-1.0, 1.0))


@dataclass(frozen=True)
class LabelClasses:
    """Named classes, each made of one or more stored label values; every other value is background.

    Attributes:
        values: class name -> stored values, in class order.
    """

    values: dict[str, tuple[int, ...]]

    @classmethod
    def from_config(cls, config: Mapping[str, int | Sequence[int]] | None) -> LabelClasses:
        """Read ``data.label_names``.

        Raises:
            LdmError: no names, a value outside 1..255, or one value in two classes.
        """
        values = {name: (entry,) if isinstance(entry, int) else tuple(entry) for name, entry in (config or {}).items()}
        if not values:
            raise LdmError("data.label_names is empty; name the classes, e.g. {anterior: 1, posterior: 2}.")
        seen: dict[int, str] = {}
        for name, entry in values.items():
            for value in entry:
                if not isinstance(value, int) or not 1 <= value <= 255:
                    raise LdmError(f"data.label_names.{name}: {value!r} is not a label value; legal: 1 to 255.")
                if value in seen:
                    raise LdmError(f"data.label_names: value {value} is in '{seen[value]}' and in '{name}'.")
                seen[value] = name
        return cls(values)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names; class k + 1 is ``names[k]``."""
        return tuple(self.values)

    @property
    def meaning(self) -> list[list[Any]]:
        """``[[name, stored values], ...]`` in class order: equal exactly when class indices mean the same."""
        return [[name, list(values)] for name, values in self.values.items()]

    def __len__(self) -> int:
        """Number of classes, background included."""
        return len(self.values) + 1

    def classes(self, labels: Tensor) -> Tensor:
        """Stored values ``(...)`` uint8 -> class indices ``(...)`` int64."""
        table = torch.zeros(256, dtype=torch.long)
        for index, values in enumerate(self.values.values(), 1):
            table[list(values)] = index
        return table.to(labels.device)[labels.long()]

    def masks(self, labels: Tensor) -> Tensor:
        """Stored values ``(*S)`` uint8 -> masks ``(K, *S)`` of all classes but background: -1 outside, 1 inside."""
        inside = [self.classes(labels) == index for index in range(1, len(self))]
        return 2.0 * torch.stack(inside).float() - 1.0  # (K, *S)

    def values_of(self, classes: Tensor) -> Tensor:
        """Class indices ``(...)`` -> stored values uint8, the first of each class."""
        first = [0, *(values[0] for values in self.values.values())]
        return torch.tensor(first, dtype=torch.uint8)[classes.long()]

    def unknown(self, values: Collection[int]) -> list[int]:
        """Those of some stored values that are neither in a class nor 0."""
        return sorted(set(values) - {0, *(value for entry in self.values.values() for value in entry)})
