"""Derived columns: sums and products of table columns and numbers, parsed by hand, never run as code.

Grammar::

    expression = term   { ("+" | "-") term }
    term       = factor { ("*" | "/") factor }
    factor     = number | column | "(" expression ")"
    column     = letters, digits, "_" and "."   or   `any text between backticks`

Example: ``(hippocampus_r_ml + hippocampus_l_ml) * mni_volume_factor * 1000``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ldm.errors import LdmError, nearest

MAX_LENGTH = 200
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])"
    r"|(?P<column>[^\W\d][\w.]*)|`(?P<quoted>[^`]+)`|(?P<symbol>[-+*/()]))"
)
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}

Node = tuple
"""``("number", value)``, ``("column", name)`` or ``(operator, left, right)``."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression.

    Attributes:
        text: as written.
        columns: names of the columns it reads, in order of appearance.
        tree: the parsed form.
    """

    text: str
    columns: tuple[str, ...]
    tree: Node

    def __call__(self, value_of: Callable[[str], float | None]) -> float | None:
        """Evaluate with ``value_of(column)``; ``None`` when any column is missing.

        Raises:
            ZeroDivisionError: if a divisor is zero.
        """
        values = {name: value_of(name) for name in self.columns}
        if any(value is None for value in values.values()):
            return None
        return _evaluate(self.tree, values)


def parse(text: str, columns: Iterable[str], where: str) -> Expression:
    """Parse ``text``; the name of an existing column stands for that column, however it is spelt.

    Args:
        text: a column name or an expression.
        columns: names of the table's columns.
        where: configuration key, for messages.

    Raises:
        LdmError: for anything outside the grammar, and for unknown columns (naming the nearest).
    """
    known = list(columns)
    if text in known:
        return Expression(text, (text,), ("column", text))
    if len(text) > MAX_LENGTH:
        raise LdmError(f"{where}: the expression has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    parser = _Parser(text, where)
    tree = parser.expression()
    parser.finish()
    names = tuple(dict.fromkeys(parser.columns))
    for name in names:
        if name not in known:
            raise LdmError(
                f"{where}: the table has no column '{name}'.{nearest(name, known)} Columns: {', '.join(known)}"
            )
    return Expression(text, names, tree)


class _Parser:
    """Recursive descent over the grammar above."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.position = 0
        self.columns: list[str] = []

    def expression(self) -> Node:
        node = self.term()
        while symbol := self.accept("+-"):
            node = (symbol, node, self.term())
        return node

    def term(self) -> Node:
        node = self.factor()
        while symbol := self.accept("*/"):
            node = (symbol, node, self.factor())
        return node

    def factor(self) -> Node:
        if self.accept("("):
            node = self.expression()
            if not self.accept(")"):
                raise self.error("')' expected")
            return node
        match = _TOKEN.match(self.text, self.position)
        if match is None or match["symbol"]:
            raise self.error("a column or a number expected")
        self.position = match.end()
        if match["number"]:
            return ("number", float(match["number"]))
        name = match["column"] or match["quoted"]
        self.columns.append(name)
        return ("column", name)

    def accept(self, symbols: str) -> str | None:
        match = _TOKEN.match(self.text, self.position)
        if match is None or not match["symbol"] or match["symbol"] not in symbols:
            return None
        self.position = match.end()
        return match["symbol"]

    def finish(self) -> None:
        if self.text[self.position :].strip():
            raise self.error("an operator (+ - * /) or the end expected")

    def error(self, message: str) -> LdmError:
        rest = self.text[self.position :].strip() or "the end"
        return LdmError(
            f"{self.where}: cannot read '{self.text}': {message} at '{rest}'. Legal: the name of a column, "
            "or sums and products of columns and numbers, e.g. 'ventricles_ml * 1000'; names with other "
            "characters go between backticks"
        )


def _evaluate(node: Node, values: dict[str, float | None]) -> float:
    if node[0] == "number":
        return node[1]
    if node[0] == "column":
        return values[node[1]]
    return _OPERATORS[node[0]](_evaluate(node[1], values), _evaluate(node[2], values))
