"""Captions: a sentence from a row of covariates, so that every cohort can be conditioned on text.

A template is text with fields in braces and phrases in brackets::

    T1-weighted MRI of a [{age:.0f}-year-old ]{sex:woman|man}[ with {ventricles_mm3<20000:small|<60000:normal|large}
    ventricles]

====================================  ==========================================================================
``{age}``, ``{age:.0f}``              the number, with at most a precision and one of e, f, g; a level as it is
``{sex:woman|man}``                   a word for each level, in the order of the levels
``{volume<20:small|<60:normal|large}``  a word for each interval, the bounds increasing
``[...]``                             a phrase that is left out when one of its covariates is not given
====================================  ==========================================================================

A covariate that is not given outside all brackets leaves no caption at all: the conditioner's learned null stands in.
A template names covariates and holds words; there is no access to attributes and nothing in it is executed.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError

_PARTS = re.compile(r"\{[^{}\[\]]*\}|[\[\]]|[^{}\[\]]+|[{}]")
_FIELD = re.compile(r"\{(?P<name>\w+)\s*(?P<rest>[:<].*)?\}", re.DOTALL)
_NUMBER = re.compile(r",?(\.\d{1,2})?[efg]?")
_BOUND = re.compile(r"<\s*(?P<bound>[-+]?[\d.]+(e[-+]?\d+)?)\s*:(?P<word>.*)", re.DOTALL | re.IGNORECASE)

Say = Callable[[Any], str]


@dataclass(frozen=True)
class Field:
    """A covariate and how it is said."""

    name: str
    say: Say
    words: tuple[str, ...]


@dataclass(frozen=True)
class Caption:
    """A parsed template.

    Attributes:
        phrases: (whether it may be left out, its parts: text or fields).
    """

    phrases: tuple[tuple[bool, tuple[str | Field, ...]], ...]

    @classmethod
    def parse(cls, template: str, schema: CovariateSchema, where: str = "caption") -> Caption:
        """Read a template for the covariates of a fitted schema.

        Raises:
            LdmError: an unknown covariate, a field that does not fit its kind, or brackets and braces that do not pair.
        """
        if not isinstance(template, str) or not template.strip():
            raise LdmError(f"{where} is {template!r}; it needs a sentence such as 'a {{age:.0f}}-year-old {{sex}}'.")
        phrases: list[tuple[bool, list[str | Field]]] = [(False, [])]
        for part in _PARTS.findall(template):
            inside = phrases[-1][0]
            if (part == "[" and inside) or (part == "]" and not inside) or part in ("{", "}"):
                raise LdmError(f"{where}: '{part}' does not pair in '{template}'; phrases in brackets do not nest.")
            if part in "[]":
                phrases.append((part == "[", []))
            else:
                phrases[-1][1].append(_field(part, schema, where) if part[0] == "{" else part)
        if phrases[-1][0]:
            raise LdmError(f"{where}: a bracket is not closed in '{template}'.")
        return cls(tuple((optional, tuple(parts)) for optional, parts in phrases if parts))

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """The sentence of a row in physical units; None when a covariate that it cannot do without is not given."""
        said = []
        for optional, parts in self.phrases:
            missing = any(isinstance(part, Field) and row.get(part.name) is None for part in parts)
            if missing and not optional:
                return None
            if not missing:
                said += [part.say(row[part.name]) if isinstance(part, Field) else part for part in parts]
        return " ".join("".join(said).split()) or None

    @property
    def names(self) -> set[str]:
        """The covariates that it tells."""
        return {part.name for _, parts in self.phrases for part in parts if isinstance(part, Field)}

    def texts(self) -> list[str]:
        """All words that the template can say, but for numbers."""
        parts = [part for _, parts in self.phrases for part in parts]
        return [word for part in parts for word in (part.words if isinstance(part, Field) else (part,))]


def _field(text: str, schema: CovariateSchema, where: str) -> Field:
    match = _FIELD.fullmatch(text)
    if match is None:
        raise LdmError(f"{where}: '{text}' is no field; legal: {{name}}, {{name:.0f}}, {{name:a|b}}, {{name<1:a|b}}.")
    try:
        covariate = schema[match["name"]]
    except LdmError as error:
        raise LdmError(f"{where}: {error}") from error
    rest, where = match["rest"] or "", f"{where}: '{text}'"
    if rest.startswith("<"):
        return _intervals(covariate, rest, where)
    if covariate.kind == "categorical":
        return _levels(covariate, rest[1:], where)
    if not _NUMBER.fullmatch(rest[1:]):
        raise LdmError(f"{where} is continuous; legal after the colon: a precision such as .0f or .1f.")
    form = rest[1:] or "g"
    return Field(covariate.name, lambda value: format(covariate.number(value), form), ())


def _levels(covariate: Covariate, text: str, where: str) -> Field:
    levels = covariate.levels or ()
    words = tuple(text.split("|")) if text else levels
    if len(words) != len(levels):
        raise LdmError(
            f"{where} has {len(words)} word(s) for {len(levels)} levels; legal: one each, for {', '.join(levels)}."
        )
    return Field(covariate.name, lambda value: words[covariate.level_index(value)], words)


def _intervals(covariate: Covariate, text: str, where: str) -> Field:
    if covariate.kind != "continuous":
        raise LdmError(f"{where} has bounds, but {covariate.name} is categorical; legal: a word for each level.")
    *below, last = text.split("|")
    matches = [_BOUND.fullmatch(part) for part in below]
    if not below or None in matches or last.lstrip().startswith("<"):
        raise LdmError(f"{where}: legal: <bound:word, more of them after |, and a last word without a bound.")
    bounds = [float(match["bound"]) for match in matches]
    if any(a >= b for a, b in itertools.pairwise(bounds)):
        raise LdmError(f"{where}: the bounds {', '.join(f'{b:g}' for b in bounds)} have to increase.")
    words = (*(match["word"] for match in matches), last)
    return Field(covariate.name, lambda value: words[bisect.bisect_right(bounds, covariate.number(value))], words)
