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


class Source(ABC):
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


class DiffusionSource(Source):
    """A diffusion model that generates label maps.

    Args:
        model: the model.
        members: label maps a subject.
        seed, batch_size, precision: see :func:`ldm.model.ensemble.draw_ensembles`.
        options: sampling options that differ from the model's.
        augmentation: of what members but the first see, see :class:`ldm.model.ensemble.Views`.

    Raises:
        LdmError: it generates images, or an illegal number or option.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        members: int = 5,
        seed: int = 0,
        batch_size: int = 16,
        precision: str = "auto",
        options: Mapping[str, Any] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        draw_ensembles(model, (), (), members)  # refuses what cannot be drawn
        self.model, self.members, self.options = model, members, dict(options or {})
        self.seed, self.batch_size, self.precision = seed, batch_size, precision
        target, self.classes = model.header["target"], model.classes
        self.preprocessing, self.unnamed = model.input_preprocessing, tuple(target["unnamed"])
        self.channels = tuple(model.header["conditioners"]["image"]["channels"])
        self.split_sha256 = model.header["split_sha256"]
        self.facts = {
            "kind": "diffusion",
            "model_sha256": model.header["tensors_sha256"],
            "members": members,
            "seed": seed,
            "sampling": vars(model.settings(self.options)),
            "precision": precision,
        }
        self._see(augmentation, members, seed)

    def ensembles(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[Ensemble]:
        """See :class:`Source`."""
        settings = (self.members, self.seed, self.batch_size, self.precision, self.views)
        return draw_ensembles(self.model, arrays, names, *settings, **self.options)


class NetworkSource(Source):
    """Networks of ``ldm train-segmenter``: several are a deep ensemble (Lakshminarayanan et al. 2017), one with dropout
    draws its members with dropout switched on (Gal & Ghahramani 2016), one without is a single member, or, with an
    augmentation, as many as it is shown views of the image.

    Members are computed one by one: of a volume they need the memory of one, and each is drawn from a seed of its own,
    so that it is the same however many there are.

    Raises:
        LdmError: networks of other classes, channels, preprocessing or splits.
    """

    def __init__(
        self,
        segmenters: Sequence[Segmenter],
        sha256: Sequence[str],
        members: int = 5,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.segmenters, self.seed = list(segmenters), seed
        first = self.segmenters[0]
        for one in self.segmenters[1:]:
            if (one.labels, one.preprocessing.fingerprint(), one.facts["split_sha256"]) != (
                first.labels,
                first.preprocessing.fingerprint(),
                first.facts["split_sha256"],
            ):
                raise LdmError("model: the networks of an ensemble need the same classes, preprocessing and split.")
        self.dropout = len(self.segmenters) == 1 and first.config.get("dropout", 0) > 0
        one = len(self.segmenters) == 1
        self.members = members if one and (self.dropout or augmentation is not None) else len(self.segmenters)
        self.classes, self.preprocessing, self.unnamed = first.labels, first.preprocessing, None
        self.channels, self.split_sha256 = first.preprocessing.channels, first.facts["split_sha256"]
        kind = "dropout" if self.dropout else "network" if one else "deep ensemble"
        self.facts = {"kind": kind, "model_sha256": list(sha256), "members": self.members, "seed": seed}
        self._see(augmentation, self.members, seed)

    def ensembles(self, arrays: Sequence[np.ndarray], names: Sequence[str]) -> list[Ensemble]:
        """See :class:`Source`."""
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
