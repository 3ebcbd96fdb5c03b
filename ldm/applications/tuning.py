"""L, s and the threshold, chosen on validation images and kept in ``detection.json`` beside the model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ldm.applications.anomaly import MAP_OPTIONS, DetectionOptions, Detector, anomaly_map, image_scores
from ldm.applications.cases import Case, Truth
from ldm.applications.detection import Seen
from ldm.data.draft import Record
from ldm.errors import LdmError
from ldm.files import write_json
from ldm.metrics.detection import Reference, best_threshold, image_auroc, voxel_auprc
from ldm.model.file import read_header

logger = logging.getLogger(__name__)

FILE = "detection.json"
CHOSEN = ("level", "scale", "threshold")
LESION = "lesion"  # key of the lesion classes, where there were masks
REMEDY = "Tune again (ldm detect tune=true guide={guide}), or remove the file."


def reference_of(cases: Sequence[Case | Seen]) -> Reference:
    """What is known of cases.

    Raises:
        LdmError: a case of which it is not known whether it is diseased, one class only, or masks of some cases only.
    """
    unknown = [case.record.id for case in cases if case.diseased is None]
    if unknown:
        raise LdmError(f"'{unknown[0]}' and {len(unknown) - 1} others do not say whether they are healthy or diseased.")
    masks = [case.mask for case in cases]
    given = [mask for mask in masks if mask is not None]
    if given and len(given) < len(masks):
        without = next(case.record.id for case in cases if case.mask is None)
        raise LdmError(f"'{without}' has no mask, while others have one; give every case one, or none.")
    return Reference(
        np.array([case.diseased for case in cases]),
        [case.record.subject for case in cases],
        np.stack(given) if given else None,
    )


def tuning_subjects(records: Sequence[Record], share: float, seed: int) -> set[str]:
    """The patients among ``records`` that choices are made on: a share of them, the same for the same seed.

    Raises:
        LdmError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise LdmError(f"sweep.share is {share}; legal: above 0 to 1, of the patients.")
    subjects = sorted(
        {record.subject for record in records}, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()
    )
    return set(subjects[: max(1, round(share * len(subjects)))])


# --- choosing -----------------------------------------------------------------------------------------


def sweep(
    detector: Detector,
    cases: Sequence[Case],
    options: DetectionOptions,
    levels: Sequence[float],
    scales: Sequence[float],
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, float | None]]:
    """Every level with every scale: ``level``, ``scale``, ``threshold`` and what they are judged by.

    With masks the threshold is that of the largest Dice over all voxels, ``dice_pooled``; without, there is none. An
    image is encoded once a level.

    Args:
        cases: of which the truth is known.
        progress: called with the number of images decoded.
    """
    reference, rows = reference_of(cases), []
    for level in levels:
        at_level, maps = replace(options, level=level), [[] for _ in scales]
        for start in range(0, len(cases), batch_size):
            images = np.stack([case.image for case in cases[start : start + batch_size]])
            indices = range(start, start + len(images))
            found = detector.counterparts(images, at_level, scales, indices, seed)
            for one, counterparts in zip(maps, found, strict=True):
                one.append(anomaly_map(images, counterparts, options, cases[0].channels))
            progress(len(images) * len(scales))
        for scale, one in zip(scales, maps, strict=True):
            rows.append({"level": level, "scale": scale, **judge(np.concatenate(one), options, reference)})
    return rows


def judge(maps: np.ndarray, options: DetectionOptions, reference: Reference) -> dict[str, float | None]:
    """``threshold``, ``dice_pooled`` (with masks), ``pixel_auprc`` (with masks) and ``image_auroc`` of maps."""
    scores = image_scores(maps, options)
    result: dict[str, float | None] = {"threshold": None, "image_auroc": image_auroc(scores, reference)}
    if reference.masks is not None:
        threshold, dice = best_threshold(maps, reference.masks)
        result |= {"threshold": threshold, "dice_pooled": dice, "pixel_auprc": voxel_auprc(maps, reference)}
    return result


def best(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """The row of largest pooled Dice, or, without masks, of largest image AUROC; and by which."""
    criterion = "dice_pooled" if "dice_pooled" in rows[0] else "image_auroc"
    return max(rows, key=lambda row: row[criterion]), criterion


# --- keeping ------------------------------------------------------------------------------------------


def settled(options: DetectionOptions) -> dict[str, Any]:
    """The options that a choice of L, s and threshold belongs to."""
    return {name: value for name, value in asdict(options).items() if name not in ("guide", *CHOSEN)}


def read_choices(model_path: Path, classifier_sha256: str | None, guide: str, truth: Truth) -> dict[str, Any] | None:
    """What was chosen for this model and guide; None where nothing was.

    What a file that is older does not say of the question is not compared.

    Args:
        model_path: of the model that it lies beside.
        classifier_sha256: of the classifier that guides; None without one.
        guide: the guide.
        truth: the target and its level that means healthy.

    Raises:
        LdmError: it was chosen for another model, classifier, target or healthy level, or the file cannot be read.
    """
    path = Path(model_path).with_name(FILE)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        entry, of_model = stored["guides"].get(guide), stored["model_sha256"]
        if entry is not None:
            entry["images"]["subjects"], entry["images"]["files"], entry["images"]["unit"]
            entry["options"] = {**settled(DetectionOptions()), **entry["options"]}  # older: less was to be chosen
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise LdmError(f"{path} is not what tune=true writes; remove it or tune again.") from error
    remedy = REMEDY.format(guide=guide)
    if of_model != read_header(model_path)["tensors_sha256"]:
        raise LdmError(f"{path} was made for another model than {Path(model_path).name} beside it. {remedy}")
    if entry is not None and entry["classifier_sha256"] != classifier_sha256:
        raise LdmError(f"{path}: guide={guide} was tuned with another classifier. {remedy}")
    now = {"target": truth.target.name, "healthy": truth.healthy}
    then = now if entry is None else {name: entry.get(name, value) for name, value in now.items()}
    if then != now:
        words = ["target={target} healthy={healthy}".format(**one) for one in (then, now)]
        raise LdmError(f"{path}: guide={guide} was tuned for {words[0]}, and not for {words[1]}. {remedy}")
    return entry


def lesion_values(truth: Truth) -> dict[str, list[int]] | None:
    """The lesion classes as they are stored, name -> label values; None where every label but 0 is a lesion."""
    return None if truth.lesion is None else {name: list(values) for name, values in truth.lesion.values.items()}


def expect_lesions_of(entry: Mapping[str, Any] | None, model_path: Path, guide: str, truth: Truth) -> None:
    """Refuse choices that were made for other lesions; nothing is known of those of a choice made without masks.

    Args:
        entry: of :func:`read_choices`.
        model_path, guide: it was chosen for.
        truth: the lesion classes of the images that are looked at.

    Raises:
        LdmError: naming both.
    """
    if entry is None or LESION not in entry:
        return
    then, now = entry[LESION], lesion_values(truth)
    if _label_values(then) != _label_values(now):
        raise LdmError(
            f"{Path(model_path).with_name(FILE)}: guide={guide} was tuned for lesions that are {_in_words(then)}, and "
            f"not for {_in_words(now)}. {REMEDY.format(guide=guide)}"
        )


def _in_words(classes: Mapping[str, Sequence[int]] | None) -> str:
    if classes is None:
        return "every label but 0"
    return ", ".join(f"{name} ({', '.join(map(str, values))})" for name, values in classes.items())


def _label_values(classes: Mapping[str, Sequence[int]] | None) -> set[int] | None:
    return None if classes is None else {value for values in classes.values() for value in values}


def write_choices(model_path: Path, guide: str, entry: Mapping[str, Any]) -> Path:
    """Add what was chosen for a guide to ``detection.json``; that of another model is replaced whole."""
    path, sha256 = Path(model_path).with_name(FILE), read_header(model_path)["tensors_sha256"]
    with FileLock(f"{path}.lock"):  # guides that are tuned side by side: neither is lost
        try:
            stored = json.loads(path.read_text())
            guides = stored["guides"] if stored["model_sha256"] == sha256 else {}
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            guides = {}
        return write_json(path, {"model_sha256": sha256, "guides": {**guides, guide: dict(entry)}})


def tuned_baselines(entry: Mapping[str, Any] | None, options: DetectionOptions) -> dict[str, dict[str, Any]]:
    """What was chosen for what stands beside the detection: nothing for another chain, no thresholds for other maps.

    Args:
        entry: of :func:`read_choices`.
        options: of the detection.
    """
    if entry is None:
        return {}
    differing = {name for name, value in settled(options).items() if value != entry["options"][name]}
    if not differing:
        return entry["baselines"]
    if not differing <= set(MAP_OPTIONS):
        return {}
    return {name: {**one, "threshold": None} for name, one in entry["baselines"].items()}


def apply_choices(
    asked: Mapping[str, Any], entry: Mapping[str, Any] | None, threshold: float | None
) -> tuple[DetectionOptions, float | None]:
    """Options and threshold: what is asked for, else what was chosen, else the defaults.

    A chosen threshold belongs to the options it was chosen with: with others there is none, and a warning.

    Args:
        asked: names of :class:`DetectionOptions`; None where nothing is asked.
        entry: of :func:`read_choices`.
        threshold: asked for, or None.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if entry is None:
        return DetectionOptions(**given), threshold
    chosen = {**entry["options"], "level": entry["level"], "scale": entry["scale"]}
    options = DetectionOptions(**{"guide": asked["guide"], **chosen, **given})
    differing = [name for name in chosen if getattr(options, name) != chosen[name]]
    if threshold is None and differing:
        logger.warning(
            "%s: other than tuned (%s), so the tuned threshold does not apply; set threshold=..., or tune again.",
            ", ".join(differing),
            ", ".join(f"{name}={chosen[name]}" for name in differing),
        )
        return options, None
    return options, entry["threshold"] if threshold is None else threshold
