"""The table of a cohort: real images, models, reconstructions and a control, all measured alike.

Every row has the same number of images, at the covariates of the same held-out subjects, seen through the same files,
features and instrument. What is costly about a row (its images and their features) is kept in a file of its own, under
the hash of all that it depends on, so that a table that was interrupted, or has a new row, measures only what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.schema import Covariate, CovariateSchema
from ldm.evaluation import goals
from ldm.evaluation.agreement import agreement, level_agreement
from ldm.evaluation.distances import over_seeds
from ldm.evaluation.diversity import nearest_pairs, spread
from ldm.evaluation.features import FeatureNetwork, extract
from ldm.evaluation.instruments import Instrument
from ldm.evaluation.repeats import spread_over_seeds
from ldm.model.file import package_versions, read_header, read_tensors, write_model

KIND = "comparison_row"
HEADINGS = (
    "Fréchet distance (95 %)",
    "of infinitely many images",
    "over the floor (95 %)",
    "KID (95 %)",
    "MMD (95 %)",
    "precision (95 %)",
    "recall (95 %)",
    "density (95 %)",
    "coverage (95 %)",
    "asked and measured",
    "MS-SSIM of like pairs",
    "seconds a sample",
)


def file_slug(name: str, key: str | None = None) -> str:
    """A name as that of a file, told from others by the hash of ``key``, or of itself."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}-{hashlib.sha256((key or name).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Row:
    """One set of images, measured.

    Attributes:
        features: ``(N, F)`` float64.
        facts: ``agreement``, ``spread`` and what else is known; JSON-safe.
    """

    features: np.ndarray
    facts: dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """What all rows of a table share.

    Attributes:
        network: in whose features distributions are compared.
        instruments: title -> what measures covariates in an image.
        schema: covariates of the cohort.
        rows: covariates of each image of a set, ``N`` of them, asked for or true.
        subjects: whose these are, one each.
        value_range: of the images.
        folder: where measured rows are kept.
        key: what all rows depend on; JSON-safe.
        of_another_split: titles of instruments that may know some of the held-out images.
    """

    network: FeatureNetwork
    instruments: Mapping[str, Instrument]
    schema: CovariateSchema
    rows: Sequence[Mapping[str, Any]]
    subjects: Sequence[str]
    value_range: tuple[float, float]
    folder: Path
    key: Mapping[str, Any]
    of_another_split: Sequence[str] = ()

    def file_name(self, name: str, key: Mapping[str, Any]) -> str:
        """A name for what belongs to a row, which no other row has and a row of another key neither."""
        text = json.dumps({**self.key, **key, "row": name}, sort_keys=True, default=str)
        return file_slug(name, text)

    def row(
        self,
        name: str,
        key: Mapping[str, Any],
        images: Callable[[], Sequence[np.ndarray]],
        covariates: bool = True,
        further: Callable[[], Mapping[str, Any]] = dict,
    ) -> Row:
        """Measure a set of images, or read what was measured before.

        Args:
            name: of the row.
            key: what the images depend on beside :attr:`key`.
            images: makes them, ``(C, *S)`` each, as many as :attr:`rows`.
            covariates: whether image i belongs to row i.
            further: makes further facts.
        """
        path = self.folder / f"{self.file_name(name, key)}.safetensors"
        if not path.is_file():
            drawn = list(images())
            facts = {**(self.facts(drawn) if covariates else {}), **further(), "versions": package_versions()}
            features = torch.from_numpy(extract(self.network, drawn))  # (N, F)
            write_model(path, {"features": features}, {"kind": KIND, "row": name, "facts": facts})
        return Row(read_tensors(path)["features"].numpy(), read_header(path, KIND)["facts"])

    def facts(self, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Whether the images show the covariates of their rows, and how far those of like covariates differ."""
        pairs = nearest_pairs(self.schema, self.rows, self.subjects)
        return {
            "agreement": agreements_of_all(self.instruments, self.schema, self.rows, images, self.subjects),
            "spread": spread(images, pairs, self.value_range) if pairs else None,
        }


def agreements_of_all(
    instruments: Mapping[str, Instrument],
    schema: CovariateSchema,
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[np.ndarray],
    subjects: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """:func:`agreements` of several instruments, each entry with its ``instrument``.

    A covariate that several measure is there once an instrument, from the second on as ``covariate (title)``.
    """
    result: dict[str, dict[str, Any]] = {}
    for title, instrument in instruments.items():
        for name, found in agreements(instrument, schema, rows, images, subjects).items():
            result[name if name not in result else f"{name} ({title})"] = {**found, "instrument": title}
    return result


def agreements(
    instrument: Instrument,
    schema: CovariateSchema,
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[np.ndarray],
    subjects: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Agreement of what rows say and what the instrument measures, by covariate; those that cannot be had are left out.

    See :func:`ldm.evaluation.agreement.agreement` and :func:`ldm.evaluation.agreement.level_agreement`.
    """
    measured = [instrument(image) for image in images]
    result = {}
    for name in measured[0]:
        if name in schema.names:
            pairs = [
                (row[name], values[name], subject)
                for row, values, subject in zip(rows, measured, subjects, strict=True)
                if row.get(name) is not None and (isinstance(values[name], str) or np.isfinite(values[name]))
            ]
            found = _agreement(schema[name], pairs)
            if found is not None:
                result[name] = {"kind": schema[name].kind, "unmeasurable": len(images) - len(pairs), **found}
    return result


def _agreement(covariate: Covariate, pairs: Sequence[tuple[Any, Any, str]]) -> dict[str, Any] | None:
    wanted, found, subjects = ([pair[k] for pair in pairs] for k in range(3))
    if covariate.kind == "categorical":
        levels = [covariate.levels[covariate.level_index(value)] for value in wanted]
        return level_agreement(levels, found, covariate.levels, subjects) if pairs else None
    wanted = [covariate.number(value) for value in wanted]
    if len(pairs) < 3 or np.ptp(wanted) == 0 or np.ptp(found) == 0:
        return None
    return agreement(wanted, found, subjects=subjects)


def over_models(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What of several trainings, such as of other seeds: metric -> ``values``, ``mean``, ``std``.

    Those of distances, ``ms_ssim`` of like pairs, and of each covariate its r or share of levels.
    """
    result = over_seeds(rows)
    if all(row.get("spread") for row in rows):
        result["ms_ssim"] = spread_over_seeds([row["spread"]["ms_ssim"]["mean"] for row in rows])
    for name, first in rows[0].get("agreement", {}).items():
        key = "accuracy" if first["kind"] == "categorical" else "r"
        if all(name in row.get("agreement", {}) for row in rows):
            result[f"{name} {key}"] = spread_over_seeds([row["agreement"][name][key] for row in rows])
    return result


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, with what the numbers depend on below it.

    Args:
        table: ``rows`` (name -> distances and facts) and the rest of :func:`ldm.evaluation.distances.compare`.
    """
    protocol, machines = dict(table["protocol"]), timed_on(table["rows"].values())
    if len(machines) == 1:
        protocol["seconds_a_sample"] = f"{protocol['seconds_a_sample']} on {machines[0]}"
    lines = [f"# {protocol['cohort']}: {protocol['n']} images a row", "", f"| | {' | '.join(HEADINGS)} |"]
    lines.append("|---|" + "---|" * len(HEADINGS))
    for name, row in table["rows"].items():
        mark = " (floor)" if name == table["floor"] else " (control)" if name in table["controls"] else ""
        lines.append(f"| {name}{mark} | {' | '.join(_cells(row, len(machines) > 1))} |")
    for name, metrics in table.get("several", {}).items():
        shown = [f"{metric} {one['mean']:.3g} ± {one['std']:.2g}" for metric, one in metrics.items()]
        count = len(next(iter(metrics.values()))["values"])
        lines += ["", f"{name}, mean ± standard deviation of {count} models: {'; '.join(shown)}."]
    lines += ["", "Every number depends on all of this; compare rows of this table, not tables.", ""]
    lines += [f"* {name}: {_in_words(value)}" for name, value in protocol.items() if name != "of_another_split"]
    lines += [
        "",
        *(f"* {name}: {_model_in_words(row)}" for name, row in table["rows"].items() if "model_sha256" in row),
    ]
    lines += _of_other_versions(table)
    if protocol.get("of_another_split"):
        lines += ["", f"{', '.join(protocol['of_another_split'])}: {goals.OTHER_SPLIT}"]
    for metric, names in table["untrusted"].items():
        lines += ["", f"{metric} cannot be trusted here: it does not rank {' and '.join(names)} below real images."]
    return "\n".join(lines) + "\n"


def _model_in_words(row: Mapping[str, Any]) -> str:
    """Which model a row is of, and how it was sampled."""
    sampling = ", ".join(f"{name} {_in_words(value)}" for name, value in row["sampling"].items() if value is not None)
    return f"{row['model_sha256'][:16]}, {row['steps']} steps; {sampling or 'one network call'}"


def _of_other_versions(table: Mapping[str, Any]) -> list[str]:
    """What is said of rows that other code than this measured, whose numbers were kept."""
    ours = table["protocol"].get("versions")
    kept = {name: row["versions"] for name, row in table["rows"].items() if row.get("versions", ours) != ours}
    return (
        ["", *(f"* {name} was measured by other versions: {_in_words(one)}" for name, one in kept.items())]
        if kept
        else []
    )


def timed_on(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What rows were timed on, each once: rows that were measured before may be from another machine."""
    return sorted({row["timed_on"] for row in rows if "timed_on" in row})


def _cells(row: Mapping[str, Any], several_machines: bool = False) -> list[str]:
    spread_of, seconds = row.get("spread"), row.get("seconds_a_sample")
    where = f" ({row['timed_on']})" if several_machines and "timed_on" in row else ""
    ratio, interval = row["frechet_ratio"], row["frechet_ratio_interval"]
    return [
        _with_interval(row["frechet"], row["frechet_interval"]),
        "n/a" if row["frechet_infinity"] is None else f"{row['frechet_infinity']:.3g}",
        "n/a" if ratio is None else _with_interval(ratio, interval),
        _with_interval(row["kid"], row["kid_interval"]),
        _with_interval(row["mmd"], row["mmd_interval"]),
        *(_share(row[name], row[f"{name}_interval"]) for name in ("precision", "recall", "density", "coverage")),
        "; ".join(_agreement_in_words(name, found) for name, found in row.get("agreement", {}).items()),
        "" if spread_of is None else f"{spread_of['ms_ssim']['mean']:.3f}",
        "" if seconds is None else f"{seconds:.3g}{where}",
    ]


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3g} ({interval[0]:.3g} to {interval[1]:.3g})"


def _share(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def _agreement_in_words(name: str, found: Mapping[str, Any]) -> str:
    if found["kind"] == "categorical":
        low, high = found["interval"]
        return f"{name} {found['accuracy']:.1%} ({low:.1%} to {high:.1%})"
    return f"{name} r {found['r']:.3f}, slope {found['slope']:.2f}"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return str(value)
