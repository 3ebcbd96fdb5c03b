"""``ldm segment``: label maps of images from an ensemble, and what it is not sure of; measured where truth is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from rich.progress import Progress, track

from ldm.applications.cases import SUBJECT, gather, unit_of
from ldm.applications.segmentation import check_labels, in_order, segment
from ldm.applications.segmentation_evaluation import evaluate
from ldm.applications.segmentation_report import (
    METRICS,
    differences,
    expect_comparable,
    null_for_nan,
    read_others,
    report,
    verdict,
)
from ldm.applications.segmentation_sources import DiffusionSource, EnsembleSource, NetworkSource
from ldm.applications.slicing import cut_slices, expect_no_volume
from ldm.applications.stacking import stack_results
from ldm.commands.run import check_counts, plain, require_file, section
from ldm.commands.sample import asked_table, files_sha256, filled, sampling_options
from ldm.commands.stages import cohort_alone
from ldm.data.augmentation import Augmentation
from ldm.data.draft import SAFE_NAMES, Record, is_safe_name
from ldm.data.stored import split_reference
from ldm.errors import LdmError
from ldm.files import write_json
from ldm.model.file import read_header
from ldm.model.latent_diffusion import KIND as DIFFUSION
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.output import sample_name
from ldm.model.segmenter import KIND as NETWORK
from ldm.model.segmenter import Segmenter

logger = logging.getLogger(__name__)

SPLITS = ("test", "valid", "train", "all")


def run(config: DictConfig) -> Path:
    """Segment, write, and measure if asked to; returns the table of volumes."""
    check_counts(config, "batch_size", *([] if config.members is None else ["members"]))
    check_settings(config)
    source = find_source(config)
    others = read_others(config.beside or {}, source.facts["kind"]) if config.evaluate else {}
    if config.images is None:
        records = cohort_records(config, source)
    else:
        records = [in_order(record, source) for record in asked_records(config, source)]
        records = asked_slices(config, records, source.preprocessing.spatial_dims)
    if config.evaluate:
        for record in track(records, "checking label maps"):
            check_labels(record, source)
    gather(track(records, "checking images"), lambda record: source.preprocessing.load(record)[1])
    out = Path(config.run_dir)
    files = {str(split_reference(ref)[0]) for record in records for ref in record.images.values()}
    provenance = {"files_sha256": files_sha256({"image": sorted(files)})}
    with Progress() as bar:
        task = bar.add_task("segmenting", total=len(records))
        together = max(1, config.batch_size // source.facts["members"])
        table = segment(source, records, out, provenance, together, lambda count: bar.advance(task, count))
    logger.info("%d subjects are segmented in %s; volumes: %s", len(records), out, table)
    stacked = stack_results(out, records, source) if source.preprocessing.spatial_dims == 2 else None
    if stacked is not None:
        logger.info("The slices, put back into volumes: %s", stacked)
    if config.evaluate:
        measure(config, source, records, out, others)
    return table


def check_settings(config: DictConfig) -> None:
    """Refuse what would have no effect.

    Raises:
        LdmError: naming the setting and what it goes with.
    """
    for name, goes_with, given in (
        ("table", "images", config.images is not None),
        ("labels", "images", config.images is not None),
        ("slices", "images (of the cohort: data.slices)", config.images is not None),
        ("split", "the cohort", config.images is None),
    ):
        if config[name] is not None and not given:
            raise LdmError(f"{name} goes with {goes_with}, and has no meaning here; leave it out.")


def measure(
    config: DictConfig,
    source: EnsembleSource,
    records: Sequence[Record],
    out: Path,
    others: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ``metrics.json`` and ``report.html``, the other evaluations in the same table."""
    split = None if config.images is not None else config.split or records[0].split
    if split in ("train", "all"):
        logger.warning(
            "split=%s: the model was trained on some of these subjects; the numbers say so in `split`.", split
        )
    with Progress() as bar:
        task = bar.add_task("measuring", total=len({record.subject for record in records}))
        metrics = evaluate(source, records, out, split, config.seed, lambda count: bar.advance(task, count))
    expect_comparable(others, metrics)
    table = asked_table(config.table, "table")
    metrics["unit"] = unit_of(config.images is None or (table is not None and SUBJECT in table.columns))
    metrics["differences"] = differences(metrics, others)
    write_json(out / METRICS, null_for_nan(metrics))
    page = report(out, metrics, others)
    for line in verdict(metrics, others):
        logger.info("%s", line)
    logger.info("Report: %s", page)


def find_source(config: DictConfig) -> EnsembleSource:
    """The diffusion models, or the networks, of ``model``: one or several of a kind.

    Raises:
        LdmError: a file that is none of them.
    """
    several = isinstance(config.model, ListConfig)
    paths = [Path(path) for path in (config.model if several else [config.model])]
    if not paths:
        raise LdmError("model is an empty list; name a model file, or several of a kind.")
    headers = [read_header(require_file(path, "model", "train-ldm")) for path in paths]
    kinds = {header.get("kind") for header in headers}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kinds == {NETWORK}:
        for name in ("steps", "sampler", "eta", "timestep_spacing"):
            if config[name] is not None:
                raise LdmError(f"{name} is for diffusion models; {paths[0]} is a network of ldm train-segmenter.")
        sha256 = [header["tensors_sha256"] for header in headers]
        networks = [Segmenter.load(path, device) for path in paths]
        augmentation = asked_augmentation(config, networks[0].preprocessing.channels)
        return NetworkSource(networks, sha256, config.members, config.seed, augmentation)
    if kinds != {DIFFUSION}:
        raise LdmError(
            f"model={config.model}: legal are models of ldm train-ldm ldm=segmentation, or networks of ldm "
            "train-segmenter, one or several of one of the two kinds."
        )
    models = [LatentDiffusionModel.load(path, device) for path in paths]
    options = sampling_options(config)
    settings = config.members, config.seed, config.batch_size, config.precision
    given = headers[0]["conditioners"].get("image", {"channels": ()})["channels"]  # none of a model that draws images
    return DiffusionSource(models, *settings, options, asked_augmentation(config, given))


def asked_augmentation(config: DictConfig, channels: Sequence[str]) -> Augmentation | None:
    """``augment``: what members but the first see, of a model that is given images of these channels."""
    if config.augment is None:
        return None
    return Augmentation.from_config(section(config, "augment"), channels, "augment")


def asked_records(config: DictConfig, source: EnsembleSource) -> list[Record]:
    """The subjects of ``images``, named by the table's participant_id, or numbered.

    Raises:
        LdmError: a template without a table, a table or ``labels`` of another number, or a name that is not safe as a
            file name.
    """
    table = asked_table(config.table, "table")
    values = _as_list(filled("images", plain(config.images), table, "table"))
    if not values:
        raise LdmError("images is an empty list; legal: {NAME: file} of one subject, a list of such, or templates.")
    labels = [None] * len(values)
    if config.labels is not None:
        labels = _as_list(filled("labels", plain(config.labels), table, "table"))
    rows = [{}] * len(values) if table is None else table.rows
    for name, given in (("labels", labels), ("table", rows)):
        if len(given) != len(values):
            raise LdmError(f"{name} has {len(given)} entries for {len(values)} subjects of images; legal: one each.")
    names = [row.get("participant_id") or sample_name(index) for index, row in enumerate(rows)]
    for name in names:
        if not is_safe_name(name):
            raise LdmError(f"{config.table}: participant_id '{name}' is not safe as a file name; use {SAFE_NAMES}.")
    return [
        Record(name, row.get("subject") or name, _images(value, source), truth, {}, "test", name)
        for name, row, value, truth in zip(names, rows, values, labels, strict=True)
    ]


def asked_slices(config: DictConfig, records: Sequence[Record], spatial_dims: int) -> list[Record]:
    """The slices of volumes that ``slices`` names, a record each; without, the records.

    Raises:
        LdmError: a volume for a model of 2-D images without ``slices``; for others see
            :func:`ldm.applications.slicing.cut_slices`.
    """
    if config.slices is not None:
        return cut_slices(records, plain(config.slices), spatial_dims)
    if spatial_dims == 2:
        gather(records, expect_no_volume)
    return list(records)


def _images(value: Any, source: EnsembleSource) -> dict[str, str]:
    """The images of a subject by name; a file alone is that of a model that is given one."""
    if isinstance(value, dict):
        return {name: file for name, file in value.items() if file is not None}
    if not isinstance(value, str) or len(source.channels) > 1:
        form = ", ".join(f"{name}: FILE" for name in source.channels)
        raise LdmError(f"images: {value!r} does not say which image it is; legal: {{{form}}}, or a list of such.")
    return {source.channels[0]: value}


def cohort_records(config: DictConfig, source: EnsembleSource) -> list[Record]:
    """Records of the cohort that ``split`` names.

    Raises:
        LdmError: an unknown or empty split; with evaluate, another split than the model was trained on.
    """
    if config.split not in (None, *SPLITS):
        raise LdmError(f"split is '{config.split}'; legal: {', '.join(SPLITS)}.")
    cohort = cohort_alone(config)
    if cohort.split_hash != source.split_sha256:
        raise LdmError(
            f"model={config.model} was trained on another split of the cohort than data.split gives now: its training "
            "subjects could be among the held-out ones. Use the same data settings as for training, or give images=..."
        )
    records = (
        cohort.split("test") or cohort.split("valid")
        if config.split is None
        else (list(cohort.records) if config.split == "all" else cohort.split(config.split))
    )
    if not records:
        raise LdmError(f"split={config.split}: no record of the cohort is in it.")
    return [in_order(record, source) for record in records]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
