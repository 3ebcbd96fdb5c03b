"""A small residual network that turns an image into what tells it from others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.networks.predictor import PooledResNet


class EmbeddingResNet(PooledResNet):
    """:class:`ldm.networks.predictor.PooledResNet` for comparing images with each other.

    Images are standardised first, so that brightness and linear contrast say nothing. Pooled features pass a batch
    normalisation before the linear head, as in the projection of SimCLR (Chen et al. 2020): scans of one organ are so
    alike that without it all embeddings start in one place, and stay there.

    Args:
        spatial_dims, in_channels, out_channels, channels, num_res_blocks, norm_num_groups: as there; ``out_channels``
            is the length of the embedding.
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
        super().__init__(spatial_dims, in_channels, out_channels, channels, num_res_blocks, norm_num_groups)
        self.neck = nn.BatchNorm1d(channels[-1], affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings ``(B, out_channels)`` float32, of any length, of images ``(B, C, *S)``."""
        flat = x.flatten(1).float()  # (B, C S)
        mean, std = flat.mean(1), flat.std(1).clamp(min=1e-6)  # (B,) each
        shape = (-1, *[1] * (x.ndim - 1))
        features = self.features((x - mean.view(shape)) / std.view(shape))  # (B, F)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.neck(features))
