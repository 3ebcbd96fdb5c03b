"""A small segmentation network as an instrument: it measures the volumes of structures in an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn

from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.model.trained import TrainedNetwork
from ldm.precision import autocast

KIND = "segmenter"


def build_segmenter(config: Mapping[str, Any]) -> nn.Module:
    """MONAI's residual U-Net.

    Args:
        config: ``spatial_dims``, ``in_channels``, ``out_channels``, ``channels`` (a level each), ``num_res_units`` and,
            unless it is 0, ``dropout``.
    """
    channels = tuple(config["channels"])
    return UNet(
        config["spatial_dims"],
        config["in_channels"],
        config["out_channels"],
        channels,
        strides=(2,) * (len(channels) - 1),
        num_res_units=config["num_res_units"],
        dropout=config.get("dropout", 0.0),
        norm="INSTANCE",
    )


@dataclass
class Segmenter(TrainedNetwork):
    """A trained segmentation network and what it was trained on.

    Attributes:
        network: ``(B, C, *S)`` -> class scores ``(B, K, *S)``.
        config: see :func:`build_segmenter`.
        labels: classes, background first.
        preprocessing: how scans become its input.
        metrics: held-out Dice and agreement of volumes.
        facts: cohort, split hash, ``unnamed``: the label values that no class names and that were background.
    """

    kind = KIND
    build = staticmethod(build_segmenter)

    network: nn.Module
    config: Mapping[str, Any]
    labels: LabelClasses
    preprocessing: Preprocessing
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {
            "labels": {name: list(values) for name, values in self.labels.values.items()},
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {
            "labels": LabelClasses.from_config(header["labels"]),
            "preprocessing": Preprocessing.from_dict(header["preprocessing"]),
        }

    @property
    def device(self) -> torch.device:
        """Where the network is, and images are brought to."""
        return next(self.network.parameters(), torch.empty(0)).device

    @torch.no_grad()
    def probabilities(self, images: np.ndarray, dropout: bool = False) -> np.ndarray:
        """Probabilities of classes ``(B, K, *S)`` float32 of preprocessed images ``(B, C, *S)``.

        With ``dropout`` what it leaves out in training is left out now too, drawn from torch's generator.
        """
        layers = [one for one in self.network.modules() if isinstance(one, nn.modules.dropout._DropoutNd)]
        for layer in layers:
            layer.training = dropout
        x = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).to(self.device)  # (B, C, *S)
        with autocast(x.device):
            scores = self.network(x)  # (B, K, *S)
        for layer in layers:
            layer.training = False
        return scores.float().softmax(1).cpu().numpy()

    @torch.no_grad()
    def segment(self, image: np.ndarray) -> np.ndarray:
        """Class indices ``(*S)`` uint8 of a preprocessed image ``(C, *S)``."""
        x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None].to(self.device)  # (1, C, *S)
        with autocast(x.device):
            scores = self.network(x)  # (1, K, *S)
        return scores[0].float().argmax(0).to(torch.uint8).cpu().numpy()

    def volumes(self, image: np.ndarray) -> dict[str, float]:
        """Volume of every class in mm3 (2-D: area in pixels) in a preprocessed image ``(C, *S)``."""
        spacing = self.preprocessing.voxel_size
        voxel = 1.0 if spacing is None else float(np.prod(spacing))
        counts = np.bincount(self.segment(image).ravel(), minlength=len(self.labels))
        return {name: float(counts[index]) * voxel for index, name in enumerate(self.labels.names, 1)}
