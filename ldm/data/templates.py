"""Templates that turn a table's row into a reference or an id, and never out of the data root.

``T1/{participant_id}_T1.nii.gz`` puts a column in place of its name. A value may not hold a path separator;
a column that holds relative paths says so: ``images/{file:path}``, and ``{file:stem}`` is its last part
without the suffix. There is no attribute, index or call in a template: names are looked up, nothing more.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ldm.data.stored import SEPARATOR
from ldm.errors import LdmError, nearest

FORMS = ("", "path", "stem")
_ROW = "row"


class MissingValueError(LdmError):
    """A template's column has no value in this row."""


class EscapeError(LdmError):
    """A value would lead out of the data root, or into another folder than the template says."""


@dataclass(frozen=True)
class Template:
    """A parsed template: ``(literal, column or None, form)`` parts.

    Attributes:
        text: as written.
        where: configuration key, for messages.
        parts: what to join.
    """

    text: str
    where: str
    parts: tuple[tuple[str, str | None, str], ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Template:
        """Parse ``text``.

        Raises:
            LdmError: for unbalanced braces, an unknown form, or a path that is absolute or holds ``..``.
        """
        if not isinstance(text, str):
            raise LdmError(f"{where} is {text!r}; it needs a template, e.g. 'T1/{{participant_id}}.nii.gz'")
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise LdmError(f"{where}: '{text}' is not a template ({error}); write columns as {{name}}") from error
        parts = []
        for literal, column, form, conversion in pieces:
            if conversion or (form or "") not in FORMS or column == "":
                raise LdmError(f"{where}: '{text}' holds more than {{column}}, {{column:path}} or {{column:stem}}")
            parts.append((literal, column, form or ""))
        template = cls(text, where, tuple(parts))
        # "x" stands in for each column: the literal parts alone must not form ".." or an absolute path.
        if _escapes("".join(literal + ("" if column is None else "x") for literal, column, _ in parts)):
            raise LdmError(
                f"{where}: '{text}' leads out of data.root; set data.root to a folder that holds all "
                "files and give paths below it"
            )
        return template

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template reads."""
        return tuple(dict.fromkeys(column for _, column, _ in self.parts if column is not None))

    def require(self, columns: Iterable[str]) -> None:
        """Raise an LdmError that names the nearest column if one is unknown."""
        known = [*columns, _ROW]
        for column in self.columns:
            if column not in known:
                raise LdmError(
                    f"{self.where}: the table has no column '{column}'.{nearest(column, known)} "
                    f"Columns: {', '.join(known[:-1])}"
                )

    def format(self, row: Mapping[str, str | None]) -> str:
        """Fill in a row.

        Raises:
            MissingValueError: if a value is missing.
            EscapeError: if a value holds a path separator, or the result leads out of the root.
        """
        filled = "".join(literal + self._value(row, column, form) for literal, column, form in self.parts)
        if _escapes(filled):
            raise EscapeError(f"'{filled}' leads out of data.root")
        return filled

    def _value(self, row: Mapping[str, str | None], column: str | None, form: str) -> str:
        if column is None:
            return ""
        value = row[column]
        if value is None:
            raise MissingValueError(f"column '{column}' is empty")
        if SEPARATOR in value or "\\" in value or not value.isprintable():
            raise EscapeError(f"column '{column}' holds '{value}', which is no file name")
        if form == "" and "/" in value:
            raise EscapeError(f"column '{column}' holds '{value}', a path where a plain name is expected")
        if form and _escapes(value):
            raise EscapeError(f"column '{column}' holds '{value}', which leads out of data.root")
        return PurePosixPath(value).name.split(".")[0] if form == "stem" else value

    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the paths (without selector) that fit the template, one group a column."""
        pieces, seen = [], set()
        for literal, column, form in self._path_parts():
            pieces.append(re.escape(literal))
            if column is None:
                continue
            index = self.columns.index(column)
            body = ".+" if form == "path" else "[^/]+"
            pieces.append(f"(?P=c{index})" if column in seen else f"(?P<c{index}>{body})")
            seen.add(column)
        return re.compile("".join(pieces))

    def files(self, root: Path) -> list[str]:
        """Return the files below ``root`` that the template can name, as sorted paths relative to it."""
        glob = ""
        for literal, column, form in self._path_parts():
            glob += re.sub(r"([*?\[])", r"[\1]", literal)
            if column is not None:
                glob += "**/*" if form == "path" and (not glob or glob.endswith("/")) else "*"
        pattern = self.pattern()
        names = (path.relative_to(root).as_posix() for path in root.glob(glob) if path.is_file())
        # Hidden files, such as the "._*" that macOS leaves in archives, are no images.
        return sorted(name for name in names if pattern.fullmatch(name) and not _hidden(name))

    def row_of(self, name: str) -> dict[str, str | None]:
        """Read the columns back from a path that :meth:`files` returned."""
        match = self.pattern().fullmatch(name)
        groups = match.groupdict()
        return {c: groups[f"c{index}"] for index, c in enumerate(self.columns) if f"c{index}" in groups}

    def _path_parts(self) -> list[tuple[str, str | None, str]]:
        """The parts before the selector."""
        parts = []
        for literal, column, form in self.parts:
            path, separator, _ = literal.partition(SEPARATOR)
            if separator:
                return [*parts, (path, None, "")]
            parts.append((literal, column, form))
        return parts


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _escapes(path: str) -> bool:
    plain = path.partition(SEPARATOR)[0].replace("\\", "/")
    return plain.startswith(("/", "~")) or bool(re.match(r"[A-Za-z]:", plain)) or ".." in plain.split("/")
