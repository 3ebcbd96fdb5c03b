"""What is wrong with a cohort, said so that it can be mended: where, what, why, and the remedy."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

SHOWN_PER_KIND = 20
"""Rows of one kind that the text report shows; the JSON report holds them all."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a cohort.

    Attributes:
        where: the file, ``table:line`` or configuration key at fault.
        kind: a short slug, e.g. ``unreadable``; the report is grouped by it.
        reason: what is wrong, with the values that were found.
        remedy: what to do about it.
        record: id of the record that ``data.faults=leave_out`` drops; ``None`` for a fault of the whole
            cohort, which always stops.
    """

    where: str
    kind: str
    reason: str
    remedy: str
    record: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Return the fault as plain JSON values."""
        return asdict(self)


def render(faults: Iterable[Fault], title: str, shown: int = SHOWN_PER_KIND) -> str:
    """Render faults as an aligned text table, grouped by kind; ``""`` when there are none.

    Args:
        faults: the faults, in the order in which each kind should list them.
        title: heading, completed with the count.
        shown: how many faults of one kind are written out before "... and N more".
    """
    groups: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[fault.kind].append(fault)
    if not groups:
        return ""
    total = sum(len(group) for group in groups.values())
    lines = [f"{title}: {total}"]
    for kind in sorted(groups):
        lines += _render_group(kind, groups[kind], shown)
    return "\n".join(lines)


def _render_group(kind: str, group: Sequence[Fault], shown: int) -> list[str]:
    lines = ["", f"{kind} ({len(group)})"]
    visible = group[:shown]
    width = max(len(fault.where) for fault in visible)
    lines += [f"  {fault.where:<{width}}  {fault.reason}" for fault in visible]
    if len(group) > shown:
        lines.append(f"  ... and {len(group) - shown} more (all of them are in the JSON report)")
    for remedy in dict.fromkeys(fault.remedy for fault in visible):
        lines += textwrap.wrap(f"remedy: {remedy}", 108, initial_indent="  -> ", subsequent_indent="     ")
    return lines
