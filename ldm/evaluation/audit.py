"""Is a synthetic cohort a copy of the scans that its model was trained on?

Each synthetic image's nearest training scan says little alone: some held-out scans, which cannot be copies, also lie
near one. So held-out scans set the threshold, and the verdict is whether more synthetic images than held-out scans are
below it. Copies that are planted on purpose tell whether the audit would have seen any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ldm.errors import LdmError
from ldm.evaluation.audit_words import in_words
from ldm.evaluation.planted import KINDS, RECONSTRUCTED, plant
from ldm.evaluation.spaces import Space
from ldm.metrics import copies
from ldm.model.file import package_versions

PASSED, FAILED, INCONCLUSIVE = "passed", "not passed", "not conclusive"
WORST = 8  # pairs to look at, of each space
HALF = 0.5  # of the planted copies of a kind have to be outright ones, or outright copies of it are not spoken of
SAME = 1e-3  # of the nearest held-out scan's distance: nearer is the scan itself, but for rounding


@dataclass(frozen=True)
class Scans:
    """Real scans and whose they are.

    Attributes:
        images: each ``(C, *S)`` in the model's range; may be read when asked for.
        subjects: one a scan.
        names: one a scan, for messages.
    """

    images: Sequence[np.ndarray]
    subjects: Sequence[str]
    names: Sequence[str]

    def first(self) -> np.ndarray:
        """Positions of one scan a subject, the first: several of one subject are not independent."""
        return np.sort(np.unique(np.asarray(self.subjects), return_index=True)[1])


@dataclass(frozen=True)
class AuditSettings:
    """How an audit is made.

    Attributes:
        rate: share of held-out scans below the threshold.
        alpha: level of the test, over all spaces together.
        recall: share of each kind of planted copies that has to be below the threshold.
        planted: copies of each kind.
        seed: of planted copies and resamples.
    """

    rate: float = 0.05
    alpha: float = 0.05
    recall: float = 0.95
    planted: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "alpha", "recall"):
            if not 0 < getattr(self, name) < 1:
                raise LdmError(f"{name} is {getattr(self, name)}; legal: above 0 and below 1.")
        if self.planted < 1:
            raise LdmError(f"planted is {self.planted}; legal: 1 or more.")


@dataclass(frozen=True)
class Pair:
    """A synthetic image, its nearest training scan (both by position) and how far apart they are."""

    synthetic: int
    train: int
    distance: float
    copy: bool


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        verdict: ``passed``, ``not passed`` or ``not conclusive``.
        numbers: everything, JSON-safe.
        lines: what it says, in sentences.
        worst: space -> the nearest pairs.
    """

    verdict: str
    numbers: dict[str, Any]
    lines: list[str]
    worst: dict[str, list[Pair]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found by an audit that finds copies."""
        return self.verdict == PASSED

    def to_dict(self) -> dict[str, Any]:
        """What ``audit.json`` holds."""
        worst = {name: [asdict(pair) for pair in pairs] for name, pairs in self.worst.items()}
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "statement": self.lines[0],
            "lines": self.lines,
            "model_sha256": self.numbers["protocol"].get("model_sha256"),
            **self.numbers,
            "worst": worst,
        }


Watch = Callable[[Iterable[np.ndarray], str], Iterable[np.ndarray]]
Rebuild = Callable[[np.ndarray], np.ndarray]


def audit(
    synthetic: Sequence[np.ndarray],
    train: Scans,
    held_out: Scans,
    spaces: Sequence[Space],
    settings: AuditSettings | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    rebuild: Rebuild | None = None,
    subjects_linked: bool = True,
    protocol: Mapping[str, Any] | None = None,
    watch: Watch = lambda images, what: images,
) -> AuditResult:
    """Compare synthetic images with training scans, in each of some spaces.

    Args:
        synthetic: images ``(C, *S)`` in the model's range.
        train: the training split.
        held_out: scans that neither the model nor what the spaces are made of was trained on.
        spaces: see :func:`ldm.evaluation.spaces.audit_spaces`.
        settings: see :class:`AuditSettings`.
        value_range: black and white.
        rebuild: passes an image ``(C, *S)`` through the model's first stage, if there is one.
        subjects_linked: whether the cohort's table tells which scans are of one person.
        protocol: what is known beside the numbers.
        watch: wraps what takes long, e.g. in a progress bar.

    Raises:
        LdmError: there are no synthetic images, or fewer than 2 training or held-out subjects.
    """
    settings = settings or AuditSettings()
    check_subjects(train, held_out)
    if not len(synthetic):
        raise LdmError("An audit needs synthetic images; there are none.")
    n = {
        "synthetic": len(synthetic),
        "train": {"scans": len(train.images), "subjects": len(set(train.subjects))},
        "held_out": {"scans": len(held_out.images), "subjects": len(set(held_out.subjects))},
    }
    numbers, worst, flagged = {}, {}, {}
    for space in spaces:
        found = _Distances(space, synthetic, train, held_out, settings, value_range, rebuild, watch)
        numbers[space.name], worst[space.name], flagged[space.name] = _measure(found, settings, len(spaces))
        numbers[space.name]["words"] = space.words
    control = _control(numbers, settings.recall)
    result = {
        "n": n,
        "subjects_linked": subjects_linked,
        "differential_privacy": False,
        "control": control,
        "any_space": _any_space(list(flagged.values())),
        "spaces": numbers,
        "protocol": {
            **dict(protocol or {}),
            **asdict(settings),
            "value_range": list(value_range),
            "distance": "root mean square of differences; of embeddings and correlations, that of unit vectors",
            "test": "exact one-sided precedence test; alpha is shared by it, the bound of copies, and the spaces",
            "versions": package_versions(),
        },
    }
    verdict = _verdict(numbers, control)
    return AuditResult(verdict, result, in_words(verdict, result), worst)


def check_subjects(train: Scans, held_out: Scans) -> None:
    """Refuse splits that no audit can be made with.

    Raises:
        LdmError: fewer than 2 training or held-out subjects.
    """
    known, unseen = len(set(train.subjects)), len(set(held_out.subjects))
    if min(known, unseen) < 2:
        raise LdmError(
            f"An audit needs 2 subjects or more in the training split and as many held out; there are {known} and "
            f"{unseen}. See data.split."
        )


class _Distances:
    """All matrices of distances that the numbers of one space need."""

    def __init__(self, space, synthetic, train, held_out, settings, value_range, rebuild, watch: Watch) -> None:
        self.subjects, self.held_out_subjects = list(train.subjects), list(held_out.subjects)
        self.first = held_out.first()
        members, where = len(train.images), f" ({space.name})"
        known = space.vectors(watch(train.images, "training scans" + where))  # (M, F)
        unseen = space.vectors(watch(held_out.images, "held-out scans" + where))  # (H, F)
        scans = np.concatenate([known, unseen])  # (M + H, F)

        def nearness(images: Iterable[np.ndarray], what: str, reference: np.ndarray = known) -> np.ndarray:
            return copies.pairwise(space.all_variants(watch(images, what + where)), reference)

        both = nearness(synthetic, "synthetic images", scans)  # (N, M + H)
        self.synthetic, self.synthetic_to_unseen = both[:, :members], both[:, members:]
        both = nearness(held_out.images, "held-out scans among all", scans)  # (H, M + H)
        self.held_out, self.within_held_out = both[:, :members], both[:, members:]
        # only of scans that are some image's nearest: all variants of every training scan would take most of the time
        asked = np.unique(np.concatenate([self.synthetic.argmin(1), self.held_out[self.first].argmin(1)]))  # (K,)
        within = nearness((train.images[i] for i in asked), "nearest training scans among all")  # (K, M)
        self.to_others = copies.nearest_of_others(within, asked, self.subjects)  # (M,)
        self.rebuilt = None
        if rebuild is not None:
            self.rebuilt = nearness((rebuild(held_out.images[i]) for i in self.first), "reconstructions")
        self.sources, others = _sources(self.subjects, settings)
        self.planted = {}
        for kind in (*KINDS, *([RECONSTRUCTED] if rebuild else [])):
            images = plant(kind, train.images, self.sources, others, value_range, rebuild, settings.seed)
            self.planted[kind] = nearness(images, f"planted: {kind}")


def _sources(subjects: Sequence[str], settings: AuditSettings) -> tuple[list[int], list[int]]:
    """Positions of scans to copy, of different subjects while there are any, and of one of another subject to each."""
    rng, names = np.random.default_rng(settings.seed), np.asarray(subjects)
    first = rng.permutation(np.unique(names, return_index=True)[1])
    sources = [int(i) for i in first[: settings.planted]]
    others = [int(rng.choice(np.flatnonzero(names != names[source]))) for source in sources]
    return sources, others


def _measure(
    found: _Distances, settings: AuditSettings, spaces: int
) -> tuple[dict[str, Any], list[Pair], dict[str, np.ndarray]]:
    """Numbers of a space, its nearest pairs, and which of each set of images lie below its threshold."""
    held = found.held_out[found.first].min(1)  # (m,)
    threshold, k = copies.conformal_threshold(held, settings.rate)
    control = {kind: _planted_row(found, matrix, threshold) for kind, matrix in found.planted.items()}
    drawn = found.synthetic.min(1)  # (N,)
    rows = {"held-out scans": held, "synthetic images": drawn}
    if found.rebuilt is not None:
        rows["held-out scans, reconstructed"] = found.rebuilt.min(1)
    alpha = settings.alpha / (2 * spaces)  # either of the two tests, in any space, takes a pass away
    strict = _strict(found, control, held, len(drawn), settings, alpha)
    # An image at next to no distance is the scan itself, wherever the threshold is, unless this space tells none apart.
    copied = drawn <= (strict["threshold"] if strict["usable"] else SAME * held.min() if held.min() > 0 else -1.0)
    test = _excess(int((drawn <= threshold).sum()), len(drawn), k, len(held), alpha)
    seen = [row["recall"] for row in control.values() if row["recall"] >= settings.recall]
    numbers = {
        "threshold": threshold,
        "rate": k / (len(held) + 1),
        "rows": {name: _row(values, threshold) for name, values in rows.items()},
        "excess": test | {"p_value": min(1.0, 2 * spaces * test["p_value"])},
        "noticeable_share": _noticeable(test, len(drawn), k / (len(held) + 1), min(seen, default=0)),
        "copies": strict | _copies(found, copied),
        "control": control,
        "authenticity": {
            "synthetic images": copies.authenticity(found.synthetic, found.to_others),
            "held-out scans": copies.authenticity(found.held_out[found.first], found.to_others),
        },
        **_nearness(found, settings.seed),
    }
    order = np.argsort(drawn, kind="stable")[:WORST]
    pairs = [Pair(int(i), int(found.synthetic[i].argmin()), float(drawn[i]), bool(copied[i])) for i in order]
    return numbers, pairs, {name: values <= threshold for name, values in rows.items()}


def _any_space(flagged: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """How many images of each set lie below the threshold of at least one space.

    The held-out scans set these thresholds themselves. Their share is what looking in several spaces makes of the rate
    of one.
    """
    either = {name: np.any([space[name] for space in flagged], axis=0) for name in flagged[0]}
    return {
        name: {"n": len(some), "flagged": int(some.sum()), "share": float(some.mean())} for name, some in either.items()
    }


def _row(distances: np.ndarray, threshold: float) -> dict[str, Any]:
    flagged = int((distances <= threshold).sum())
    quartiles = [float(value) for value in np.percentile(distances, [0, 25, 50, 75])]
    return {"n": len(distances), "flagged": flagged, "share": flagged / len(distances), "quartiles": quartiles}


def _planted_row(found: _Distances, matrix: np.ndarray, threshold: float) -> dict[str, Any]:
    """How many copies of one kind are found, and how many of these beside the subject they were made of."""
    names = np.asarray(found.subjects)
    right = names[matrix.argmin(1)] == names[found.sources]
    nearest = matrix.min(1)
    return {
        "n": len(matrix),
        "recall": float((nearest <= threshold).mean()),
        "source_found": float(right.mean()),
        "distance_95_percent": float(np.percentile(nearest, 95)),
    }


def _strict(found: _Distances, control, held: np.ndarray, n: int, settings: AuditSettings, alpha: float) -> dict:
    """The threshold of outright copies: as near as planted copies are, and nearer than a further scan would ever be.

    The former is where 95 % of the planted copies lie, of those kinds that this space sees at all; the latter the
    nearest held-out scan and, as there may be many more synthetic images, a bound for the nearest of n. With few
    held-out scans that bound is so near that changed copies lie beyond it: ``told`` are the kinds of which it leaves
    at least half, and a space that tells none is not ``usable``.
    """
    seen = [kind for kind, row in control.items() if row["recall"] >= settings.recall]
    near = np.concatenate([found.planted[kind].min(1) for kind in seen]) if seen else np.array([])
    limits = {
        "nearest_held_out": float(held.min()),
        "nearest_of_n": copies.lower_prediction_bound(held, n, alpha),
        "reach_of_planted": float(np.percentile(near, 95)) if seen else None,
    }
    threshold = max(SAME * float(held.min()), min(limit for limit in limits.values() if limit is not None))
    recalls = {kind: float((matrix.min(1) <= threshold).mean()) for kind, matrix in found.planted.items()}
    told = [kind for kind, recall in recalls.items() if recall >= HALF and held.min() > 0]
    return {"usable": bool(told), "threshold": threshold, "recalls": recalls, "told": told, "kinds": seen, **limits}


def _copies(found: _Distances, copied: np.ndarray) -> dict[str, Any]:
    names = np.asarray(found.subjects)
    count, n = int(copied.sum()), len(copied)
    return {
        "count": count,
        "subjects": len(set(names[found.synthetic[copied].argmin(1)])) if count else 0,
        "share_at_most": copies.upper_bound(count, n),
        "confidence": copies.CONFIDENCE,
    }


def _excess(flagged: int, n: int, k: int, m: int, alpha: float) -> dict[str, Any]:
    p_value = copies.precedence_p_value(flagged, n, k, m)
    return {
        "p_value": p_value,
        "significant": p_value <= alpha,
        "critical_count": copies.critical_count(n, k, m, alpha),
        "k": k,
    }


def _noticeable(test: Mapping[str, Any], n: int, rate: float, recall: float) -> float | None:
    """Share of copies among n images from which on the expected number below the threshold is significant."""
    if test["critical_count"] is None or recall <= rate:
        return None
    share = (test["critical_count"] / n - rate) / (recall - rate)
    return float(np.clip(share, 0, 1)) if share <= 1 else None


def _nearness(found: _Distances, seed: int) -> dict[str, Any]:
    """Distance ratio and membership, each beside what held-out scans in the place of synthetic images give.

    Matcher and first stage were themselves trained on the training scans, so that without any copy neither number need
    be 1 or 0.5. For the floor, one half of the held-out subjects are the images, the other half the others.
    """
    who, members = np.asarray(found.held_out_subjects), found.subjects
    names = np.unique(who)
    ratios, aucs = [], []
    for draw in range(20):
        half = np.random.default_rng((seed, draw)).permutation(names)[: len(names) // 2]
        queries = np.isin(who, half)
        queries, others = np.intersect1d(np.flatnonzero(queries), found.first), np.flatnonzero(~queries)
        first = np.intersect1d(others, found.first)
        to_train, to_others = found.held_out[queries], found.within_held_out[queries]
        ratios.append(copies.distance_ratio(to_train, to_others[:, first], members, 10, seed))
        near = copies.smallest_by_subject(to_train.min(0), members)
        aucs.append(copies.auc(near, copies.smallest_by_subject(to_others[:, others].min(0), who[others])))
    near = copies.smallest_by_subject(found.synthetic.min(0), members)
    unseen = copies.smallest_by_subject(found.synthetic_to_unseen.min(0), who)
    ratio = copies.distance_ratio(found.synthetic, found.synthetic_to_unseen[:, found.first], members, seed=seed)
    return {
        "distance_ratio": {"synthetic images": ratio, "held-out scans": float(np.mean(ratios))},
        "membership": copies.membership(near, unseen, seed) | {"auc_of_held_out_scans": float(np.mean(aucs))},
    }


def _control(spaces: Mapping[str, Mapping[str, Any]], recall: float) -> dict[str, Any]:
    """What the audit as a whole would have noticed: a kind of copy that one space finds need not be found by others.

    Returns:
        ``kinds``: kind -> ``n``, the best ``recall`` of any space and that ``space``, and the same of the threshold of
        outright copies as ``strict_recall`` and ``strict_space`` (None where no space tells the kind); ``passed``:
        every kind is found; ``untold``: kinds that no space tells; ``noticeable_share`` of copies, of whichever kind
        shows last, and None if some kind never does.
    """
    kinds, shares = {}, []
    for kind in next(iter(spaces.values()))["control"]:
        rows = {name: space["control"][kind] for name, space in spaces.items()}
        best = max(rows, key=lambda name: rows[name]["recall"])
        kinds[kind] = {"n": rows[best]["n"], "recall": rows[best]["recall"], "space": best, **_strictest(spaces, kind)}
        seen = [spaces[name]["noticeable_share"] for name, row in rows.items() if row["recall"] >= recall]
        shares.append(min((share for share in seen if share is not None), default=None))
    return {
        "kinds": kinds,
        "passed": all(row["recall"] >= recall for row in kinds.values()),
        "untold": [kind for kind, row in kinds.items() if row["strict_space"] is None],
        "noticeable_share": None if None in shares else max(shares),
    }


def _strictest(spaces: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """How many planted copies of a kind are outright ones, in the space that tells them best."""
    recalls = {name: space["copies"]["recalls"][kind] for name, space in spaces.items()}
    telling = [name for name, space in spaces.items() if kind in space["copies"]["told"]]
    best = max(telling, key=recalls.__getitem__, default=None)
    return {"strict_recall": max(recalls.values()) if best is None else recalls[best], "strict_space": best}


def _verdict(spaces: Mapping[str, Mapping[str, Any]], control: Mapping[str, Any]) -> str:
    """``not passed`` if any space has an excess or an outright copy; a control that failed takes a pass away.

    So does a kind of copy that no space can tell from the nearest of so many unrelated scans: that there is no outright
    copy then says nothing.
    """
    if any(one["excess"]["significant"] or one["copies"]["count"] for one in spaces.values()):
        return FAILED
    proven = control["passed"] and not control["untold"] and control["noticeable_share"] is not None
    return PASSED if proven else INCONCLUSIVE
