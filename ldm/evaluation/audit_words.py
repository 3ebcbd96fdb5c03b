"""What an audit found, in sentences that say no more than the numbers do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_GUARANTEE = (
    "There is no formal guarantee: the model was not trained with differential privacy. What follows was measured, on "
    "these images, with these networks."
)
NOT_LINKED = (
    "The table of this cohort does not say which scans are of one person. Held-out scans may be of people who are in "
    "the training split too; they then lie nearer than strangers would, and the threshold is stricter than it should "
    "be, so that fewer images are found. Every count of subjects is one of scans."
)


def in_words(verdict: str, numbers: Mapping[str, Any]) -> list[str]:
    """Sentences on the ``numbers`` of :class:`ldm.evaluation.audit.AuditResult`, the verdict first."""
    spaces = numbers["spaces"]
    control = numbers["control"]
    lines = [_verdict(verdict, spaces, control), *_control(control, numbers["protocol"]["recall"], spaces)]
    lines += [_told(control), _any_space(numbers["any_space"], spaces)]
    for space in spaces.values():
        lines += [_excess(space), _copies(space)]
    lines += [] if numbers["subjects_linked"] else [NOT_LINKED]
    return [*lines, NO_GUARANTEE]


def _verdict(verdict: str, spaces: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    if verdict == "passed":
        return (
            "PASSED: not more synthetic images than held-out scans lie near a training scan, none lies as near as a "
            "copy, and the audit found the copies that were planted."
        )
    if verdict == "not conclusive" and control["passed"] and control["untold"]:
        return (
            f"NOT CONCLUSIVE: copies ({', '.join(control['untold'])}) could not be told from the nearest of so many "
            "unrelated scans, so that having found no outright copy says nothing."
        )
    if verdict == "not conclusive":
        return "NOT CONCLUSIVE: this audit would not have noticed copies, so that having found none says nothing."
    found = [
        *(["more synthetic images than held-out scans lie near a training scan"] if _any(spaces, _is_excess) else []),
        *(["synthetic images lie as near to a training scan as a copy of it"] if _any(spaces, _has_copies) else []),
    ]
    return f"NOT PASSED: {' and '.join(found)}."


def _any(spaces: Mapping[str, Any], test) -> bool:
    return any(test(space) for space in spaces.values())


def _is_excess(space: Mapping[str, Any]) -> bool:
    return space["excess"]["significant"]


def _has_copies(space: Mapping[str, Any]) -> bool:
    return space["copies"]["count"] > 0


def _control(control: Mapping[str, Any], recall: float, spaces: Mapping[str, Any]) -> list[str]:
    kinds, share = control["kinds"], control["noticeable_share"]
    number = next(iter(kinds.values()))["n"]
    weak = [f"{kind} {row['recall']:.0%}" for kind, row in kinds.items() if row["recall"] < recall]
    if weak:
        lines = [
            f"THE AUDIT'S OWN CONTROL FAILED: of copies of training scans that were planted, too few were found in any "
            f"way ({', '.join(weak)} of {number} each). A pass would mean nothing. Train the matcher for longer "
            "(ldm train-matcher)."
        ]
    else:
        least = min(row["recall"] for row in kinds.values())
        each = ", ".join(f"{row['recall']:.0%} of {kind} by {row['space']}" for kind, row in kinds.items())
        lines = [
            f"Control: of {number} planted copies of each kind at least {least:.0%} were found in one of "
            f"{len(spaces)} ways ({each})."
        ]
    if share is None:
        return [*lines, "With this control and so few images no excess of copies could be told from chance."]
    return [*lines, f"An excess is expected to show when at least {share:.1%} of the images are copies."]


def _told(control: Mapping[str, Any]) -> str:
    """Which kinds of planted copies are told from the nearest unrelated scan, and how many of each."""
    told = {kind: row for kind, row in control["kinds"].items() if row["strict_space"] is not None}
    each = ", ".join(f"{row['strict_recall']:.0%} of {kind} by {row['strict_space']}" for kind, row in told.items())
    text = f"Told as outright copies, nearer than unrelated scans of this number would be: {each or 'none'}."
    if not control["untold"]:
        return text
    missing = ", ".join(f"{kind} {control['kinds'][kind]['strict_recall']:.0%}" for kind in control["untold"])
    return f"{text} Of other kinds too few are ({missing}): more held-out scans, or a better matcher, would tell them."


def _any_space(rows: Mapping[str, Any], spaces: Mapping[str, Any]) -> str:
    held, drawn = rows["held-out scans"], rows["synthetic images"]
    rates = ", ".join(f"{space['rate']:.1%} in {name}" for name, space in spaces.items())
    return (
        f"Below the threshold of at least one of {len(spaces)} ways lie {held['flagged']} of {held['n']} held-out "
        f"scans ({held['share']:.1%}; by each way alone {rates} is expected) and {drawn['flagged']} of {drawn['n']} "
        f"synthetic images ({drawn['share']:.1%})."
    )


def _excess(space: Mapping[str, Any]) -> str:
    drawn, held = space["rows"]["synthetic images"], space["rows"]["held-out scans"]
    test, rebuilt = space["excess"], space["rows"].get("held-out scans, reconstructed")
    text = (
        f"In {space['words']}: {drawn['flagged']} of {drawn['n']} synthetic images ({drawn['share']:.1%}) lie below "
        f"the threshold, which {held['flagged']} of {held['n']} held-out scans set (a share of {space['rate']:.1%} is "
        f"expected); p = {test['p_value']:.2g} that so many are by chance"
    )
    if rebuilt is None:
        return text + "."
    return text + (
        f". Of the held-out scans after the first stage's reconstruction, which cannot be copies either, "
        f"{rebuilt['flagged']} of {rebuilt['n']} do."
    )


def _copies(space: Mapping[str, Any]) -> str:
    found, n = space["copies"], space["rows"]["synthetic images"]["n"]
    where = f"In {space['words']}"
    if found["count"]:
        return (
            f"{where} {found['count']} of {n} synthetic images lie as near as planted copies do, and nearer than "
            f"unrelated scans would: outright copies, of {found['subjects']} training subjects."
        )
    if not found["usable"]:
        return (
            f"{where} planted copies do not lie nearer than unrelated scans of this number may: outright copies cannot "
            "be told there."
        )
    recalls = ", ".join(f"{recall:.0%} of {kind}" for kind, recall in found["recalls"].items())
    return (
        f"{where} none of {n} synthetic images is an outright copy; the threshold for these finds, of planted copies, "
        f"{recalls}. At {found['confidence']:.0%} confidence at most {found['share_at_most']:.2%} of such images lie "
        "so near (rule of three)."
    )
