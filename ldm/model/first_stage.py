"""A trained first stage on disk: network, preprocessing and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ldm.data.preprocessing import Preprocessing
from ldm.model.build import build_first_stage
from ldm.model.file import load_strict, names_the_file, read_header, read_tensors, tensors_hash, write_model
from ldm.networks.frozen import freeze

KIND = "first_stage"


@dataclass
class FirstStage:
    """A first stage and everything that belongs to it.

    Attributes:
        network: ``encode`` and ``decode``.
        config: ``kind`` and constructor arguments of the network.
        preprocessing: how scans became what the network was trained on.
        metrics: held-out quality, e.g. ``psnr`` (dB) and ``ssim``.
        facts: cohort name, split hash and whatever else is worth keeping.
    """

    network: nn.Module
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of the tensors."""
        return tensors_hash(self.network.state_dict())

    def save(self, path: Path) -> None:
        """Write ``model.safetensors`` atomically."""
        header = {
            "kind": KIND,
            "network": dict(self.config),
            "preprocessing": self.preprocessing.to_dict(),
            "metrics": dict(self.metrics),
            **self.facts,
        }
        write_model(path, self.network.state_dict(), header)

    @classmethod
    @names_the_file
    def load(cls, path: Path) -> FirstStage:
        """Read a file that :meth:`save` wrote; the network is frozen.

        Raises:
            LdmError: not such a file, or tensors and description do not fit each other.
        """
        header = read_header(path, KIND)
        network = build_first_stage(header["network"])
        load_strict(network, read_tensors(path), path)
        known = (
            "kind",
            "network",
            "preprocessing",
            "metrics",
            "format_version",
            "tensors_sha256",
            "versions",
        )
        return cls(
            freeze(network),
            header["network"],
            Preprocessing.from_dict(header["preprocessing"]),
            header["metrics"],
            {name: value for name, value in header.items() if name not in known},
        )
