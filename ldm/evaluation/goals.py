"""The verdict of an evaluation: each goal in words, met or missed, with its number and interval.

A goal is met where the whole 95 % interval is on its good side, missed where the whole interval is on the other, and
undecided where the interval lies on both: more images would tell. What was not measured, or cannot be trusted, says
why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.errors import LdmError, nearest
from ldm.evaluation.audit import INCONCLUSIVE
from ldm.model.provenance import drawn_otherwise

FEWEST = 5  # subjects: the interval of fewer says next to nothing of others, and that of one has no width
#: how many times as far held-out images may be where there are so many that any difference in kind is seen
FAR = 2.0
GOALS = {"frechet_ratio": 1.5, "ms_ssim": 0.02, "share": 0.95}
MET, MISSED, UNDECIDED, NOT_MEASURED = "met", "missed", "undecided", "not measured"

OTHER_SPLIT = (
    "The instrument was trained on another split of the data: it may know some of the held-out images, and then seems "
    "better on real images than it is. Train it again with the same data settings."
)

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One goal.

    Attributes:
        goal: the question, for a reader who knows no metric.
        status: ``met``, ``missed``, ``undecided`` or ``not measured``.
        text: the number, its interval and what it is compared with; or why there is none.
    """

    goal: str
    status: str
    text: str


def check_goals(goals: Mapping[str, float | None]) -> dict[str, float | None]:
    """The goals, complete.

    Raises:
        LdmError: an unknown one, or one that is no positive number.
    """
    for name, value in goals.items():
        if name not in GOALS:
            raise LdmError(f"goals.{name} is not a goal.{nearest(name, GOALS)} Legal: {', '.join(GOALS)}.")
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise LdmError(f"goals.{name} is {value!r}; legal: a positive number, or null for no goal.")
    return {**GOALS, **goals}


def verdicts(metrics: Metrics, audit: Metrics | None = None) -> list[Verdict]:
    """Every goal of a model's evaluation.

    Args:
        metrics: content of ``metrics.json``; parts may be missing.
        audit: content of ``audit.json``, if there is one.
    """
    goals = {**GOALS, **metrics.get("goals", {})}
    return [
        realism(metrics.get("distances"), goals["frechet_ratio"]),
        diversity(metrics.get("ms_ssim"), goals["ms_ssim"]),
        *conditions(metrics.get("fidelity"), goals["share"]),
        copying(audit, metrics.get("sampling")),
    ]


def judged(interval: tuple[float, float], low: float = float("-inf"), high: float = float("inf")) -> str:
    """Whether an interval lies within ``low`` to ``high``."""
    if low <= interval[0] and interval[1] <= high:
        return MET
    return MISSED if interval[1] < low or interval[0] > high else UNDECIDED


def realism(distances: Metrics | None, goal: float | None) -> Verdict:
    """Are generated images as near to the reference as real ones? The Fréchet distance over the floor's."""
    question = "Do generated images look like real ones?"
    if distances is None:
        why = "There is no distance to real images: it needs a feature network (ldm train-predictor) and enough images."
        return Verdict(question, NOT_MEASURED, why)
    name = generated_row(distances)
    row, rows = distances["rows"][name], distances["rows"]
    above = distances.get("untrusted", {}).get("frechet", [])
    if above:
        why = f"This distance cannot be trusted here: it does not call {' and '.join(above)} worse than real images."
        return Verdict(question, NOT_MEASURED, f"{why} So it says nothing about generated images either.")
    if row.get("frechet_ratio_interval") is None or goal is None:
        return Verdict(question, NOT_MEASURED, _no_ratio(row, goal))
    control = rows[distances["control"]]
    said = (
        f"{_start(name)} are {number(row['frechet_ratio'])} times as far from the "
        f"{distances['protocol']['reference']['images']} as real held-out images are "
        f"{_interval(row['frechet_ratio_interval'])}; goal: at most {goal:g} times. {_method(distances)} "
        f"{_start(distances['control'])}: {number(control['frechet_ratio'])} times."
    )
    if control["frechet_ratio_interval"][0] <= 1:
        why = "With so few images this distance does not tell blurred images from real ones: it decides nothing."
        return Verdict(question, NOT_MEASURED, f"{why} {said}")
    apart = _held_out_differ(distances)
    if apart is not None:
        return Verdict(question, NOT_MEASURED, f"{apart} {said}")
    seeds = _over_seeds(distances.get("seeds", {}).get("frechet_ratio"))
    return Verdict(question, judged(row["frechet_ratio_interval"], high=goal), said + seeds)


def _held_out_differ(distances: Metrics) -> str | None:
    """Why held-out images are no yardstick; None where they are one."""
    ratio, row = distances["protocol"].get("frechet_ratio", {}), distances["rows"][distances["floor"]]
    value, interval = row["frechet_ratio"], row.get("frechet_ratio_interval", (1.0, 1.0))
    if ratio.get("floor"):
        value, interval = ratio["floor"]["value"], ratio["floor"]["interval"]
    if interval[0] <= (FAR if ratio.get("method", "").startswith("extrapolated") else 1):
        return None
    return (
        f"Real held-out images themselves are {number(value)} times as far {_interval(interval)} as parts of all real "
        "images are from each other: reference and held-out images differ in kind (the network was trained on one of "
        "them, or the split is uneven), and the ratio decides nothing."
    )


def generated_row(distances: Metrics) -> str:
    """The row of generated images, which come behind the floor and the controls: of several seeds, the first."""
    known = {distances["floor"], *distances.get("controls", list(distances["rows"])[:-1])}
    return next(name for name in distances["rows"] if name not in known)


def diversity(within: Metrics | None, goal: float | None) -> Verdict:
    """Do generated images differ among themselves as real ones do? MS-SSIM within each set."""
    question = "Do generated images differ from each other as much as real ones do?"
    if within is None or goal is None:
        why = "There are too few images, or this evaluation is older than the measure." if goal else "No goal is set."
        return Verdict(question, NOT_MEASURED, why)
    real, samples = (within["sets"][name]["mean"] for name in ("real", "samples"))
    difference = within["difference"]["samples"]
    alike = "more alike than" if difference["value"] > 0 else "less alike than"
    said = (
        f"Two generated images have a likeness (MS-SSIM) of {samples:.3f} on average, two real ones {real:.3f}: "
        f"generated images are {alike} real ones by {abs(difference['value']):.3f} "
        f"(difference {difference['value']:+.3f}; 95 %: {difference['interval'][0]:+.3f} to "
        f"{difference['interval'][1]:+.3f}); goal: at most {goal:g} either way."
    )
    seeds = _over_seeds(within.get("seeds", {}).get("difference"), "{:+.3f}")
    if within["protocol"].get("subjects", FEWEST) < FEWEST:
        return Verdict(question, NOT_MEASURED, _too_few(within["protocol"]["subjects"]) + said)
    return Verdict(question, judged(difference["interval"], -goal, goal), said + seeds)


def conditions(fidelity: Metrics | None, goal: float | None) -> list[Verdict]:
    """Do generated images show what was asked for? A verdict a covariate and instrument."""
    if not fidelity:
        why = "There is no instrument that measures a covariate in an image (data.instrument)."
        return [Verdict("Do generated images show what was asked for?", NOT_MEASURED, why)]
    return [_condition(name, entry, goal) for name, entry in fidelity.items()]


def _condition(name: str, entry: Metrics, goal: float | None) -> Verdict:
    by = f" (measured by the {entry['instrument']})" if "instrument" in entry else ""
    question = f"Do generated images show the {entry.get('covariate', name)} that was asked for?{by}"
    share = entry.get("share")
    said = _levels(entry) if entry.get("kind") == "categorical" else _values(entry)
    if goal is None:
        return Verdict(question, NOT_MEASURED, f"No goal is set. {said}")
    if not entry.get("trained_on_split", True):
        return Verdict(question, NOT_MEASURED, f"{OTHER_SPLIT} {said}")
    if share is None:
        why = "The share of the agreement on real images is not known: the instrument does not read it from real images"
        return Verdict(question, NOT_MEASURED, f"{why}, or this evaluation is older than the measure. {said}")
    reached = (
        f"{share['value']:.0%} of the agreement on real images is reached "
        f"{_interval(share['interval'], percent=True)}; goal: at least {goal:.0%}. "
    )
    if share.get("subjects", FEWEST) < FEWEST:
        return Verdict(question, NOT_MEASURED, _too_few(share["subjects"]) + reached + said)
    seeds = entry.get("seeds", {})
    return Verdict(
        question,
        judged(share["interval"], low=goal),
        reached + said + _over_seeds(seeds.get("r") or seeds.get("accuracy"), "{:.3f}"),
    )


def _values(entry: Metrics) -> str:
    real, samples = entry["instrument_on_held_out"], entry["samples"]
    return (
        f"Measured against asked in {samples['n']} generated images: r = {samples['r']:.3f}, slope "
        f"{samples['slope']:.2f}, mean error {number(samples['mae'])} {entry['unit']}; measured against the truth in "
        f"{real['n']} real held-out images: r = {real['r']:.3f}, slope {real['slope']:.2f}, mean error "
        f"{number(real['mae'])} {entry['unit']}."
    )


def _levels(entry: Metrics) -> str:
    real, samples = entry["instrument_on_held_out"], entry["samples"]
    return (
        f"{percent(samples)} of {samples['n']} generated images show the level that was asked for; in "
        f"{percent(real)} of {real['n']} held-out images the instrument finds the true one."
    )


def copying(audit: Metrics | None, sampling: Metrics | None = None) -> Verdict:
    """Are generated images copies of training images? What ``ldm audit`` found of images that were drawn alike.

    Args:
        audit: content of ``audit.json``, if there is one.
        sampling: options that the evaluated images were drawn with; None where that is not known.
    """
    question = "Are generated images free of copies of training images?"
    if audit is None:
        return Verdict(question, NOT_MEASURED, "No audit stands beside this report (ldm audit).")
    differing = audit_differs(audit, sampling)
    if differing:
        text = (
            "The audit of this model is of images that were, or may have been, drawn otherwise than those of this "
            f"report ({differing}). Run ldm audit with the same sampling settings."
        )
        return Verdict(question, NOT_MEASURED, text)
    statement = str(audit.get("statement", "")) or "The audit makes no statement."
    if audit.get("passed") is None or audit.get("verdict") == INCONCLUSIVE:
        return Verdict(question, NOT_MEASURED, statement)
    return Verdict(question, MET if audit["passed"] else MISSED, statement)


def audit_differs(audit: Metrics, sampling: Metrics | None) -> str | None:
    """In words how an audit's images were drawn otherwise than those of an evaluation; None where they were not."""
    return None if sampling is None else drawn_otherwise(audit.get("protocol", {}).get("sampling"), sampling)


def overall(found: list[Verdict]) -> str:
    """How many goals are met, missed, undecided and not measured, in one sentence."""
    counts = {status: sum(one.status == status for one in found) for status in (MET, MISSED, UNDECIDED, NOT_MEASURED)}
    parts = [f"{count} {status}" for status, count in counts.items() if count]
    return f"Of {len(found)} goals: {', '.join(parts)}."


def percent(share: Metrics) -> str:
    """A share of agreement with its interval."""
    low, high = share["interval"]
    return f"{share['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})"


def number(value: float) -> str:
    """A number with at least three figures: 12,345 or 0.0123."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _no_ratio(row: Metrics, goal: float | None) -> str:
    if goal is None:
        return "No goal is set."
    ratio = row.get("frechet_ratio")
    if ratio is None:
        return "Real held-out images have no distance that others could be compared with."
    return f"The ratio to real images is {number(ratio)}, but this evaluation is older than its interval."


def _too_few(subjects: int) -> str:
    return f"There are {subjects} held-out subjects, whose interval says too little of others ({FEWEST} would do). "


def _method(distances: Metrics) -> str:
    protocol = distances["protocol"]
    method = protocol.get("frechet_ratio", {}).get("method", "")
    if method.startswith("extrapolated"):
        return f"(Fréchet distances {method}, from {protocol['n']}.)"
    return f"(Fréchet distances of {protocol['n']} images each: with fewer images any ratio would be nearer 1.)"


def _over_seeds(spread: Metrics | None, form: str = "{:.3g}") -> str:
    if not spread:
        return ""
    mean, std = form.format(spread["mean"]), form.format(spread["std"]).lstrip("+")
    return f" Over {len(spread['values'])} seeds: mean {mean}, standard deviation {std}."


def _interval(interval: tuple[float, float], percent: bool = False) -> str:
    low, high = (f"{end:.0%}" if percent else number(end) for end in interval)
    return f"(95 %: {low} to {high})"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
