"""What ``ldm detect`` is asked: the detector, the images and their truth, and what results depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ldm.applications.anomaly import MAP_OPTIONS, DetectionOptions, Detector, find_healthy
from ldm.applications.cases import PATIENT, SUBJECT, Truth, folder_records, lesion_classes
from ldm.applications.detection import Comparison
from ldm.applications.slicing import cut_slices
from ldm.commands.run import plain, require_file
from ldm.commands.sample import files_sha256
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.commands.train_classifier import expect_cohort_of, find_target, take_networks
from ldm.data.cohort_config import SPLITS
from ldm.data.draft import Record
from ldm.data.stored import split_reference
from ldm.data.table import read_table
from ldm.diffusion.checks import check_choice
from ldm.errors import LdmError
from ldm.evaluation.instruments import unlike
from ldm.model.classifier import Classifier
from ldm.model.first_stage import FirstStage
from ldm.model.latent_diffusion import LatentDiffusionModel

FIRST_STAGE = "reconstructed_by_sha256"  # key of the first stage whose reconstructions are compared


def check_settings(config: DictConfig) -> None:
    """Refuse what would have no effect.

    Raises:
        LdmError: naming the setting and what it goes with.
    """
    if config.images is not None and config.lesion is not None:
        raise LdmError("lesion names classes of data.label_names; with images=FOLDER every label but 0 is a lesion.")
    if config.slices is not None:
        check_slices(config)
    if config.tune:
        instead = {"level": "sweep.levels", "scale": "sweep.scales", "split": "sweep.split"}
        for name in ("level", "scale", "threshold", "split"):
            if config[name] is not None:
                remedy = f"set {instead[name]}" if name in instead else "the threshold is chosen"
                raise LdmError(f"{name} has no meaning with tune=true: {remedy}.")
        for name in ("levels", "scales"):
            if config.sweep[name] is not None and not len(config.sweep[name]):
                raise LdmError(f"sweep.{name} is empty; legal: numbers, or null for a range of them.")


def check_slices(config: DictConfig) -> None:
    """Refuse what does not go with ``slices``: volumes are looked at, and nothing is compared with a truth.

    Raises:
        LdmError: naming the setting.
    """
    if config.images is None:
        raise LdmError("slices goes with images=FOLDER (of the cohort: data.slices), and has no meaning here.")
    for name in ("tune", "evaluate"):
        if config[name]:
            raise LdmError(
                f"{name}=true does not go with slices, where nothing is compared with a truth: leave {name} out, or "
                "take slices of a cohort (data.slices)."
            )
    if config.masks is not None:
        raise LdmError("masks has no meaning with slices, where nothing is compared with a truth; leave it out.")


def build_detector(config: DictConfig, model: LatentDiffusionModel) -> Detector:
    """The model with its classifier, where one guides, and the level of the target that means healthy.

    Raises:
        LdmError: no classifier, one of another diffusion model, or no target.
    """
    classifier = None
    if config.guide == "classifier":
        path = require_file(config.classifier_model, "classifier", "train-classifier")
        classifier = Classifier.load(path, model.device)
    if classifier is None:
        target = find_target(model.schema, config.target, "target")
    else:
        target = classifier.target
        if config.target not in (None, target.name):
            raise LdmError(f"target is '{config.target}', but the classifier tells '{target.name}'.")
    healthy = find_healthy(target, None if config.healthy is None else str(config.healthy))
    return Detector(model, target, healthy, classifier, config.precision, find_rebuilder(config, model))


def find_rebuilder(config: DictConfig, model: LatentDiffusionModel) -> FirstStage | None:
    """The first stage ``reconstructed_by``, if one is named.

    Raises:
        LdmError: it was trained on another split, or on images that were prepared otherwise.
    """
    if config.reconstructed_by is None:
        return None
    found = FirstStage.load(require_file(config.reconstructed_by, "first stage", "train-vae"))
    key = unlike(found.preprocessing.to_dict(), model.preprocessing.to_dict())
    if key is not None:
        raise LdmError(f"reconstructed_by={config.reconstructed_by}: was trained on images with another {key}.")
    if found.facts.get("split_sha256") != model.header["split_sha256"]:
        raise LdmError(f"reconstructed_by={config.reconstructed_by}: was trained on another split than the model.")
    return found


def classifier_sha256(detector: Detector) -> str | None:
    """Hash of the classifier, where there is one."""
    return None if detector.classifier is None else detector.classifier.sha256


def rebuilder_sha256(detector: Detector) -> str | None:
    """Hash of the first stage ``reconstructed_by``; None without one, where the model's own rebuilds."""
    return None if detector.rebuilder is None else detector.rebuilder.sha256


def asked_options(config: DictConfig) -> dict[str, Any]:
    """Those settings that are options of detection; None where nothing is asked."""
    asked = {field.name: config[field.name] for field in fields(DetectionOptions) if field.name in config}
    return asked | {"encode_as": None if asked["encode_as"] is None else str(asked["encode_as"])}


@dataclass(frozen=True)
class Images:
    """What to look at.

    Attributes:
        records: the images' records.
        truth: how they say what is healthy.
        split: of the cohort; None for those of a folder.
        split_sha256: of the cohort; None for those of a folder.
        patients_known: whether it is said whose images they are; else each is a subject of its own.
        files_sha256: hash of every file.
    """

    records: Sequence[Record]
    truth: Truth
    split: str | None = None
    split_sha256: str | None = None
    patients_known: bool = True
    files_sha256: Mapping[str, str] = field(default_factory=dict)


def find_images(
    config: DictConfig, model: LatentDiffusionModel, path: Path, detector: Detector, split: str | None
) -> Images:
    """The images to look at: those of a folder, or slices of its volumes, or those of a split of the cohort.

    Raises:
        LdmError: none, or ones that do not fit the model.
    """
    target, healthy = detector.target, detector.healthy
    if config.images is not None:
        files = [None if config[name] is None else Path(config[name]) for name in ("masks", "table")]
        folder, out = Path(config.images), Path(config.run_dir)
        volumes = config.slices is not None
        records = folder_records(folder, model.preprocessing, target, healthy, *files, out, volumes)
        if volumes:
            records = cut_slices(records, plain(config.slices), model.preprocessing.spatial_dims)
        known = config.table is not None and SUBJECT in read_table(Path(config.table)).columns
        return Images(records, Truth(target, healthy), patients_known=known, files_sha256=digests(records))
    for name in ("masks", "table"):
        if config[name] is not None:
            raise LdmError(f"{name} goes with images=FOLDER; masks of a cohort are data.labels, its table data.table.")
    take_networks(config, model)
    cohort = prepared(cohort_datamodule(config)).cohort
    expect_cohort_of(model, cohort, path)
    split = split or ("test" if cohort.split("test") else "valid")
    check_choice("split", split, (*SPLITS, "all"))
    records = [record for record in cohort.records if split in ("all", record.split)]
    if not records:
        raise LdmError(f"cohort '{cohort.name}' has no image in split={split}; see data.split.")
    data = plain(config.data)
    classes = lesion_classes(data["label_names"] or {}, None if config.lesion is None else list(config.lesion))
    return Images(
        records,
        Truth(target, healthy, classes),
        split,
        cohort.split_hash,
        patients_known=data.get("subjects_linked", True),
        files_sha256=digests(records),
    )


def digests(records: Sequence[Record]) -> dict[str, str]:
    """SHA-256 of every file of the records' images."""
    files = {str(split_reference(ref)[0]) for record in records for ref in record.images.values()}
    return files_sha256({"image": sorted(files)})


def tuned_ids(images: Images, entry: Mapping[str, Any] | None) -> set[str]:
    """Those of the images that are of patients on whom L, s and the threshold were chosen.

    A patient is recognised by the name, where both times it is known whose the images are and they come from one cohort
    or both from folders, and by the content of a file wherever it lies.
    """
    if entry is None:
        return set()
    chosen = entry["images"]
    comparable = images.patients_known and chosen["unit"] == PATIENT and chosen["split_sha256"] == images.split_sha256
    subjects, files = set(chosen["subjects"]) if comparable else set(), set(chosen["files"])
    tuned = subjects | {record.subject for record in images.records if marks(record, images) & files}
    return {record.id for record in images.records if record.subject in tuned}


def marks(record: Record, images: Images) -> set[str]:
    """What the images of a record are recognised by: what is in their files, and which part of it."""
    references = [split_reference(ref) for ref in record.images.values()]
    return {images.files_sha256[str(path)] + (f"::{part}" if part else "") for path, part in references}


def request(
    config: DictConfig,
    detector: Detector,
    options: DetectionOptions,
    comparison: Comparison,
    images: Images,
) -> dict[str, Any]:
    """What the counterparts depend on; maps and scores are made of them, see :func:`map_settings`."""
    model, noising = detector.model, comparison.partial_noising
    return {
        "model_sha256": model.header["tensors_sha256"],
        "simulated_training_data": model.header.get("simulated", False),
        "classifier_sha256": classifier_sha256(detector),
        FIRST_STAGE: rebuilder_sha256(detector),
        "target": detector.target.name,
        "healthy": detector.healthy,
        "options": {**chain_of(options), "level": detector.level(options)},
        "start": detector.grid(options).t[0],  # where the chain begins: its first time at L or below
        "comparison": {**asdict(comparison), "partial_noising": None if noising is None else chain_of(noising)},
        "seed": config.seed,
        "precision": config.precision,
        "images": {record.id: list(record.images.values()) for record in images.records},
        "files_sha256": dict(images.files_sha256),
    }


def chain_of(options: DetectionOptions) -> dict[str, Any]:
    """The options that counterparts depend on."""
    return {name: value for name, value in asdict(options).items() if name not in MAP_OPTIONS}


def map_settings(options: DetectionOptions, threshold: float | None = None) -> dict[str, Any]:
    """What only maps, lesions and scores depend on; they are written anew from the counterparts that are there."""
    return {name: getattr(options, name) for name in MAP_OPTIONS} | {"threshold": threshold}


def channel_name(config: DictConfig, model: LatentDiffusionModel) -> str:
    """The channel whose plain intensity is compared, and shown: ``intensity_channel``, or the first.

    Raises:
        LdmError: no such channel.
    """
    channels = model.preprocessing.channels
    if config.intensity_channel is None:
        return channels[0]
    check_choice("intensity_channel", config.intensity_channel, channels)
    return config.intensity_channel
