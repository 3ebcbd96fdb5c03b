"""One covariate asked from low to high with the noise fixed: does what is measured follow, and how far out?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from ldm.data.draft import Record
from ldm.data.schema import Covariate, CovariateSchema, outward
from ldm.errors import LdmError
from ldm.evaluation.agreement import correlations
from ldm.evaluation.instruments import Instrument
from ldm.training import figures
from ldm.training.panels import describe

OTHERS = (None, "mean")


@dataclass(frozen=True)
class Axis:
    """What is asked of one covariate, and where training images were.

    Attributes:
        covariate: which one.
        values: asked, in its unit, low to high.
        training: range of the training split, rounded outward so that no subject's own extreme is told.
        others: the other covariates of every row; those that are left out fall to their nulls.
    """

    covariate: Covariate
    values: tuple[float, ...]
    training: tuple[float, float]
    others: dict[str, Any]

    def row(self, value: float) -> dict[str, Any]:
        """The covariates that are asked for at one value."""
        return {**self.others, self.covariate.name: value}

    @property
    def outside(self) -> np.ndarray:
        """Which values lie outside the training range, ``(K,)``."""
        low, high = self.training
        return np.array([not low <= value <= high for value in self.values])


def read_sweep(
    sweep: Mapping[str, Any] | None,
    others: str | None,
    schema: CovariateSchema,
    records: Sequence[Record],
    learned_nulls: bool = True,
) -> list[Axis]:
    """What ``sweep={age: [30, 90, 7]}`` asks for: low, high and the number of values between and with them.

    Args:
        sweep: covariate -> ``[low, high, steps]``.
        others: None leaves the other covariates to their nulls, ``mean`` sets them to the mean, or the most frequent
            level, of the training split.
        schema: of the model.
        records: the training split.
        learned_nulls: whether the model can go without a covariate.

    Raises:
        LdmError: a covariate that is not there or has no order, values that are not three such numbers, or others that
            are left to nulls which the model never learned.
    """
    if others not in OTHERS:
        raise LdmError(f"sweep_others is {others!r}; legal: null, mean.")
    if sweep is not None and not isinstance(sweep, Mapping):
        raise LdmError(f"sweep is {sweep!r}; legal: a mapping, e.g. {{age: [30, 90, 7]}}.")
    axes = []
    for name, asked in (sweep or {}).items():
        covariate = schema[name]
        if covariate.kind != "continuous":
            raise LdmError(f"sweep.{name}: is {covariate.kind}; only a continuous covariate has a low and a high end.")
        given = [record.covariates[name] for record in records if record.covariates.get(name) is not None]
        fixed = _typical(schema, records) if others == "mean" else {}
        left_out = [other for other in schema.names if other not in {name, *fixed}]
        if left_out and not learned_nulls:
            raise LdmError(
                f"sweep.{name}: this model never learned to go without a covariate, and {', '.join(left_out)} would be "
                "left out with sweep_others=null. Legal: sweep_others=mean."
            )
        axes.append(Axis(covariate, _values(name, asked), outward([float(value) for value in given]), fixed))
    return axes


def _values(name: str, asked: Any) -> tuple[float, ...]:
    numbers = list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else []
    if len(numbers) == 3 and all(isinstance(number, int | float) for number in numbers):
        low, high, steps = numbers
        if low < high and steps == int(steps) and steps >= 2:
            return tuple(float(value) for value in np.linspace(low, high, int(steps)))
    raise LdmError(f"sweep.{name} is {asked}; legal: [low, high, steps] with low < high and 2 or more steps.")


def _typical(schema: CovariateSchema, records: Sequence[Record]) -> dict[str, Any]:
    typical = {}
    for covariate in schema:
        given = [record.covariates[covariate.name] for record in records]
        given = [value for value in given if value is not None]
        if given and covariate.kind == "continuous":
            typical[covariate.name] = float(np.mean([float(value) for value in given]))
        elif given:
            typical[covariate.name] = max(sorted(set(given), key=str), key=given.count)
    return typical


def measure_sweep(
    axis: Axis,
    images: Sequence[Sequence[np.ndarray]],
    instruments: Mapping[str, Instrument],
    folder: Path,
    **shown: Any,
) -> dict[str, Any]:
    """Measure the images of a sweep, and draw them and what was measured.

    Args:
        axis: what was asked.
        images: K values, each with S images ``(C, *S)`` of the same S noises.
        instruments: title -> instrument; those that do not measure the covariate are left aside.
        folder: where ``sweep_NAME.png`` and ``sweep_NAME_TITLE.png`` go.
        shown: how pictures are shown, see :func:`ldm.training.figures.mosaic`.

    Returns:
        ``unit``, ``training``, ``asked``, ``extrapolation``, ``others``; ``measured``: title -> a list a value, null
        where nothing could be measured; ``slope``: title -> ``inside`` and ``outside`` the training range, null where
        fewer than two values lie there.
    """
    name = axis.covariate.name
    marks = [" (extrapolation)" if outside else "" for outside in axis.outside]
    titles = [f"{describe({name: value})}{mark}" for value, mark in zip(axis.values, marks, strict=True)]
    rows = min(4, len(images[0]))
    strip = [one[noise] for noise in range(rows) for one in images]
    figures.mosaic(strip, folder / f"sweep_{name}.png", titles * rows, columns=len(images), **shown)
    measured = {}
    for title, instrument in instruments.items():
        found = [[instrument(image).get(name) for image in one] for one in track(images, f"{title}: sweep of {name}")]
        if found[0][0] is not None:
            measured[title] = np.array(found, np.float64)  # (K, S)
    for title, found in measured.items():
        unit = axis.covariate.unit or ""
        figures.sweep(axis.values, found, axis.training, name, unit, folder / f"sweep_{name}_{title}.png")
    return {
        "unit": axis.covariate.unit or "",
        "training": list(axis.training),
        "asked": list(axis.values),
        "extrapolation": axis.outside.tolist(),
        "others": axis.others,
        "measured": {title: [[_finite(v) for v in one] for one in found] for title, found in measured.items()},
        "slope": {
            title: {"inside": _slope(axis, found, ~axis.outside), "outside": _slope(axis, found, axis.outside)}
            for title, found in measured.items()
        },
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _slope(axis: Axis, found: np.ndarray, chosen: np.ndarray) -> float | None:
    asked, found = np.broadcast_to(np.array(axis.values)[:, None], found.shape)[chosen], found[chosen]
    known = np.isfinite(found)
    if len(set(asked[known])) < 2:
        return None
    return float(correlations(asked[known], found[known], np.ones((1, known.sum())))[1][0])
