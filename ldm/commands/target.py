"""What a diffusion model generates: images, or with ``ldm.target=labels`` the label map of given images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from ldm.commands.run import plain
from ldm.data.datamodule import CohortDataModule
from ldm.data.draft import DEFAULT_CHANNEL
from ldm.data.labels import MASK_INTENSITY, LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError, nearest

logger = logging.getLogger(__name__)

IMAGE, LABELS = "image", "labels"


@dataclass(frozen=True)
class Target:
    """What is generated.

    Attributes:
        preprocessing: of what is generated; its channels are image channels or classes.
        classes: of the label map that is generated; None for images.
        facts: what the model's header says about it.
    """

    preprocessing: Preprocessing
    classes: LabelClasses | None = None
    facts: Mapping[str, Any] | None = None


def check_target(config: DictConfig) -> None:
    """Refuse a target that cannot be had, before anything is read.

    Raises:
        LdmError: an unknown name, no label maps, or a setting that excludes it.
    """
    target = config.ldm.target
    if target not in (IMAGE, LABELS):
        raise LdmError(f"ldm.target is '{target}'; legal: {IMAGE}, {LABELS}.{nearest(str(target), (IMAGE, LABELS))}")
    if target == IMAGE:
        refuse_missing(config)
        return
    if config.data.labels is None:
        raise LdmError("ldm.target=labels needs a label map for every image; set data.labels and data.label_names.")
    LabelClasses.from_config(plain(config.data)["label_names"])
    if "mask" in config.ldm.conditioners:
        raise LdmError("ldm.conditioners.mask and ldm.target=labels exclude each other: the label map is generated.")
    if config.ldm.control.model is not None:
        raise LdmError("ldm.control.model and ldm.target=labels exclude each other: a control steers images.")


def refuse_missing(config: DictConfig) -> None:
    """Refuse ``data.augment.missing`` where images are what is learned to be made.

    Raises:
        LdmError: it is set.
    """
    if config.data.augment.missing:
        raise LdmError(
            "data.augment.missing replaces images by others, which a model that generates images would learn to make. "
            "It is for models that are given images: ldm.target=labels, train-segmenter, train-classifier, ..."
        )


def asked_conditioners(config: DictConfig) -> dict[str, Any]:
    """``ldm.conditioners``; with label maps as target, all images are given and, unless told so, never hidden."""
    asked = plain(config.ldm)["conditioners"]
    if config.ldm.target == IMAGE:
        return asked
    image = plain(config.data)["image"]
    channels = list(image) if isinstance(image, Mapping) else [DEFAULT_CHANNEL]
    given = {name: value for name, value in (asked.get("image") or {}).items() if value is not None}
    return {**asked, "image": {"channels": channels, "drop_rate": 0.0, **given}}


def find_target(config: DictConfig, datamodule: CohortDataModule) -> Target:
    """What is generated for a cohort.

    Values of label maps that no class names are background, as they are for a model that is given the map; the model
    remembers them, and refuses others.
    """
    ours = datamodule.preprocessing
    if config.ldm.target == IMAGE:
        given = (asked_conditioners(config).get("image") or {}).get("channels") or ()
        return Target(replace(ours, channels=tuple(name for name in ours.channels if name not in given)))
    classes = LabelClasses.from_config(plain(config.data)["label_names"])
    labels = {name: list(values) for name, values in classes.values.items()}
    facts = {"labels": labels, "unnamed": unnamed_values(classes, datamodule)}
    return Target(replace(ours, channels=classes.names, intensity=MASK_INTENSITY), classes, facts)


def unnamed_values(classes: LabelClasses, datamodule: CohortDataModule) -> list[int]:
    """Values of a cohort's label maps that no class names, which are background; with a warning if there are any."""
    unnamed = classes.unknown(datamodule.dataset("all").label_values())
    if unnamed:
        logger.warning(
            "data.label_names names %s; other values of the label maps are background: %s.",
            ", ".join(classes.names),
            ", ".join(map(str, unnamed)),
        )
    return unnamed
