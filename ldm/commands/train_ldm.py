"""``ldm train-ldm``: encode the cohort once, then train the diffusion model on the latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.commands.control import adopt, control_facts, first_stage_of, frozen_model
from ldm.commands.ema import SNAPSHOTS
from ldm.commands.nulls import check_nulls, lacking, learned_nulls
from ldm.commands.posteriors import (
    load_first_stage,
    pixel_space,
    posterior_cache,
    same_cohort,
    same_preprocessing,
    same_split,
)
from ldm.commands.run import plain, write_config
from ldm.commands.stages import cohort_datamodule, loggers, prepared, record_inputs
from ldm.commands.target import LABELS, Target, asked_conditioners, check_target, find_target
from ldm.conditioning.base import COVARIATES
from ldm.conditioning.build import as_control, complete, with_defaults
from ldm.conditioning.pretrained import load_encoder
from ldm.data.datamodule import CohortDataModule
from ldm.data.labels import LabelClasses
from ldm.diffusion.checks import check_count
from ldm.diffusion.process import check_process, schedule_from_dict
from ldm.errors import LdmError
from ldm.evaluation.instruments import find_instruments, merged, quick_sections
from ldm.evaluation.pictures import evenly
from ldm.latents.cache import PosteriorCache
from ldm.latents.space import LatentSpace
from ldm.model.build import PIXELS, construct
from ldm.model.file import read_header
from ldm.model.first_stage import FirstStage
from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions
from ldm.model.transfer import start_from
from ldm.networks.denoiser import loses_means
from ldm.training.data import LatentDataModule
from ldm.training.ema import EMA
from ldm.training.fit import check_trainer, fit
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.panels import FigureCallback, SamplePanels
from ldm.training.segmentation_panels import LabelledImage, SegmentationPanels
from ldm.training.snapshots import EMASnapshots, PosthocEMA

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Train the second stage and write ``model.safetensors``; returns the final validation metrics."""
    run_dir = Path(config.run_dir)
    check_trainer(plain(config.trainer))
    check_target(config)
    frozen = frozen_model(config)
    check_diffusion({**plain(config.ldm), "conditioners": asked_conditioners(config)})
    in_pixels = config.vae.network.kind == PIXELS
    first_stage = first_stage_of(frozen) if frozen else None if in_pixels else load_first_stage(config)
    datamodule = prepared(cohort_datamodule(config))
    target = find_target(config, datamodule)
    first_stage = first_stage or pixel_space(target.preprocessing)
    conditioners = describe_conditioners(config, datamodule, first_stage, frozen)
    same_preprocessing(first_stage, target.preprocessing)
    same_cohort(first_stage, datamodule.cohort, target.classes, config.first_stage)
    for name, path in (("init_from", config.ldm.init_from), ("control.model", config.ldm.control.model)):
        if path:
            same_split(read_header(Path(path)), datamodule.cohort, f"ldm.{name}={path}")
    train, valid = (
        posterior_cache(config, datamodule, first_stage, split, conditioners, target) for split in ("train", "valid")
    )
    if frozen is not None:
        adopt(frozen, (train, valid), datamodule.schema)
    model = build_model(config, datamodule, first_stage, train, conditioners, target, frozen)
    check_nulls(model, valid.covariates)
    if config.ldm.init_from and not (run_dir / "last.ckpt").is_file():
        start_from(model, config.ldm.init_from)
    ldm = plain(config.ldm)
    posthoc = posthoc_ema(ldm)
    widths = () if posthoc.every is None else posthoc.sigma_rels
    module = LatentDiffusion(
        model, ldm["optimizer"], ldm["loss"], ldm["ema_decays"], config.trainer.log_every, config.seed, widths
    )
    snapshots = [EMASnapshots(run_dir / SNAPSHOTS, module.power_ema, posthoc.every)] if widths else []

    def save_model(metrics: Mapping[str, float]) -> None:
        model.header |= {"metrics": dict(metrics), "steps": module.step}
        save_averages(model, module.ema, run_dir)

    metrics = fit(
        module,
        LatentDataModule(train, valid, datamodule.cohort, config.ldm.batch_size, config.seed),
        plain(config.trainer),
        run_dir,
        run_identity(model, train, ldm, widths),
        save_model,
        label=f"{datamodule.cohort.name} ldm",
        monitor="ldm/val/loss",
        loggers=loggers(config),
        accepted=partial(write_config, config, run_dir),
        callbacks=[panels(config, datamodule, run_dir, conditioners, target), *snapshots],
    )
    logger.info("Validation loss %.4f. Model: %s", metrics["ldm/val/loss"], run_dir / "model.safetensors")
    return metrics


def run_identity(
    model: LatentDiffusionModel, train: PosteriorCache, ldm: Mapping[str, Any], widths: Sequence[float]
) -> dict[str, Any]:
    """What a resume checkpoint has to agree with; ``widths`` are those of the power-function averages."""
    header = model.header
    encoder = header["conditioners"].get("text", {}).get("encoder")
    return {
        "denoiser": header["denoiser"],
        "condition": header["condition"],
        **({"conditioners": ldm["conditioners"]} if header["conditioners"] else {}),
        **({"target": header["target"], "labels": model.classes.meaning} if "target" in header else {}),
        **({"text_encoder_sha256": encoder["sha256"]} if encoder else {}),
        **({"control": header["control"]} if "control" in header else {}),
        "schedule": header["schedule"],
        "prediction_type": model.prediction_type,
        "learned_variance": model.learned_variance,
        "ema_decays": ldm["ema_decays"],
        **({"posthoc_ema.sigma_rels": list(widths)} if widths else {}),
        "first_stage_sha256": header["first_stage_sha256"],
        "split_sha256": header["split_sha256"],
        "covariates": list(model.schema.to_dict().items()),  # their order and ranges are what the codes mean
        "latents": train.folder.name,  # by its key: the statistics that scale latents are of this very cache
    }


def save_averages(model: LatentDiffusionModel, ema: EMA, folder: Path) -> None:
    """Write ``model.safetensors``, and ``model-ema<decay>.safetensors`` of every decay after the first."""
    for index, (decay, network) in enumerate(zip(ema.decays, ema.averages, strict=True)):
        model.network, model.header["ema_decay"] = network, decay
        model.save(folder / (f"model-ema{decay}.safetensors" if index else "model.safetensors"))
    model.network, model.header["ema_decay"] = ema.module, ema.decays[0]


def check_diffusion(ldm: Mapping[str, Any]) -> None:
    """Refuse what the diffusion section asks for in vain, before anything is read or encoded.

    Raises:
        LdmError: an unknown name, a number outside its range, or two settings that exclude each other.
    """
    check_process(schedule_from_dict(ldm["schedule"]), ldm["prediction_type"], ldm["learned_variance"])
    posthoc_ema(ldm)
    with_defaults(ldm["conditioners"])
    check_choosing(ldm)
    sampling = construct(SamplingOptions, ldm["sampling"], "ldm.sampling")
    if (sampling.options or {}).get("variance") == "learned" and not ldm["learned_variance"]:
        raise LdmError("ldm.sampling.options.variance=learned needs ldm.learned_variance=true; or use small or large.")


def check_choosing(ldm: Mapping[str, Any]) -> None:
    """Refuse ``ldm.patience`` and ``ldm.keep_best`` where no Dice is measured by which they could choose.

    Raises:
        LdmError: images are generated, or none are drawn at validations.
    """
    if ldm["patience"] is not None:
        check_count("ldm.patience", ldm["patience"])
    asked = [f"ldm.{name}" for name in ("patience", "keep_best") if ldm[name]]
    if asked and ldm["target"] != LABELS:
        raise LdmError(f"{asked[0]} looks at the Dice of held-out images: it needs ldm.target=labels.")
    if asked and ldm["val_samples"] < 1:
        raise LdmError(f"{asked[0]} looks at the Dice of held-out images: it needs ldm.val_samples of 1 or more.")


def posthoc_ema(ldm: Mapping[str, Any]) -> PosthocEMA:
    """``ldm.posthoc_ema``, checked."""
    return construct(PosthocEMA, ldm["posthoc_ema"], "ldm.posthoc_ema")


def describe_conditioners(
    config: DictConfig,
    datamodule: CohortDataModule,
    first_stage: FirstStage,
    frozen: LatentDiffusionModel | None = None,
) -> dict[str, dict[str, Any]]:
    """``ldm.conditioners`` with what the cohort adds, as it is stored with the model; behind those of a frozen one.

    Raises:
        LdmError: a setting that is not legal or that the cohort does not allow.
    """
    cohort, asked = datamodule.cohort, asked_conditioners(config)
    if ("mask" in asked or config.ldm.latents.labels) and not all(record.labels for record in cohort.records):
        raise LdmError(
            "ldm.conditioners.mask and ldm.latents.labels need a label map for every image; set data.labels."
        )
    conditioners = complete(
        asked,
        datamodule.schema,
        plain(config.data)["label_names"],
        cohort.channels,
        first_stage.network.downsampling_factor,
        datamodule.dataset("all").label_values() if "mask" in asked else (),
        all_given=config.ldm.target == LABELS,
    )
    if "image" in conditioners and cohort.channels != datamodule.preprocessing.channels:
        raise LdmError("ldm.conditioners.image needs a file for each channel in data.image, e.g. {T1: ..., T2: ...}.")
    return conditioners if frozen is None else {**frozen.header.get("conditioners", {}), **as_control(conditioners)}


def sampling_defaults(sampling: Mapping[str, Any], target: Target, first_stage: FirstStage) -> dict[str, Any]:
    """``ldm.sampling``; without ``clip`` where label maps are generated in latents, which masks do not bound."""
    if target.classes is None or first_stage.config["kind"] == PIXELS:
        return dict(sampling)
    options = {name: value for name, value in (sampling["options"] or {}).items() if name != "clip"}
    return {**sampling, "options": options or None}


def build_model(
    config: DictConfig,
    datamodule: CohortDataModule,
    first_stage: FirstStage,
    train: PosteriorCache,
    conditioners: Mapping[str, Any],
    target: Target,
    frozen: LatentDiffusionModel | None = None,
) -> LatentDiffusionModel:
    """An untrained model for this cohort, with its latent statistics fitted; or an untrained control on ``frozen``.

    Masks in pixel space are not scaled: they stay in [-1, 1].
    """
    ldm = plain(config.ldm)
    header: dict[str, Any] = {
        "cohort": datamodule.cohort.name,
        "simulated": config.data.simulate is not None,
        "split_sha256": datamodule.cohort.split_hash,
        "first_stage": dict(first_stage.config),
        "first_stage_sha256": first_stage.sha256,
        "latent_shape": list(train.latent_shape),
        "denoiser": ldm["network"],
        "condition": ldm["condition"],
        "conditioners": dict(conditioners),
        "schedule": ldm["schedule"],
        "prediction_type": ldm["prediction_type"],
        "learned_variance": ldm["learned_variance"],
        "loss": ldm["loss"],
        "sampling": sampling_defaults(ldm["sampling"], target, first_stage),
        "metrics": {},
        "seed": config.seed,
    }
    if target.classes is not None:
        header |= {"target": target.facts, "input_preprocessing": datamodule.preprocessing.to_dict()}
    as_it_is = target.classes is not None and first_stage.config["kind"] == PIXELS
    torch.manual_seed(config.seed)
    if frozen is None:
        schema = datamodule.schema
        distribution = datamodule.cohort.distribution() if len(schema) else None
        space = LatentSpace.identity(len(target.classes.names)) if as_it_is else train.fit_space()
        model = LatentDiffusionModel(header, space, target.preprocessing, schema, distribution, first_stage.network)
        model.header["learned_nulls"] = learned_nulls(ldm["condition"], conditioners, lacking(model, train.covariates))
        model.header["learned_null"] = not model.unlearned
        fit_conditioners(model, train, ldm["conditioners"])
        warn_of_lost_means(ldm["network"])
    else:
        model = LatentDiffusionModel(
            {**header, **control_facts(frozen)},
            frozen.latent_space,
            target.preprocessing,
            frozen.schema,
            frozen.distribution,
            first_stage.network,
        )
        model.network.start_control(frozen.network)
    if "text" in model.network.conditioners:
        expect_short_captions(model, train)
    log_size(model)
    return model


def warn_of_lost_means(network: Mapping[str, Any]) -> None:
    """Say that fewer groups would be better; see :func:`ldm.networks.denoiser.loses_means`."""
    width, groups = network["channels"][0], network["norm_num_groups"]
    if loses_means(network["channels"], groups):
        logger.warning(
            "ldm.network.norm_num_groups=%d leaves one channel a group of the %d at the first level: the mean of every "
            "feature is lost, and predictions of noise are off by it. Four channels a group would be %d groups.",
            groups,
            width,
            max(1, width // 4),
        )


def fit_conditioners(model: LatentDiffusionModel, train: PosteriorCache, asked: Mapping[str, Any]) -> None:
    """What conditioners take from the training split, and from where they were trained."""
    conditioners = model.network.conditioners
    if COVARIATES in conditioners:
        conditioners[COVARIATES].fit(torch.from_numpy(train.covariates))
    folder = (asked.get("text") or {}).get("encoder")
    if folder is not None:
        load_encoder(conditioners["text"].encoder, folder, "ldm.conditioners.text.encoder")


def log_size(model: LatentDiffusionModel) -> None:
    """Say how much there is to train, on what."""
    logger.info(
        "Denoiser: %.1f M parameters to train on latents of %s; condition: %s.",
        sum(p.numel() for p in model.network.parameters() if p.requires_grad) / 1e6,
        "x".join(map(str, model.latent_shape)),
        model.condition_in_words(),
    )


def expect_short_captions(model: LatentDiffusionModel, train: PosteriorCache) -> None:
    """Write every caption once before training does, so that one that is too long stops here; logs the first.

    Raises:
        LdmError: naming the caption and its tokens.
    """
    text = model.network.conditioners["text"]
    rows = [model.schema.decode(vector) for vector in train.covariates]
    for row in rows:
        text.encode(None, row, ())
    logger.info("Captions such as: %s", text.caption(rows[0]))


def panels(
    config: DictConfig, datamodule: CohortDataModule, run_dir: Path, conditioners: Mapping[str, Any], target: Target
) -> FigureCallback:
    """Fixed-seed samples at covariates, label maps and images of held-out subjects, evenly from the table's.

    Of a model of label maps: ensembles on their images.
    """
    if target.classes is not None:
        return segmentation_panels(config, datamodule, run_dir, conditioners, target.classes)
    valid = datamodule.cohort.split("valid")
    records = [valid[case] for case in evenly(len(valid), config.ldm.val_samples)]
    inputs = record_inputs(conditioners, records)
    rows = [dict(record.covariates) for record in records]
    sections = quick_sections(plain(config.data).get("instrument"))
    found = find_instruments(sections, target.preprocessing, datamodule.schema)
    return SamplePanels(run_dir, rows, config.ldm.val_steps, merged(found), inputs)


def segmentation_panels(
    config: DictConfig,
    datamodule: CohortDataModule,
    run_dir: Path,
    conditioners: Mapping[str, Any],
    classes: LabelClasses,
) -> SegmentationPanels:
    """Few-step ensembles on held-out images, spread over the split, against their label maps."""
    dataset, given = datamodule.dataset("valid"), conditioners["image"]["channels"]
    channels = [datamodule.preprocessing.channels.index(name) for name in given]
    cases = []
    for case in evenly(len(dataset), config.ldm.val_samples):
        item = dataset[case]
        truth = classes.classes(item["labels"]).numpy()  # (*S)
        record = datamodule.cohort.records[item["index"]]
        cases.append(LabelledImage(record.id, record.subject, item["image"][channels].numpy(), truth))
    ldm = config.ldm
    return SegmentationPanels(run_dir, cases, ldm.val_members, ldm.val_steps, ldm.keep_best, ldm.patience)
