"""Checks of the names and numbers a configuration holds, each ending in a message that says what is legal."""

from __future__ import annotations

import math
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


def check_number(what: str, value: Any, low: float, high: float, legal: str) -> None:
    """Raise LdmError, with ``legal`` in words, unless ``value`` is a number from ``low`` to ``high``."""
    if not is_number(value) or not low <= value <= high:
        raise LdmError(f"{what} is {value!r}; legal: {legal}.")


def check_pair(what: str, value: Any, low: float, legal: str) -> None:
    """Raise LdmError, with ``legal`` in words, unless ``value`` is two numbers of which ``low <= first < second``."""
    try:
        first, second = value
    except (TypeError, ValueError):
        first = second = None
    if not (is_number(first) and is_number(second) and low <= first < second):
        raise LdmError(f"{what} is {value!r}; legal: {legal}.")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number: no bool, no NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)
