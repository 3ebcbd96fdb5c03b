"""Covariates: what a model may be asked for, in which units and range, and how they become a vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ldm.errors import LdmError, nearest

KINDS = ("continuous", "categorical")
SCALING_POWER = {"length": 1, "area": 2, "volume": 3}
_KEYS = ("kind", "unit", "range", "levels", "scales_with", "column")

Value = float | str | None


@dataclass(frozen=True)
class Covariate:
    """One covariate.

    Attributes:
        name: its name in configurations, tables and model files.
        kind: ``continuous`` or ``categorical``.
        unit: physical unit, e.g. ``years`` or ``mm3``.
        range: legal range of a continuous covariate; from the configuration, or fitted on the training split.
        levels: levels of a categorical covariate, in code order.
        scales_with: how the value changes when anatomy is scaled by s: ``length`` s, ``area`` s^2,
            ``volume`` s^3, ``None`` not at all.
    """

    name: str
    kind: str
    unit: str | None = None
    range: tuple[float, float] | None = None
    levels: tuple[str, ...] | None = None
    scales_with: str | None = None

    @property
    def fitted(self) -> bool:
        """Whether the range or the levels are known, so that values can be encoded."""
        return (self.range if self.kind == "continuous" else self.levels) is not None

    def encode(self, value: Value) -> float:
        """Return the entry in the vector: ``(v - lo) / (hi - lo)``, a level's index, or NaN for None.

        Raises:
            LdmError: for a value that is no number, an unknown level, or a covariate that is not fitted.
        """
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return math.nan
        self._require_fitted()
        if self.kind == "categorical":
            return float(self.level_index(value))
        low, high = self.range
        return (self.number(value) - low) / (high - low)

    def decode(self, code: float) -> Value:
        """Invert :meth:`encode`; NaN becomes ``None``."""
        if math.isnan(code):
            return None
        self._require_fitted()
        if self.kind == "categorical":
            index = round(code)
            if not 0 <= index < len(self.levels):
                raise LdmError(f"covariate '{self.name}': there is no level number {index}; {self._legal()}")
            return self.levels[index]
        low, high = self.range
        return low + code * (high - low)

    def number(self, value: Value) -> float:
        """Return ``value`` as a finite float, or raise an LdmError that names the covariate."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            unit = f" (in {self.unit})" if self.unit else ""
            raise LdmError(f"covariate '{self.name}': {value!r} is not a finite number{unit}")
        return number

    def level_index(self, value: Value) -> int:
        """Return the index of a level; ``1``, ``1.0`` and ``"1"`` name the same one.

        Raises:
            LdmError: if it is no level, naming the legal ones.
        """
        text = str(value)
        if text in self.levels:
            return self.levels.index(text)
        number = _as_number(text)
        for index, level in enumerate(self.levels):
            if number is not None and _as_number(level) == number:
                return index
        raise LdmError(f"covariate '{self.name}' has no level '{text}'.{nearest(text, self.levels)} {self._legal()}")

    def fit(self, values: Sequence[Value]) -> Covariate:
        """Fill in a range or levels that were not configured, from the training split's values.

        A fitted range is rounded outward past the extremes, so that no subject's own extreme is published.

        Raises:
            LdmError: if there is no value at all to fit from.
        """
        given = [value for value in values if value is not None]
        if self.fitted:
            return self
        if not given:
            raise LdmError(f"covariate '{self.name}': no training subject has a value, so nothing can be fitted")
        if self.kind == "categorical":
            return replace(self, levels=tuple(sorted({str(value) for value in given}, key=_level_order)))
        return replace(self, range=outward([self.number(value) for value in given]))

    def warning(self, value: Value) -> str | None:
        """Return why a continuous value is outside the range, or ``None``."""
        if value is None or self.kind != "continuous" or self.range is None:
            return None
        low, high = self.range
        number = self.number(value)
        if low <= number <= high:
            return None
        return f"{self.name} = {number:g}{self._unit()} is outside {low:g}..{high:g}{self._unit()}"

    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""

    def _legal(self) -> str:
        return f"Legal levels: {', '.join(self.levels)}"

    def _require_fitted(self) -> None:
        if not self.fitted:
            missing = "range" if self.kind == "continuous" else "levels"
            raise LdmError(
                f"covariate '{self.name}' has no {missing} yet: configure "
                f"data.covariates.{self.name}.{missing} or fit the schema on the training split"
            )


def outward(values: Sequence[float]) -> tuple[float, float]:
    """Round the extremes of ``values`` outward, to two significant digits of their span.

    An extreme that is already round is moved one step further, so that it is never published as it is;
    zero is kept as the lower bound of quantities that cannot be negative.
    """
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    exponent = math.floor(math.log10(span)) - 1
    step = 10.0**exponent
    first, last = math.floor(low / step), math.ceil(high / step)
    below = first if first * step < low else first - 1
    above = last if last * step > high else last + 1
    if low >= 0:
        below = max(below, 0)
    digits = max(0, -exponent)
    return round(below * step, digits), round(above * step, digits)


class CovariateSchema:
    """The ordered, immutable list of covariates; K in all shapes is its length."""

    def __init__(self, covariates: Iterable[Covariate] = ()) -> None:
        self._covariates = {covariate.name: covariate for covariate in covariates}

    @classmethod
    def from_config(cls, config: Mapping[str, Mapping[str, Any] | None] | None) -> CovariateSchema:
        """Build from ``{age: {kind: continuous, unit: years, range: [44, 82], scales_with: null}, ...}``.

        ``column`` is a legal key that the cohort reads (the table column or expression behind the covariate).

        Raises:
            LdmError: for an unknown key or kind (naming the nearest) and for an impossible range.
        """
        return cls(_covariate(name, entry or {}) for name, entry in (config or {}).items())

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the vector."""
        return tuple(self._covariates)

    def __len__(self) -> int:
        return len(self._covariates)

    def __iter__(self) -> Iterator[Covariate]:
        return iter(self._covariates.values())

    def __getitem__(self, name: str) -> Covariate:
        if name not in self._covariates:
            raise LdmError(
                f"there is no covariate '{name}'.{nearest(name, self.names)} Known: {', '.join(self.names) or 'none'}"
            )
        return self._covariates[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CovariateSchema) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"CovariateSchema({list(self)!r})"

    def fit(self, rows: Iterable[Mapping[str, Value]]) -> CovariateSchema:
        """Return a schema with ranges and levels, fitted on the training ``rows`` where not given."""
        table = list(rows)
        return CovariateSchema(covariate.fit([row.get(covariate.name) for row in table]) for covariate in self)

    def encode(self, row: Mapping[str, Value]) -> np.ndarray:
        """Encode one row as a float32 vector of shape ``(K,)``.

        Continuous values map the range to 0..1 and are not clipped; categorical values become the level's
        index; a covariate that is missing or ``None`` becomes NaN, which stands for the learned null.

        Raises:
            LdmError: for a name that is not in the schema (naming the nearest), or an illegal value.
        """
        for name in row:
            self[name]
        return np.array([covariate.encode(row.get(covariate.name)) for covariate in self], dtype=np.float32)

    def encode_table(self, rows: Iterable[Mapping[str, Value]]) -> np.ndarray:
        """Encode rows as a float32 array of shape ``(N, K)``."""
        vectors = [self.encode(row) for row in rows]
        return np.stack(vectors) if vectors else np.zeros((0, len(self)), dtype=np.float32)

    def decode(self, vector: Sequence[float] | np.ndarray) -> dict[str, Value]:
        """Decode a vector of shape ``(K,)`` into values in physical units; NaN becomes ``None``."""
        codes = np.asarray(vector, dtype=np.float64)
        if codes.shape != (len(self),):
            raise LdmError(f"a covariate vector has shape ({len(self)},), not {codes.shape}")
        return {covariate.name: covariate.decode(float(code)) for covariate, code in zip(self, codes, strict=True)}

    def out_of_range(self, row: Mapping[str, Value]) -> list[str]:
        """Return a warning for each continuous value that lies outside its covariate's range."""
        warnings = (self[name].warning(value) for name, value in row.items())
        return [warning for warning in warnings if warning]

    def rescale(self, vector: np.ndarray, s: float) -> np.ndarray:
        """Correct codes of shape ``(..., K)`` for anatomy scaled by the factor ``s``, in physical units.

        A volume grows by s^3, an area by s^2, a length by s; everything else is left as it is.
        """
        codes = np.array(vector, dtype=np.float32)
        for index, covariate in enumerate(self):
            if covariate.scales_with is None:
                continue
            low, high = covariate.range
            value = (low + codes[..., index] * (high - low)) * s ** SCALING_POWER[covariate.scales_with]
            codes[..., index] = (value - low) / (high - low)
        return codes

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain JSON values, in order."""
        entries = {covariate.name: asdict(covariate) for covariate in self}
        for entry in entries.values():
            del entry["name"]
            entry["range"] = None if entry["range"] is None else list(entry["range"])
            entry["levels"] = None if entry["levels"] is None else list(entry["levels"])
        return entries

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> CovariateSchema:
        """Invert :meth:`to_dict`."""
        return cls.from_config(data)


def _covariate(name: str, entry: Mapping[str, Any]) -> Covariate:
    where = f"data.covariates.{name}"
    for key in entry:
        if key not in _KEYS:
            raise LdmError(f"{where} has no key '{key}'.{nearest(key, _KEYS)} Legal keys: {', '.join(_KEYS)}")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise LdmError(f"{where}.kind is {kind!r}.{nearest(str(kind), KINDS)} Legal: {', '.join(KINDS)}")
    other = "levels" if kind == "continuous" else "range"
    if entry.get(other) is not None:
        raise LdmError(f"{where}: a {kind} covariate has no '{other}'")
    scales_with = entry.get("scales_with")
    if scales_with is not None and (kind != "continuous" or scales_with not in SCALING_POWER):
        raise LdmError(
            f"{where}.scales_with is {scales_with!r}. Legal: null, or for a continuous covariate "
            f"{', '.join(SCALING_POWER)}"
        )
    return Covariate(
        name,
        kind,
        entry.get("unit"),
        _range(entry.get("range"), where),
        _levels(entry.get("levels"), where),
        scales_with,
    )


def _range(value: Any, where: str) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise LdmError(f"{where}.range is {value!r}; it needs two finite numbers, the lower one first")
    return low, high


def _levels(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise LdmError(f"{where}.levels is {value!r}; it needs a list of names, e.g. [F, M]")
    levels = tuple(str(level) for level in value)
    if len(set(levels)) != len(levels):
        raise LdmError(f"{where}.levels names a level twice: {', '.join(levels)}")
    return levels


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _level_order(text: str) -> tuple[bool, float, str]:
    number = _as_number(text)
    return (number is None, number or 0.0, text)
