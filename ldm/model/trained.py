"""What a classifier, matcher, predictor and segmenter have in common: a network that was trained, in one model file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ldm.model.file import load_strict, names_the_file, read_header, read_tensors, tensors_hash, write_model
from ldm.networks.frozen import freeze


class TrainedNetwork(ABC):
    """Base of dataclasses with these fields and more of their own.

    Attributes:
        kind: what the file's header calls it.
        build: makes the network that ``config`` describes.
        network: what was trained.
        config: kind and arguments of the network.
        metrics: quality on the validation split.
        facts: cohort, split hash, steps and whatever else is worth keeping.
    """

    kind: ClassVar[str]
    build: ClassVar[Callable[[Mapping[str, Any]], nn.Module]]

    network: nn.Module
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    facts: Mapping[str, Any]

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """The further fields, as the header keeps them."""

    @classmethod
    @abstractmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """The further fields by name, out of a header that has :meth:`description` in it."""

    @property
    def sha256(self) -> str:
        """Hash of the tensors, the file's ``tensors_sha256``."""
        return tensors_hash(self.network.state_dict())

    def save(self, path: Path) -> None:
        """Write ``model.safetensors`` atomically."""
        header = {
            "kind": self.kind,
            "network": dict(self.config),
            **self.description(),
            "metrics": dict(self.metrics),
            "facts": dict(self.facts),
        }
        write_model(path, self.network.state_dict(), header)

    @classmethod
    @names_the_file
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a file that :meth:`save` wrote; the network is frozen.

        Raises:
            LdmError: not such a file, or tensors and description do not fit each other.
        """
        path = Path(path)
        header = read_header(path, cls.kind)
        network = cls.build(header["network"])
        load_strict(network, read_tensors(path), path)
        return cls(
            network=freeze(network.to(device)),
            config=header["network"],
            metrics=header["metrics"],
            facts=header["facts"],
            **cls.further_fields(header),
        )
