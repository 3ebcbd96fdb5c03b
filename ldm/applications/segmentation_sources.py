"""What draws ensembles of label maps: a diffusion model, or networks as its peers."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ldm.data.augmentation import Augmentation
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.ensemble import Ensemble, Views, draw_ensembles
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.segmenter import Segmenter

MEMBERS = 5  # as in the paper


class EnsembleSource(ABC):
    """What draws ensembles.

    Attributes:
        preprocessing: of the images that it is given.
        channels: their names, in order.
        classes: of its label maps.
        unnamed: label values that were background in training; None where that is not known.
        split_sha256: of the cohort it was trained on.
        facts: what its results depend on.
        views: what members see; None is the image.
    """

    preprocessing: Preprocessing
    channels: tuple[str, ...]
    classes: LabelClasses
    unnamed: tuple[int, ...] | None
    split_sha256: str | None
    facts: dict[str, Any]
    views: Views | None = None

    def _see(self, augmentation: Augmentation | None, members: int, seed: int) -> None:
        """Let members see the image in various ways, if there is an augmentation.

        Raises:
            LdmError: there is one member, or an augmentation that does not fit the images.
        """
        if augmentation is None:
            return
        if members < 2:
            raise LdmError("augment: the first member sees the image as it is; legal: members of 2 or more.")
        self.views = Views(augmentation, self.preprocessing, seed)
        self.facts["augment"] = asdict(augmentation)

    @property
    def joint(self) -> bool:
        """Whether member m of several images is one draw, as a network is, and their volumes may be added up."""
        return self.facts["kind"] in ("deep ensemble", "network")

    @abstractmethod
    def ensembles(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[Ensemble]:
        """An ensemble of each image ``(C, *S)``; randomness follows from the image's name."""


class DiffusionSource(EnsembleSource):
    """A diffusion model that generates label maps, or several of the same task, which draw in turn.

    Args:
        models: the models.
        members: label maps a subject, of all models together; None for 5, or one of each model if these are more.
        seed, batch_size, precision: see :func:`ldm.model.ensemble.draw_ensembles`.
        options: sampling options that differ from the models'.
        augmentation: of what members but the first see, see :class:`ldm.model.ensemble.Views`.

    Raises:
        LdmError: one generates images, an illegal number or option, or models of another task or split.
    """

    def __init__(
        self,
        models: Sequence[LatentDiffusionModel],
        members: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        precision: str = "auto",
        options: Mapping[str, Any] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        members = max(MEMBERS, len(models)) if members is None else members
        draw_ensembles(models, (), (), members)  # refuses what cannot be drawn
        self.models, self.members, self.options = list(models), members, dict(options or {})
        self.seed, self.batch_size, self.precision = seed, batch_size, precision
        first, sampling = self.models[0], [vars(model.settings(self.options)) for model in self.models]
        _require_same([_task_of_diffusion(model) for model in self.models])
        _require_same(sampling, "sampling settings")
        self.preprocessing, self.classes = first.input_preprocessing, first.classes
        self.unnamed = tuple(first.header["target"]["unnamed"])
        self.channels = tuple(first.header["conditioners"]["image"]["channels"])
        self.split_sha256 = first.header["split_sha256"]
        self.facts = {
            "kind": "diffusion",
            "model_sha256": [model.header["tensors_sha256"] for model in self.models],
            "members": members,
            "seed": seed,
            "sampling": sampling[0],
            "precision": precision,
        }
        self._see(augmentation, members, seed)

    def ensembles(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[Ensemble]:
        """See :class:`EnsembleSource`."""
        settings = (self.members, self.seed, self.batch_size, self.precision, self.views)
        return draw_ensembles(self.models, arrays, names, *settings, **self.options)


class NetworkSource(EnsembleSource):
    """Networks of ``ldm train-segmenter``: several are a deep ensemble (Lakshminarayanan et al. 2017), one with dropout
    draws its members with dropout switched on (Gal & Ghahramani 2016), one without is a single member. With an
    augmentation members are views of the image, which the networks see in turn.

    Members are computed one by one: of a volume they need the memory of one, and each is drawn from a seed of its own,
    so that it is the same however many there are.

    Args:
        segmenters: the networks.
        sha256: of their tensors.
        members: label maps a subject; None for 5 of dropout or views, or one of each network if these are more.
        seed: of dropout and views.
        augmentation: of what members but the first see, see :class:`ldm.model.ensemble.Views`.

    Raises:
        LdmError: networks of other classes, channels, preprocessing, splits or background values, or a number of
            members that they have not.
    """

    def __init__(
        self,
        segmenters: Sequence[Segmenter],
        sha256: Sequence[str],
        members: int | None = None,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.segmenters, self.seed = list(segmenters), seed
        first = self.segmenters[0]
        _require_same([(n.labels, _images_of(n.preprocessing), n.facts["split_sha256"]) for n in self.segmenters])
        self.dropout = len(self.segmenters) == 1 and first.config.get("dropout", 0) > 0
        count = len(self.segmenters)
        vary = self.dropout or augmentation is not None  # more members than networks are worth drawing
        self.members = (max(MEMBERS, count) if vary else count) if members is None else members
        if self.members < count or (self.members > count and not vary):
            legal = (
                f"{count} or more, one of each network" if vary else f"{count}, one of each network, without augment"
            )
            raise LdmError(f"members is {members}; legal: {legal}.")
        unnamed = [tuple(n.facts["unnamed"]) for n in self.segmenters if "unnamed" in n.facts]  # older files lack it
        _require_same(unnamed, "label values that are background")
        self.classes, self.preprocessing = first.labels, first.preprocessing
        self.unnamed = unnamed[0] if unnamed else None
        self.channels, self.split_sha256 = first.preprocessing.channels, first.facts["split_sha256"]
        kind = "dropout" if self.dropout else "network" if count == 1 else "deep ensemble"
        self.facts = {"kind": kind, "model_sha256": list(sha256), "members": self.members, "seed": seed}
        self._see(augmentation, self.members, seed)

    def ensembles(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[Ensemble]:
        """See :class:`EnsembleSource`."""
        return [self._ensemble(array, name) for array, name in zip(arrays, names, strict=True)]

    def _ensemble(self, array: np.ndarray, name: str) -> Ensemble:
        probabilities = np.stack([self._member(array, name, member) for member in range(self.members)])
        return Ensemble(probabilities if self.views is None else self.views.back(probabilities))

    def _member(self, array: np.ndarray, name: str, member: int) -> np.ndarray:
        """Probabilities ``(K + 1, *S)`` of what one member sees."""
        network = self.segmenters[member % len(self.segmenters)]
        seen = array if self.views is None else self.views.seen(array, member)
        return (self._drop(seen, name, member) if self.dropout else network.probabilities(seen[None]))[0]

    def _drop(self, array: np.ndarray, name: str, member: int) -> np.ndarray:
        """Probabilities ``(1, K + 1, *S)`` of one member, by dropout."""
        (network,) = self.segmenters
        with torch.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
            # Hashed, as manual_seed keeps 32 bits of its seed on the CPU.
            torch.manual_seed(zlib.crc32(f"{self.seed} {member} {name}".encode()))
            return network.probabilities(array[None], dropout=True)


def _task_of_diffusion(model: LatentDiffusionModel) -> tuple[Any, ...]:
    """What models of an ensemble have in common."""
    channels, unnamed = model.header["conditioners"]["image"]["channels"], model.header["target"]["unnamed"]
    return (
        model.classes,
        _images_of(model.input_preprocessing),
        list(channels),
        list(unnamed),
        model.header["split_sha256"],
    )


def _images_of(preprocessing: Preprocessing) -> dict[str, Any]:
    """What decides how images are prepared: not what a network needs its sides to be a multiple of, as they are."""
    return {name: value for name, value in preprocessing.to_dict().items() if name != "multiple"}


def _require_same(values: Sequence[Any], what: str = "classes, images, preprocessing and split") -> None:
    if any(value != values[0] for value in values[1:]):
        raise LdmError(f"model: those of an ensemble need the same {what}.")
