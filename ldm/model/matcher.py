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
        pool: side of the blocks of voxels that are averaged before the network sees them.
        views: what it was trained to see through, the settings of :class:`ldm.training.views.Views`.
        metrics: on the validation split.
        facts: cohort, split hash, steps.
    """

    kind = KIND
    build = staticmethod(build_matcher)

    network: EmbeddingResNet
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    pool: int = 1
    views: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {"preprocessing": self.preprocessing.to_dict(), "pool": self.pool, "views": dict(self.views)}

    @classmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        preprocessing = Preprocessing.from_dict(header["preprocessing"])
        return {"preprocessing": preprocessing, "pool": header.get("pool", 1), "views": header["views"]}

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
            return F.normalize(self.network(pooled(x, self.pool)), dim=1)


def pooled(images: Tensor, side: int) -> Tensor:
    """Means over blocks of ``side`` voxels a side: ``(B, C, *S)`` -> ``(B, C, *ceil(S / side))``."""
    pool = F.avg_pool3d if images.ndim == 5 else F.avg_pool2d
    return images if side == 1 else pool(images, side, ceil_mode=True, count_include_pad=False)
