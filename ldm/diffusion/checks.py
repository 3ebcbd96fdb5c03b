"""Checks of the names and counts a configuration holds, each ending in a message that says what is legal."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

from ldm.errors import LdmError, nearest


def check_choice(what: str, value: Any, legal: Iterable[str]) -> None:
    """Raise LdmError, naming the legal values and the nearest of them, unless ``value`` is one of them."""
    legal = tuple(legal)
    if value not in legal:
        raise LdmError(f"{what} '{value}' is not known; legal: {', '.join(legal)}.{nearest(value, legal)}")


def check_count(what: str, value: Any) -> None:
    """Raise LdmError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise LdmError(f"{what} must be a whole number of at least 1, got {value!r}.")
