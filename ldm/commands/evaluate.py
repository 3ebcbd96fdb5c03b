"""``ldm evaluate``: samples at the covariates of held-out subjects, measured, and a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.commands.evaluation_images import Images, Setup, checked, drawn, drawn_images
from ldm.commands.run import plain, section
from ldm.commands.sample import sampling_options
from ldm.commands.sampler_table import CONFIGURED, sampler_table
from ldm.errors import LdmError
from ldm.evaluation import masks
from ldm.evaluation.audit_report import NEAREST
from ldm.evaluation.distances import blurred, model_distances
from ldm.evaluation.diversity import REAL, RECONSTRUCTED, SAMPLES, nearest_pairs, spread, within_sets
from ldm.evaluation.features import find_features
from ldm.evaluation.fidelity import fidelity
from ldm.evaluation.folders import folder_distances, folder_likeness
from ldm.evaluation.goals import audit_differs, check_goals
from ldm.evaluation.instruments import instrument_hashes, merged
from ldm.evaluation.masks import mask_dice, mask_segmenter
from ldm.evaluation.pictures import pictures
from ldm.evaluation.report import write_folder_report, write_report
from ldm.evaluation.sweep import measure_sweep
from ldm.files import read_json, write_json
from ldm.model.file import package_versions, read_header
from ldm.model.generative import Generative
from ldm.model.output import as_written
from ldm.training import figures

logger = logging.getLogger(__name__)

MASK_ROWS = {
    "samples": masks.OF_SAMPLES,
    "held-out images": masks.OF_HELD_OUT,
    "reconstructions": masks.REBUILT,
    "chance": masks.CHANCE,
}


def run(config: DictConfig) -> dict[str, Any]:
    """Evaluate a model against the held-out subjects of its cohort; returns what ``metrics.json`` holds.

    With ``real`` and ``synthetic``, two folders of images, no model is needed.
    """
    if config.real is not None or config.synthetic is not None:
        return compare_folders(config)
    setup = checked(config)
    images = drawn_images(setup)
    metrics = {**facts(setup, images), **measured(setup, images)}
    metrics = {name: value for name, value in metrics.items() if value is not None}
    pictures(setup.model, images.real, images.samples, setup.folder / "figures", images.value_range)
    keep_curves(setup.model, config, setup.folder / "figures")
    keep_audit(metrics, config, setup.folder)
    write_json(setup.folder / "metrics.json", metrics)
    logger.info("Report: %s", write_report(setup.folder))
    return metrics


def facts(setup: Setup, images: Images) -> dict[str, Any]:
    """What was evaluated, on what, and how."""
    config, header, cohort = setup.config, setup.model.header, setup.datamodule.cohort
    return {
        "model_sha256": header["tensors_sha256"],
        "model": describe_model(setup.model, config),
        "sampling": vars(setup.model.settings(sampling_options(config))),
        "cohort": cohort.name,
        "simulated": header.get("simulated", False),
        "split_sha256": cohort.split_hash,
        "goals": setup.goals,
        "n": {"held_out": len(images.real), "samples": config.n, "repeats": len(images.samples) - config.n},
        "seeds": setup.seeds,
        "versions": package_versions(),
    }


def measured(setup: Setup, images: Images) -> dict[str, Any]:
    """Everything that is measured; None where there is nothing to measure it with."""
    real, model = images.real, setup.model
    metrics: dict[str, Any] = {
        "reconstruction": images.reconstruction,
        "diversity": diversity(setup, images),
        "ms_ssim": within(setup, images),
    }
    if setup.instruments:
        sections = plain(setup.config.data).get("instrument")
        metrics["instruments"] = {"data.instrument": sections, "sha256": instrument_hashes(sections)}
        drawn_sets = images.samples, setup.folder / "figures", images.further
        metrics["fidelity"] = fidelity(setup.instruments, model.schema, real, *drawn_sets)
    if "mask" in model.header.get("conditioners", {}):
        metrics["mask_dice"] = mask_agreement(setup, images)
    if setup.axes:
        metrics["sweep"] = sweeps(setup, images.value_range)
    if setup.network is not None:
        metrics["distances"] = distances(setup, images)
    if setup.samplers:
        rows = (metrics.get("distances") or {}).get("rows", {})
        settings = {CONFIGURED: setup.config, **setup.samplers}
        sets = {CONFIGURED: images.once, **images.otherwise}
        metrics["samplers"] = sampler_table(settings, sets, model, merged(setup.instruments), images.inputs, rows)
    return metrics


def compare_folders(config: DictConfig) -> dict[str, Any]:
    """Distances of two folders of images, likeness within each, and mosaics; returns what ``metrics.json`` holds.

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
    likeness = folder_likeness(network, real, synthetic, folder / "figures", config.pairs, config.seed)
    metrics = {
        "real": str(real),
        "synthetic": str(synthetic),
        "goals": check_goals(section(config, "goals")),
        "distances": distances,
        **({} if likeness is None else {"ms_ssim": likeness}),
    }
    write_json(folder / "metrics.json", metrics)
    logger.info("Report: %s", write_folder_report(folder))
    return metrics


def diversity(setup: Setup, images: Images) -> dict[str, Any]:
    """Spread of real subjects with like covariates, of samples asked as these, and of samples at the same covariates.

    The same subjects after reconstruction stand between: noise and fine detail that the first stage does not keep
    make real images differ, and no sample can have them. Sample i was asked as subject i, so the first three rows
    compare the same pairs of covariates.
    """
    real, samples, value_range, n = images.real, images.samples.images, images.value_range, setup.config.n
    asked, result = min(n, len(real)), {}
    pairs = nearest_pairs(setup.model.schema, real.rows[:asked], real.subjects[:asked])
    if pairs:
        result["real, nearest covariates"] = spread(real.images, pairs, value_range)
        if images.rebuilt is not None:
            result["the same, reconstructed"] = spread(images.rebuilt, pairs, value_range)
        result["samples asked as these"] = spread(samples, pairs, value_range)
    if len(samples) > n:
        same = [(i - n, i) for i in range(n, len(samples))]
        result["samples, same covariates"] = spread(samples, same, value_range)
    return result


def within(setup: Setup, images: Images) -> dict[str, Any] | None:
    """MS-SSIM within as many real images, reconstructions and samples; image i of each belongs to subject i.

    See :func:`ldm.evaluation.diversity.within_sets`.
    """
    n = min(len(images.real), len(images.once))
    reconstructed = {} if images.rebuilt is None else {RECONSTRUCTED: images.rebuilt[:n]}
    sets = {REAL: images.real.images[:n], **reconstructed, SAMPLES: images.once.images[:n]}
    more = {seed: one.images[:n] for seed, one in images.further.items()}
    pairs, seed = setup.config.pairs, setup.config.seed
    return within_sets(sets, images.real.subjects[:n], images.value_range, pairs, seed, more)


def distances(setup: Setup, images: Images) -> dict[str, Any] | None:
    """See :func:`ldm.evaluation.distances.model_distances`."""
    recipe = setup.model.preprocessing
    return model_distances(
        setup.network,
        setup.model,
        setup.datamodule,
        images.real.images,
        images.rebuilt,
        images.once.images,
        control=(as_written(recipe, blurred(image)) for image in images.loaded),
        n_ref=setup.config.n_ref,
        seed=setup.config.seed,
        further={seed: one.images for seed, one in images.further.items()},
        subjects=images.real.subjects,
        others={name: one.images for name, one in images.otherwise.items()},
    )


def sweeps(setup: Setup, value_range: tuple[float, float]) -> dict[str, Any]:
    """Covariate -> what :func:`ldm.evaluation.sweep.measure_sweep` gives.

    Every value has a folder of its own, so that number k of each starts from the same noise.
    """
    result, count = {}, setup.config.sweep_n
    for axis in setup.axes:
        name = axis.covariate.name
        folders = [setup.folder / f"sweep/{name}/{float(value)!r}" for value in axis.values]
        images = [
            drawn(setup, folder, [axis.row(value)] * count) for folder, value in zip(folders, axis.values, strict=True)
        ]
        shown = {"value_range": value_range, "rgb": setup.model.preprocessing.is_rgb}
        result[name] = measure_sweep(axis, images, setup.instruments, setup.folder / "figures", **shown)
        if not result[name]["measured"]:
            logger.warning("sweep.%s: no instrument measures it; the report only shows the images.", name)
    return result


def mask_agreement(setup: Setup, images: Images) -> dict[str, Any]:
    """Dice of the label maps that samples were given with those found in them; ``left_out`` says why there is none."""
    recipe, config = setup.model.preprocessing, setup.config
    try:
        if any(record.labels is None for record in images.records):
            raise LdmError("held-out subjects have no label map that could be asked for; set data.labels.")
        classes = setup.model.network.conditioners["mask"].classes
        segmenter, path = mask_segmenter(plain(config.data).get("instrument"), classes, recipe)
    except LdmError as error:
        logger.warning("No Dice of asked and found label maps: %s", error)
        return {"left_out": str(error)}
    maps = [recipe.read_labels(record.labels) for record in images.records]  # (*S) each
    asked = [i % len(images.real) for i in range(config.n)]
    sets = images.real.images, images.rebuilt, images.once.images
    found = mask_dice(segmenter, maps, *sets, asked, images.real.subjects, config.seed)
    for label, rows in found["labels"].items():
        shown = {name: f"{rows[row]['mean']:.3f}" for name, row in MASK_ROWS.items() if rows.get(row, {}).get("n")}
        logger.info("Dice of %s: %s.", label, ", ".join(f"{name} {mean}" for name, mean in shown.items()))
    same = segmenter.facts.get("split_sha256") == setup.datamodule.cohort.split_hash
    return {**found, "segmenter_sha256": read_header(path)["tensors_sha256"], "trained_on_split": same}


def keep_curves(model: Generative, config: DictConfig, folder: Path) -> None:
    """Copy the curves that trainings left beside their models into the figures of the evaluation.

    Those of ``config.first_stage`` only where it is the first stage of this model.
    """
    trained, path = {"curves_model.png": config.model}, Path(config.first_stage)
    ours = model.header.get("first_stage_sha256")
    if ours is not None and path.is_file() and read_header(path)["tensors_sha256"] == ours:
        trained["curves_first_stage.png"] = path
    for name, path in trained.items():
        picture = Path(path).parent / "figures" / "curves.png"
        if picture.is_file():
            figures.copy(picture, folder / name)


def keep_audit(metrics: Mapping[str, Any], config: DictConfig, folder: Path) -> None:
    """Copy what ``ldm audit`` found of the same model, if it was run, so that the report has it; never another's.

    One of images that were drawn with other sampling settings comes along too, for the report to say so. The pictures
    of the nearest pairs, which show training scans, come along only with ``audit_pictures``.

    Args:
        metrics: what was evaluated: ``model_sha256`` and ``sampling``.
        config: names the audit.
        folder: of the evaluation.
    """
    if config.audit is None or not Path(config.audit).is_file():
        return
    content = read_json(Path(config.audit), "an audit")
    if content.get("model_sha256") != metrics["model_sha256"]:
        logger.warning("%s is not of this model (ldm audit): it is not in the report.", config.audit)
        return
    differing = audit_differs(content, metrics["sampling"])
    if differing:
        logger.warning("%s is of images that were drawn otherwise: %s.", config.audit, differing)
    keep_nearest(Path(config.audit).parent, folder, config.audit_pictures and not differing)
    write_json(folder / "audit.json", content)


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
