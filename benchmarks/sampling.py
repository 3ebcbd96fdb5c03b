"""How few network calls are enough? Quality of every sampler against its calls, beside DDPM with all 1000 steps.

    python benchmarks/sampling.py run --model v=runs/mednist_ldm/mednist/ldm/model.safetensors \\
        --predictor runs/mednist_ldm/mednist/predictor/model.safetensors \\
        --cohort experiment=mednist_ldm/class_conditional --rows runs/mednist_ldm/sampling.jsonl --n 500 --seeds 0 1 2
    python benchmarks/sampling.py table --rows runs/mednist_ldm/sampling.jsonl --table sampling.md --plot sampling.png

`run` draws n samples for each model, sampler, timestep spacing, number of calls, guidance scale and seed, always for
the same covariates, which are those of the reference images, and from the same noise a seed. It writes one line of JSON
each: Frechet distance to the reference in the features of a trained predictor, network calls and wall seconds an image,
and how often the predicted class is the one asked for. Lines that are there are not measured again, so a run that was
stopped goes on. Frechet distances depend on n and on the reference: compare within one file only.

`table` reports mean and standard deviation over seeds, and the ratio to DDPM-1000 of the same model and guidance scale
(geometric mean over seeds, 95 % t interval, paired by seed): the spread of sampling noise, not of training.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy import stats
from tqdm import tqdm

from ldm.commands.held_out import held_out
from ldm.commands.main import conf_dir
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.data.datamodule import CohortDataModule
from ldm.diffusion.schedule import TIMESTEP_SPACINGS
from ldm.errors import LdmError
from ldm.metrics.frechet import frechet_distance
from ldm.model.file import read_header
from ldm.model.latent_diffusion import LatentDiffusionModel

MARK_STEPS = 1000
SAMPLERS = ("ddpm", "ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")
BATCH = 64  # of the predictor
OTHER_SPLIT = {"held_out": "train", "train": "held_out"}
TICKS = (5, 10, 15, 20, 30, 50, 100, 250)  # network calls in the plot

Row = dict[str, Any]

#: What a line of the file is a measurement of
MEASURED = ("model_sha256", "sampler", "options", "timestep_spacing", "steps", "guidance_scale", "seed")
#: What all lines of one file have in common, so that they can be compared
STUDY = ("predictor_sha256", "split_sha256", "reference", "n_reference", "n", "precision")


@dataclass(frozen=True)
class Configuration:
    """One way of sampling; `steps` are moves of the chain."""

    sampler: str
    options: Mapping[str, Any]
    steps: int
    timestep_spacing: str
    guidance_scale: float
    seed: int

    @property
    def is_mark(self) -> bool:
        """Whether it is the DDPM that all others are compared with."""
        return self.sampler == "ddpm" and not self.options and self.steps == MARK_STEPS


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, and asked as.

    Attributes:
        features: (N, F) of the reference images.
        asked: covariates of the n samples.
        study: the values of `STUDY`.
    """

    features: np.ndarray
    asked: list[Row]
    study: Row


def main() -> None:
    """Measure, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    run = verbs.add_parser("run", help="draw and measure; goes on where it stopped")
    run.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]PATH", help="may be given several times"
    )
    run.add_argument("--predictor", required=True, metavar="PATH", help="model file of ldm train-predictor")
    run.add_argument("--cohort", nargs="+", required=True, metavar="KEY=VALUE", help="settings that name the cohort")
    run.add_argument("--reference", choices=OTHER_SPLIT, default="held_out")
    run.add_argument("--rows", type=Path, required=True, help="the JSON lines file")
    run.add_argument("--n", type=int, default=500, help="samples a line")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--samplers", nargs="+", default=SAMPLERS, metavar="NAME[:OPTION=VALUE]", help="e.g. ddim:eta=0.5")
    run.add_argument("--calls", type=int, nargs="+", default=[5, 10, 15, 20, 30, 50], help="of all but ddpm")
    run.add_argument("--ddpm-calls", type=int, nargs="+", default=[250, 100, 50], help=f"beside the {MARK_STEPS}")
    run.add_argument(
        "--mark", action=argparse.BooleanOptionalAction, default=True, help=f"DDPM with all {MARK_STEPS} steps"
    )
    run.add_argument("--timestep-spacings", nargs="+", choices=TIMESTEP_SPACINGS, default=["trailing"])
    run.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0])
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--precision", choices=("auto", "bf16", "float32"), default="float32")
    run.set_defaults(function=measure_all)
    real = verbs.add_parser("floor", parents=[run], add_help=False, help="n real images of the other split instead")
    real.set_defaults(function=floor)
    table = verbs.add_parser("table", help="Markdown table and plot of the file")
    table.add_argument("--rows", type=Path, required=True)
    table.add_argument("--table", type=Path, help="Markdown file; printed without one")
    table.add_argument("--plot", type=Path, help="PNG file")
    table.set_defaults(function=report)
    arguments = parser.parse_args()
    try:
        arguments.function(arguments)
    except LdmError as error:
        raise SystemExit(f"error: {error}") from None


# --- measuring --------------------------------------------------------------------------------------


def measure_all(arguments: argparse.Namespace) -> None:
    """Every configuration of every model that the file does not hold yet; seed by seed, the mark first."""
    models = load_models(arguments.model)
    predictor, reference, _ = open_reference(arguments, models)
    rows = read_rows(arguments.rows)
    one_study([*rows, reference.study])
    todo = missing(rows, plan(arguments), models)
    print(f"{len(rows)} lines are there, {len(todo)} to be measured.")
    for name in {name for name, _ in todo}:  # the first call of a process is slow and not measured
        models[name].sample(reference.asked[:1], num_inference_steps=1)
    for name, configuration in tqdm(todo):
        row = measure(models[name], configuration, reference, predictor, arguments)
        append(arguments.rows, {"model": name, **row})


def floor(arguments: argparse.Namespace) -> None:
    """Print the distance of n real images of the other split, anew for every seed, with the classes as asked."""
    predictor, reference, datamodule = open_reference(arguments, load_models(arguments.model))
    images, rows = reference_images(datamodule, OTHER_SPLIT[arguments.reference], datamodule.preprocessing.channels)
    other, codes = features(predictor, images), datamodule.schema.encode_table(rows)
    distances = []
    for seed in arguments.seeds:
        shuffled = np.random.default_rng(seed).permutation(len(other))
        chosen = shuffled[spread_evenly(codes[shuffled], arguments.n)]
        distances.append(frechet_distance(other[chosen], reference.features))
    print(f"{np.mean(distances):.4g} +- {np.std(distances, ddof=1):.3g} over {len(distances)} draws of {arguments.n}")


def missing(
    rows: Sequence[Row], configurations: Iterable[Configuration], models: Mapping[str, LatentDiffusionModel]
) -> list[tuple[str, Configuration]]:
    """Models and configurations that no line is of, each once."""
    todo: dict[str, tuple[str, Configuration]] = {}
    for configuration, (name, model) in itertools.product(configurations, models.items()):
        line = {**described(configuration), "model_sha256": model.header["tensors_sha256"]}
        todo.setdefault(key(line), (name, configuration))
    done = {key(row) for row in rows}
    return [item for line, item in todo.items() if line not in done]


def load_models(given: Sequence[str]) -> dict[str, LatentDiffusionModel]:
    """Name -> model; without a name the folders of the path are one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {}
    for item in given:
        name, _, path = item.rpartition("=")
        name = name or str(Path(path).parent)
        if name in models:
            raise LdmError(f"--model: two models are called '{name}'. Name them: --model NAME=PATH.")
        models[name] = LatentDiffusionModel.load(path, device)
    return models


def open_reference(
    arguments: argparse.Namespace, models: Mapping[str, LatentDiffusionModel]
) -> tuple[Any, Reference, CohortDataModule]:
    """The predictor, the reference seen through it, and the cohort it is from.

    Raises:
        LdmError: a model was trained on another split, so that its training images could be the reference.
    """
    from ldm.model.predictor import Predictor

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("evaluate", arguments.cohort)
    datamodule = prepared(cohort_datamodule(config))
    for name, model in models.items():
        if model.header["split_sha256"] != datamodule.cohort.split_hash:
            raise LdmError(f"{name} was trained on another split than --cohort gives: {' '.join(arguments.cohort)}.")
    channels = next(iter(models.values())).preprocessing.channels
    images, rows = reference_images(datamodule, arguments.reference, channels)
    predictor = Predictor.load(arguments.predictor)
    study = {
        "predictor_sha256": read_header(arguments.predictor)["tensors_sha256"],
        "split_sha256": datamodule.cohort.split_hash,
        "reference": arguments.reference,
        "n_reference": len(images),
        "n": arguments.n,
        "precision": arguments.precision,
    }
    asked = [rows[k] for k in spread_evenly(datamodule.schema.encode_table(rows), arguments.n)]
    return predictor, Reference(features(predictor, images), asked, study), datamodule


def reference_images(datamodule: CohortDataModule, name: str, channels: Sequence[str]) -> tuple[np.ndarray, list[Row]]:
    """Images ``(N, C, H, W)`` that no stage was trained on, or those of the training split, and their covariates."""
    if name == "held_out":
        images, rows, _ = held_out(datamodule, channels)
        return np.stack(images), rows
    chosen, dataset = [datamodule.preprocessing.channels.index(one) for one in channels], datamodule.dataset("train")
    items = [dataset[position] for position in range(len(dataset))]
    rows = [dict(datamodule.cohort.records[item["index"]].covariates) for item in items]
    return np.stack([item["image"][chosen].float().numpy() for item in items]), rows


def spread_evenly(codes: np.ndarray, n: int) -> list[int]:
    """Numbers of ``n`` rows, evenly from all in the order of their codes ``(N, K)``: classes keep their shares."""
    order = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(len(codes))  # stable
    return [int(order[i * len(codes) // n]) for i in range(n)]


def plan(arguments: argparse.Namespace) -> Iterator[Configuration]:
    """Configurations: seed by seed, and for each guidance scale the mark before the others."""
    samplers = [read_sampler(text) for text in arguments.samplers]
    for seed, scale in itertools.product(arguments.seeds, arguments.guidance_scales):
        if arguments.mark:
            yield Configuration("ddpm", {}, MARK_STEPS, "trailing", scale, seed)
        for spacing, (name, options) in itertools.product(arguments.timestep_spacings, samplers):
            for calls in arguments.ddpm_calls if name == "ddpm" else arguments.calls:
                one = Configuration(name, options, steps_of(name, calls), spacing, scale, seed)
                if not one.is_mark:
                    yield one


def read_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """``ddim:eta=0.5`` as name and options."""
    name, *parts = text.split(":")
    options = {}
    for part in parts:
        option, _, value = part.partition("=")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        options[option] = value
    return name, options


def steps_of(sampler: str, calls: int) -> int:
    """Moves of the chain for at most so many network calls: `heun` makes two a move, but one in the last."""
    return (calls + 1) // 2 if sampler == "heun" else calls


def measure(
    model: LatentDiffusionModel,
    configuration: Configuration,
    reference: Reference,
    predictor: Any,
    arguments: argparse.Namespace,
) -> Row:
    """One line of the file."""

    options = described(configuration)
    with counted(model) as count:
        start = time.perf_counter()
        images = model.sample(
            reference.asked,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            num_inference_steps=options.pop("steps"),
            **options,
        ).images  # (n, C, H, W)
        seconds = time.perf_counter() - start
    return {
        **described(configuration),
        "model_sha256": model.header["tensors_sha256"],
        "prediction_type": model.prediction_type,
        **reference.study,
        "calls": count["calls"] // math.ceil(len(images) / arguments.batch_size),
        "evaluations": count["evaluations"] / len(images),  # with guidance a call evaluates several conditions
        "seconds_per_image": seconds / len(images),
        "frechet_distance": float(frechet_distance(features(predictor, images), reference.features)),
        "agreement": agreement(model, predictor, images, reference.asked),
        "batch_size": arguments.batch_size,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def described(configuration: Configuration) -> Row:
    """A configuration as the file holds it."""
    return {**vars(configuration), "options": dict(configuration.options)}


@contextlib.contextmanager
def counted(model: LatentDiffusionModel) -> Iterator[dict[str, int]]:
    """Counts calls of the network, and the samples in them, while it is open."""
    count = {"calls": 0, "evaluations": 0}

    def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        count["calls"] += 1
        count["evaluations"] += len(arguments[0])

    handle = model.network.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def features(predictor: Any, images: np.ndarray) -> np.ndarray:
    """(N, F) float32 of images ``(N, C, H, W)``."""
    parts = [torch.as_tensor(predictor.features(part)) for part in torch.from_numpy(images).split(BATCH)]
    return torch.cat(parts).cpu().numpy()


def agreement(
    model: LatentDiffusionModel, predictor: Any, images: np.ndarray, asked: Sequence[Row]
) -> dict[str, float]:
    """Share of samples whose most probable level is the one asked for, by covariate; empty without conditions."""
    if not len(model.network.conditioners):
        return {}
    parts = [predictor.predict(part) for part in torch.from_numpy(images).split(BATCH)]
    result = {}
    for name in model.schema.names:
        if model.schema[name].kind != "categorical" or name not in parts[0]:
            continue
        found = torch.cat([torch.as_tensor(part[name]) for part in parts]).argmax(1).tolist()
        levels = list(model.schema[name].levels)
        hits = [levels[k] == row[name] for k, row in zip(found, asked, strict=True) if row.get(name) is not None]
        result[name] = float(np.mean(hits))
    return result


# --- the file ---------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The lines of the file; the last one may have been cut off when a run was killed, and is removed then."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(whole)
        os.replace(temporary, path)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, row: Row) -> None:
    """Add one line, and see it on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def key(row: Row) -> str:
    """What a line is a measurement of."""
    return json.dumps([row[name] for name in MEASURED], sort_keys=True)


def one_study(rows: Sequence[Row]) -> None:
    """Refuse lines that cannot be compared.

    Raises:
        LdmError: naming what differs.
    """
    for name in STUDY:
        values = sorted({str(row[name]) for row in rows})
        if len(values) > 1:
            raise LdmError(f"The file holds another study: {name} is {' and '.join(values)}. Use one file for each.")


# --- the table --------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> None:
    """Write the table, and the plot if it is asked for."""
    rows = read_rows(arguments.rows)
    if not rows:
        raise LdmError(f"{arguments.rows} holds no measurement; make some with `sampling.py run`.")
    one_study(rows)
    groups = summarise(rows)
    text = markdown(groups) + note(rows[0])
    if arguments.table:
        arguments.table.write_text(text)
    else:
        print(text, end="")
    if arguments.plot:
        plot(groups, arguments.plot)


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row a configuration, over its seeds."""
    marks = {match(row): row["frechet_distance"] for row in rows if is_mark(row)}
    groups: dict[str, list[Row]] = {}
    names = ("model", "guidance_scale", "sampler", "options", "timestep_spacing", "steps")
    for row in rows:
        groups.setdefault(json.dumps([row[name] for name in names], sort_keys=True), []).append(row)
    return sorted((summary(group, marks) for group in groups.values()), key=place)


def summary(group: Sequence[Row], marks: Mapping[tuple[Any, ...], float]) -> Row:
    """Mean and standard deviation over the seeds of one configuration, and the ratio to the marks paired by seed."""
    first, distances = group[0], [row["frechet_distance"] for row in group]
    pairs = [(row["frechet_distance"], marks[match(row)]) for row in group if match(row) in marks]
    return {
        **{name: first[name] for name in ("model", "prediction_type", "guidance_scale", "timestep_spacing", "calls")},
        "sampler": sampler_name(first),
        "is_mark": is_mark(first),
        "seeds": len(group),
        "mean": float(np.mean(distances)),
        "std": float(np.std(distances, ddof=1)) if len(group) > 1 else None,
        "ratio": ratio(*zip(*pairs, strict=True)) if pairs and not is_mark(first) else None,
        "seconds_per_image": float(np.median([row["seconds_per_image"] for row in group])),
        "agreement": {name: float(np.mean([row["agreement"][name] for row in group])) for name in first["agreement"]},
    }


def match(row: Row) -> tuple[Any, ...]:
    """What a line has in common with its mark; the noise among it."""
    return row["model"], row["guidance_scale"], row["seed"]


def place(group: Row) -> tuple[Any, ...]:
    """Where a configuration stands in the table: by model and guidance scale, the mark first, most calls first."""
    mark = not group["is_mark"]
    return group["model"], group["guidance_scale"], mark, group["timestep_spacing"], group["sampler"], -group["calls"]


def is_mark(row: Row) -> bool:
    """Whether a line is of the DDPM that all others are compared with."""
    return row["sampler"] == "ddpm" and not row["options"] and row["steps"] == MARK_STEPS


def sampler_name(row: Row) -> str:
    """Sampler and options, as `read_sampler` reads them."""
    return ":".join([row["sampler"], *(f"{name}={value}" for name, value in sorted(row["options"].items()))])


def ratio(values: Sequence[float], marks: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of ``values / marks`` and its t interval, from the logarithms of the pairs.

    Returns:
        Ratio, lower and upper end; both ends are NaN for a single pair.
    """
    logs = np.log(np.asarray(values) / np.asarray(marks))  # (S,)
    if len(logs) == 1:
        return float(np.exp(logs[0])), math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return tuple(float(np.exp(logs.mean() + shift)) for shift in (0.0, -half, half))


def markdown(groups: Sequence[Row]) -> str:
    """The table; a column for each covariate whose predicted level is compared with the asked one."""
    covariates = sorted({name for group in groups for name in group["agreement"]})
    heads = [
        "model",
        "guidance",
        "sampler",
        "spacing",
        "calls",
        "Frechet distance",
        "ratio to DDPM-1000 (95 %)",
        "s an image",
    ]
    heads += [f"{name} as asked" for name in covariates]
    lines = [heads, ["---"] * len(heads)]
    for group in groups:
        spread = "" if group["std"] is None else f" +- {group['std']:.3g}"
        lines.append(
            [
                f"{group['model']} ({group['prediction_type']})",
                f"{group['guidance_scale']:g}",
                group["sampler"],
                group["timestep_spacing"],
                str(group["calls"]),
                f"{group['mean']:.4g}{spread} ({group['seeds']})",
                "1" if group["is_mark"] else ratio_text(group["ratio"]),
                f"{group['seconds_per_image']:.3g}",
                *(f"{group['agreement'][name]:.1%}" if name in group["agreement"] else "" for name in covariates),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def note(row: Row) -> str:
    """What all lines have in common, for below the table."""
    images = f"{row['n']} samples to {row['n_reference']} images ({row['reference']})"
    hashes = f"Predictor {row['predictor_sha256'][:16]}, split {row['split_sha256'][:16]}"
    return (
        f"\nFrechet distance of {images}, mean +- standard deviation over seeds (their number). {hashes}, "
        f"{row['device']}, {row['threads']} threads, {row['precision']}. A ratio is of the seeds that both lines "
        "have: one without an interval is of one seed, whose DDPM-1000 may be far from the mean of all.\n"
    )


def ratio_text(value: tuple[float, float, float] | None) -> str:
    """``1.05 (0.98 to 1.12)``; without ends for one seed, empty without a mark."""
    if value is None:
        return ""
    middle, low, high = value
    return f"{middle:.3f}" if math.isnan(low) else f"{middle:.3f} ({low:.3f} to {high:.3f})"


def plot(groups: Sequence[Row], path: Path) -> None:
    """Distance against calls and against seconds, a line of two panels for each model and guidance scale."""
    panels: dict[tuple[str, float], list[Row]] = {}
    for group in groups:
        panels.setdefault((group["model"], group["guidance_scale"]), []).append(group)
    figure = Figure(figsize=(10.4, 4 * len(panels)))
    axes = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    for line, ((model, scale), rows) in zip(axes, panels.items(), strict=True):
        for axis, measure in zip(line, ("calls", "seconds_per_image"), strict=True):
            draw_mark(axis, rows, measure)
            draw_curves(axis, [row for row in rows if not row["is_mark"]], measure)
            axis.set_title(f"{model}, guidance {scale:g}")
        scale_axes(*line, [row["calls"] for row in rows if not row["is_mark"]])
        line[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_mark(axis: Any, rows: Sequence[Row], measure: str) -> None:
    """DDPM with all steps: its distance as a band of one standard deviation, and a star at its seconds."""
    for mark in (row for row in rows if row["is_mark"]):
        width = mark["std"] or 0.0
        axis.axhline(mark["mean"], color="0.4", linewidth=1)
        axis.axhspan(mark["mean"] - width, mark["mean"] + width, color="0.85", label=f"DDPM-{MARK_STEPS}")
        if measure == "seconds_per_image":
            axis.plot(mark[measure], mark["mean"], marker="*", color="0.2", markersize=9)


def scale_axes(by_calls: Any, by_seconds: Any, calls: Sequence[int]) -> None:
    """All logarithmic, with numbers that are read at a glance."""
    for axis, label in ((by_calls, "network calls"), (by_seconds, "seconds an image")):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.minorticks_off()
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter("{x:g}")
    by_calls.set_ylabel("Frechet distance")
    by_calls.set_xticks([tick for tick in TICKS if calls and min(calls) <= tick <= max(calls)])


def draw_curves(axis: Any, rows: Sequence[Row], measure: str) -> None:
    """A colour a sampler, a line style a spacing: dotted, solid, dashed, dash-dotted, long dashes as listed."""
    styles = dict(zip(TIMESTEP_SPACINGS, (":", "-", "--", "-.", (0, (8, 2))), strict=True))
    colours = {name: f"C{i}" for i, name in enumerate(sorted({row["sampler"] for row in rows}))}
    for name, spacing in itertools.product(colours, styles):
        curve = [row for row in rows if (row["sampler"], row["timestep_spacing"]) == (name, spacing)]
        curve.sort(key=lambda row: row[measure])
        if curve:
            label = name if spacing == "trailing" else f"{name}, {spacing}"
            axis.errorbar(
                [row[measure] for row in curve],
                [row["mean"] for row in curve],
                [row["std"] or 0.0 for row in curve],
                color=colours[name], linestyle=styles[spacing], marker=".", linewidth=1, capsize=2, label=label,
            )  # fmt: skip


if __name__ == "__main__":
    main()
