"""Label values of a cohort as class indices: 0 for background, 1, 2, ... in the order of ``data.label_names``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import LdmError


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

    def __len__(self) -> int:
        """Number of classes, background included."""
        return len(self.values) + 1

    def classes(self, labels: Tensor) -> Tensor:
        """Stored values ``(...)`` uint8 -> class indices ``(...)`` int64."""
        table = torch.zeros(256, dtype=torch.long)
        for index, values in enumerate(self.values.values(), 1):
            table[list(values)] = index
        return table.to(labels.device)[labels.long()]
