"""A network that recognises a scan again, flipped, moved a little or with another contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.build import construct
from ldm.model.trained import TrainedNetwork
from ldm.networks.matcher import EmbeddingResNet
from ldm.precision import autocast

KIND = "matcher"


def build_matcher(config: Mapping[str, Any]) -> EmbeddingResNet:
    """The network that ``config`` describes; its outputs are embeddings before they are brought to unit length.

    Raises:
        LdmError: an argument that does not exist, or an illegal one.
    """
    return construct(EmbeddingResNet, config, "matcher.network")


@dataclass
class Matcher(TrainedNetwork):
    """A trained matcher, and what it was trained on.

    Attributes:
        network: images ``(B, C, *S)`` -> ``(B, E)``.
        config: see :func:`build_matcher`.
        preprocessing: how scans become its input.
        views: what it was trained to see through, the settings of :class:`ldm.training.views.Views`.
        metrics: on the validation split.
        facts: cohort, split hash, steps.
    """

    kind = KIND
    build = staticmethod(build_matcher)

    network: EmbeddingResNet
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    views: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {"preprocessing": self.preprocessing.to_dict(), "views": dict(self.views)}

    @classmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {"preprocessing": Preprocessing.from_dict(header["preprocessing"]), "views": header["views"]}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Unit vectors ``(B, E)`` float32 of preprocessed images ``(B, C, *S)``.

        Raises:
            LdmError: images of another number of axes or channels.
        """
        x = images.to(self.network.head.weight.device, torch.float32)
        axes, channels = self.config["spatial_dims"], self.config["in_channels"]
        if x.ndim != axes + 2 or x.shape[1] != channels:
            raise LdmError(
                f"The matcher takes batches of {axes}-D images with {channels} channels, (B, {channels}, *S), not "
                f"{tuple(x.shape)}."
            )
        with autocast(x.device, "float32"):  # a distance should not depend on the machine's precision
            return F.normalize(self.network(x), dim=1)
