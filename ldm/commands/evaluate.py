"""``ldm evaluate``: samples at the covariates of held-out subjects, measured, and a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.commands.held_out import held_out_set, model_cohort, read_sample
from ldm.commands.run import check_counts, plain, section
from ldm.commands.sample import draw, load_model, sampling_options
from ldm.commands.sampler_table import CONFIGURED, draw_samplers, read_samplers, sampler_table
from ldm.commands.stages import record_inputs
from ldm.data.draft import Record
from ldm.errors import LdmError
from ldm.evaluation import masks
from ldm.evaluation.audit_report import NEAREST
from ldm.evaluation.distances import model_distances
from ldm.evaluation.diversity import REAL, RECONSTRUCTED, SAMPLES, nearest_pairs, spread, within_sets
from ldm.evaluation.features import check_features, find_features
from ldm.evaluation.fidelity import ImageSet, fidelity
from ldm.evaluation.folders import folder_distances
from ldm.evaluation.goals import check_goals
from ldm.evaluation.instruments import Instrument, find_instruments, instrument_hashes, merged
from ldm.evaluation.masks import mask_dice, mask_segmenter
from ldm.evaluation.pictures import pictures
from ldm.evaluation.reconstruction import quality, reconstructions
from ldm.evaluation.report import write_folder_report, write_report
from ldm.evaluation.sweep import Axis, measure_sweep, read_sweep
from ldm.files import read_json, write_json
from ldm.model.file import read_header
from ldm.model.generative import Generative
from ldm.model.output import image_paths, sample_name
from ldm.training import figures

logger = logging.getLogger(__name__)

MASK_ROWS = {
    "samples": masks.SAMPLES,
    "held-out images": masks.HELD_OUT,
    "reconstructions": masks.REBUILT,
    "chance": masks.CHANCE,
}


def run(config: DictConfig) -> dict[str, Any]:
    """Evaluate a model against the held-out subjects of its cohort; returns what ``metrics.json`` holds.

    With ``real`` and ``synthetic``, two folders of images, no model is needed.
    """
    if config.real is not None or config.synthetic is not None:
        return compare_folders(config)
    check_counts(config, "n", "pairs", "batch_size", "sweep_n", "n_ref", *(["repeats"] if config.repeats != 0 else []))
    folder, seeds, goals = Path(config.run_dir), generation_seeds(config), check_goals(section(config, "goals"))
    model, path = load_model(config)
    if model.classes is not None:
        raise LdmError(
            f"{path} generates label maps; measure them with ldm segment evaluate=true, see ldm segment --help."
        )
    datamodule = model_cohort(config, model, path)
    network = find_features(section(config, "features"), model.device, model.preprocessing)
    if network is not None:
        check_features(network, model.preprocessing, datamodule.cohort.name, datamodule.cohort.split_hash)
    instruments = find_instruments(
        plain(config.data).get("instrument"),
        datamodule.preprocessing,
        datamodule.schema,
        datamodule.cohort.split_hash,
    )
    samplers = read_samplers(config, model, seeds[0])
    axes = read_sweep(plain(config.sweep), config.sweep_others, model.schema, datamodule.cohort.split("train"))
    real, records = held_out_set(datamodule, model.preprocessing.channels, config.n)
    samples, further = generated(model, path, config, real, records, seeds)
    once = samples.first(config.n)  # the others repeat covariates
    inputs = record_inputs(model.header.get("conditioners", {}), [records[i % len(real)] for i in range(config.n)])
    drawn_otherwise = draw_samplers(samplers, model, path, once, inputs)
    value_range = model.preprocessing.value_range or (float(real.images[0].min()), float(real.images[0].max()))
    rebuilt = reconstructions(model, real.images, real.rows, value_range) if model.reconstructs else None
    repeated = len(samples) - config.n
    metrics: dict[str, Any] = {
        "model_sha256": model.header["tensors_sha256"],
        "model": describe_model(model, config),
        "cohort": datamodule.cohort.name,
        "simulated": model.header.get("simulated", False),
        "split_sha256": datamodule.cohort.split_hash,
        "goals": goals,
        "n": {"held_out": len(real), "samples": config.n, "repeats": repeated},
        "seeds": seeds,
        "reconstruction": None if rebuilt is None else quality(real.images, rebuilt, value_range, records),
        "diversity": diversity(model, real, rebuilt, samples.images, config.n, repeated, value_range),
        "ms_ssim": within(real, rebuilt, once, further, value_range, config),
    }
    if instruments:
        sections = plain(config.data).get("instrument")
        metrics["instruments"] = {"data.instrument": sections, "sha256": instrument_hashes(sections)}
        metrics["fidelity"] = fidelity(instruments, model.schema, real, samples, folder / "figures", further)
    if "mask" in model.header.get("conditioners", {}):
        subjects = [i % len(real) for i in range(config.n)]
        metrics["mask_dice"] = mask_agreement(config, model, records, real.images, rebuilt, once.images, subjects)
    if axes:
        metrics["sweep"] = sweeps(axes, model, path, config, instruments, value_range)
    if network is not None:
        more = {seed: one.images for seed, one in further.items()}
        metrics["distances"] = model_distances(
            network,
            model,
            datamodule,
            real.images,
            rebuilt,
            once.images,
            config.n_ref,
            config.seed,
            more,
            real.subjects,
            {name: one.images for name, one in drawn_otherwise.items()},
        )
    if samplers:
        rows = (metrics.get("distances") or {}).get("rows", {})
        everything = {CONFIGURED: config, **samplers}, {CONFIGURED: once, **drawn_otherwise}
        metrics["samplers"] = sampler_table(*everything, model, merged(instruments), inputs, rows)
    pictures(model, real, samples, folder / "figures", value_range)
    keep_curves(model, config, folder / "figures")
    keep_audit(model, config, folder)
    metrics = {name: value for name, value in metrics.items() if value is not None}
    write_json(folder / "metrics.json", metrics)
    logger.info("Report: %s", write_report(folder))
    return metrics


def generated(
    model: Generative,
    path: Path,
    config: DictConfig,
    real: ImageSet,
    records: Sequence[Record],
    seeds: Sequence[int],
) -> tuple[ImageSet, dict[int, ImageSet]]:
    """``n`` samples of every seed, asked with the covariates of held-out subjects in turn.

    Returns:
        Those of the first seed, and behind them ``repeats`` more with the covariates of the first subjects; and seed ->
        those of the others.
    """
    folder = Path(config.run_dir)
    numbers = [i % len(real) for i in range(config.n)] + list(range(min(config.repeats, len(real), config.n)))
    asked = [dict(real.rows[i]) for i in numbers]
    whose = [real.subjects[i] for i in numbers]
    inputs = record_inputs(model.header.get("conditioners", {}), [records[i] for i in numbers])
    first, *others = seeds
    samples = ImageSet(drawn(model, path, folder / "samples", asked, config, inputs, first), asked, whose)
    asked, whose = asked[: config.n], whose[: config.n]
    inputs = {name: values[: config.n] for name, values in inputs.items()}
    further = {
        seed: ImageSet(drawn(model, path, folder / f"samples_seed{seed}", asked, config, inputs, seed), asked, whose)
        for seed in others
    }
    return samples, further


def generation_seeds(config: DictConfig) -> list[int]:
    """Seeds of the noise that samples are drawn with: ``seeds``, or ``seed`` alone.

    Raises:
        LdmError: no list of different whole numbers.
    """
    seeds = plain(config.seeds)
    seeds = [config.seed] if seeds is None else seeds
    legal = isinstance(seeds, list) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not legal or not seeds or len(set(seeds)) < len(seeds):
        raise LdmError(f"seeds is {seeds}; legal: a list of different whole numbers, e.g. [0,1,2].")
    return seeds


def drawn(
    model: Generative,
    path: Path,
    folder: Path,
    asked: Sequence[Mapping[str, Any]],
    config: DictConfig,
    inputs: Mapping[str, Sequence[Any]] | None = None,
    seed: int | None = None,
) -> list[np.ndarray]:
    """Samples ``(C, *S)`` of one seed, written to ``folder`` (those that are there are kept) and read again."""
    draw(model, path, folder, asked, config if seed is None else OmegaConf.merge(config, {"seed": seed}), inputs)
    return [read_sample(model, image_paths(model, folder, sample_name(i))) for i in range(len(asked))]


def compare_folders(config: DictConfig) -> dict[str, Any]:
    """Distances of two folders of images, in ``metrics.json`` and ``report.html``; returns what the former holds.

    Raises:
        LdmError: one folder is not given, or there are no feature weights.
    """
    for name in ("real", "synthetic"):
        if config[name] is None:
            raise LdmError(f"{name}=DIR is missing: real and synthetic are two folders of images.")
    network = find_features(section(config, "features"), "cuda" if torch.cuda.is_available() else "cpu")
    if network is None:
        given = section(config, "features").get("path")
        raise LdmError(f"features.path={given}: without it two folders cannot be compared.")
    folder, real, synthetic = Path(config.run_dir), Path(config.real), Path(config.synthetic)
    distances = folder_distances(network, real, synthetic, config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"real": str(real), "synthetic": str(synthetic), "distances": distances}
    write_json(folder / "metrics.json", metrics)
    goal = check_goals(section(config, "goals"))["frechet_ratio"]
    logger.info("Report: %s", write_folder_report(folder / "report.html", real, synthetic, distances, goal))
    return metrics


def diversity(
    model: Generative,
    real: ImageSet,
    rebuilt: Sequence[np.ndarray] | None,
    samples: Sequence[np.ndarray],
    n: int,
    repeated: int,
    value_range: tuple[float, float],
) -> dict[str, Any]:
    """Spread of real subjects with like covariates, of samples asked as these, and of samples at the same covariates.

    The same subjects after reconstruction stand between: noise and fine detail that the first stage does not keep
    make real images differ, and no sample can have them. Sample i was asked as subject i, so the first three rows
    compare the same pairs of covariates.
    """
    result = {}
    asked = min(n, len(real))
    pairs = nearest_pairs(model.schema, real.rows[:asked], real.subjects[:asked])
    if pairs:
        result["real, nearest covariates"] = spread(real.images, pairs, value_range)
        if rebuilt is not None:
            result["the same, reconstructed"] = spread(rebuilt, pairs, value_range)
        result["samples asked as these"] = spread(samples, pairs, value_range)
    if repeated:
        same = [(i, n + i) for i in range(repeated)]
        result["samples, same covariates"] = spread(samples, same, value_range)
    return result


def within(
    real: ImageSet,
    rebuilt: Sequence[np.ndarray] | None,
    samples: ImageSet,
    further: Mapping[int, ImageSet],
    value_range: tuple[float, float],
    config: DictConfig,
) -> dict[str, Any] | None:
    """MS-SSIM within as many real images, reconstructions and samples; image i of each belongs to subject i.

    See :func:`ldm.evaluation.diversity.within_sets`.
    """
    n = min(len(real), len(samples))
    reconstructed = {} if rebuilt is None else {RECONSTRUCTED: rebuilt[:n]}
    sets = {REAL: real.images[:n], **reconstructed, SAMPLES: samples.images[:n]}
    more = {seed: one.images[:n] for seed, one in further.items()}
    return within_sets(sets, real.subjects[:n], value_range, config.pairs, config.seed, more)


def sweeps(
    axes: Sequence[Axis],
    model: Generative,
    path: Path,
    config: DictConfig,
    instruments: Mapping[str, Instrument],
    value_range: tuple[float, float],
) -> dict[str, Any]:
    """Covariate -> what :func:`ldm.evaluation.sweep.measure_sweep` gives.

    Every value has a folder of its own, so that number k of each starts from the same noise.
    """
    folder, result = Path(config.run_dir), {}
    for axis in axes:
        name = axis.covariate.name
        images = [
            drawn(model, path, folder / f"sweep/{name}/{float(value)!r}", [axis.row(value)] * config.sweep_n, config)
            for value in axis.values
        ]
        shown = {"value_range": value_range, "rgb": model.preprocessing.is_rgb}
        result[name] = measure_sweep(axis, images, instruments, folder / "figures", **shown)
        if not result[name]["measured"]:
            logger.warning("sweep.%s: no instrument measures it; the report only shows the images.", name)
    return result


def mask_agreement(
    config: DictConfig,
    model: Generative,
    records: Sequence[Record],
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray] | None,
    samples: Sequence[np.ndarray],
    subjects: Sequence[int],
) -> dict[str, Any]:
    """Dice of the label maps that samples were given with those found in them; ``left_out`` says why there is none."""
    try:
        if any(record.labels is None for record in records):
            raise LdmError("held-out subjects have no label map that could be asked for; set data.labels.")
        classes, recipe = model.network.conditioners["mask"].classes, model.preprocessing
        segmenter, path = mask_segmenter(plain(config.data).get("instrument"), classes, recipe)
    except LdmError as error:
        logger.warning("No Dice of asked and found label maps: %s", error)
        return {"left_out": str(error)}
    asked = [recipe.read_labels(record.labels) for record in records]  # (*S) each
    found = mask_dice(segmenter, asked, real, rebuilt, samples, subjects, config.seed)
    for label, rows in found["labels"].items():
        shown = {name: f"{rows[row]['mean']:.3f}" for name, row in MASK_ROWS.items() if rows.get(row, {}).get("n")}
        logger.info("Dice of %s: %s.", label, ", ".join(f"{name} {mean}" for name, mean in shown.items()))
    return {**found, "segmenter_sha256": read_header(path)["tensors_sha256"]}


def keep_curves(model: Generative, config: DictConfig, folder: Path) -> None:
    """Copy the curves that trainings left beside their models into the figures of the evaluation."""
    trained = {"curves_model.png": config.model}
    if hasattr(model, "first_stage"):
        trained["curves_first_stage.png"] = config.first_stage
    for name, path in trained.items():
        picture = Path(path).parent / "figures" / "curves.png"
        if picture.is_file():
            figures.copy(picture, folder / name)


def keep_audit(model: Generative, config: DictConfig, folder: Path) -> None:
    """Copy what ``ldm audit`` found of the same model, if it was run, so that the report has it; never another's.

    The pictures of the nearest pairs, which show training scans, come along only with ``audit_pictures``.
    """
    if config.audit is None or not Path(config.audit).is_file():
        return
    content = read_json(Path(config.audit), "an audit")
    if content.get("model_sha256") == model.header["tensors_sha256"]:
        keep_nearest(Path(config.audit).parent, folder, config.audit_pictures)
        write_json(folder / "audit.json", content)
    else:
        logger.warning("%s is not of this model (ldm audit): it is not in the report.", config.audit)


def keep_nearest(source: Path, folder: Path, wanted: bool) -> None:
    """Have an audit's pictures in the figures of the evaluation, or not; where both are in one folder leave them."""
    if source.resolve() == folder.resolve():
        return
    for picture in (folder / "figures").glob(NEAREST.format("*")):
        picture.unlink()
    for picture in source.glob(f"figures/{NEAREST.format('*')}") if wanted else ():
        figures.copy(picture, folder / "figures" / picture.name)


def describe_model(model: Generative, config: DictConfig) -> dict[str, Any]:
    """What the report says of the model, and how it was sampled."""
    sampling = {**vars(model.defaults), **sampling_options(config)}
    return {
        "kind": model.what,
        "parameters": f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.1f} M",
        "latent": "x".join(map(str, model.latent_shape)),
        "condition": model.condition_in_words(),
        "sampling": ", ".join(f"{k} {v}" for k, v in sampling.items() if v is not None) or "one network call",
        "steps": model.header.get("steps", "unknown"),
    }
