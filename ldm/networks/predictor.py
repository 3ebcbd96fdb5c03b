"""A small residual network that reads numbers from an image: convolutions, global average pooling, a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.blocks.segresnet_block import ResBlock
from torch import Tensor, nn

from ldm.errors import LdmError


class PooledResNet(nn.Module):
    """MONAI's pre-activation residual blocks (He et al. 2016b), as in the encoder of its ``SegResNet``.

    Group normalisation treats every image on its own, so batches of 2 are as good as large ones and a prediction does
    not depend on what else is in the batch. It stands only inside the residual branches: how bright an image is as a
    whole stays in the shortcuts, and can be predicted too.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        out_channels: numbers to predict.
        channels: feature channels per level; the first level works at half the image's resolution, each further one
            at half that of the one before. The last one is the number of features.
        num_res_blocks: residual blocks per level.
        norm_num_groups: groups of the group normalisation.

    Raises:
        LdmError: a channel count is not a multiple of ``norm_num_groups``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (16, 32, 64, 128),
        num_res_blocks: int = 1,
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()
        if not channels or any(width < 1 or width % norm_num_groups for width in channels):
            raise LdmError(
                f"network.channels is {list(channels)}; every level needs a multiple of norm_num_groups, "
                f"{norm_num_groups}."
            )
        norm = ("GROUP", {"num_groups": norm_num_groups})
        layers: list[nn.Module] = []
        for before, width in zip((in_channels, *channels), channels, strict=False):
            layers.append(Convolution(spatial_dims, before, width, strides=2, kernel_size=3, conv_only=True))
            layers += [ResBlock(spatial_dims, width, norm) for _ in range(num_res_blocks)]
        self.body = nn.Sequential(*layers)
        for module in self.body.modules():
            # MONAI's default would let activations fade along the shortcuts, which no normalisation brings back
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # He et al. 2015
        self.head = nn.Linear(channels[-1], out_channels)

    def features(self, x: Tensor) -> Tensor:
        """Pooled activations ``(B, F)`` float32 of images ``(B, C, *S)``."""
        x = F.relu(self.body(x))  # (B, F, *small)
        return x.flatten(2).float().mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Raw outputs ``(B, out_channels)`` float32 of images ``(B, C, *S)``."""
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 has 3 digits, too few for a volume
            return self.head(features)
