"""Exactly invertible stems that trade resolution for channels before the first convolution.

A 2x2x2 block of a volume becomes eight channels at half the resolution, so that the expensive
full-resolution end of an autoencoder disappears. Both stems are orthonormal maps: they lose nothing,
and a squared error has the same value on either side.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import LdmError, nearest

STEMS = ("none", "space_to_depth", "haar")


class BlockStem(nn.Module):
    """Orthonormal transform of every 2x2(x2) block into ``2**spatial_dims`` channels per input channel.

    Args:
        spatial_dims: 2 or 3.
        kind: ``space_to_depth`` keeps the voxels of a block as they are; ``haar`` takes their
            orthonormal Haar wavelet transform, whose first channel is the scaled block mean.
    """

    def __init__(self, spatial_dims: int, kind: str) -> None:
        super().__init__()
        if kind not in STEMS[1:]:
            raise LdmError(f"stem '{kind}' is unknown; legal: {', '.join(STEMS)}.{nearest(kind, STEMS)}")
        self.spatial_dims = spatial_dims
        self.factor = 2**spatial_dims
        corners = list(itertools.product((0, 1), repeat=spatial_dims))
        if kind == "space_to_depth":
            matrix = torch.eye(self.factor)
        else:  # sign of frequency f at corner c: (-1)^(f . c), the tensor product of 1-D Haar pairs
            signs = [[(-1.0) ** sum(a * b for a, b in zip(f, c, strict=True)) for c in corners] for f in corners]
            matrix = torch.tensor(signs) / self.factor**0.5
        kernel = matrix.reshape(self.factor, 1, *(2,) * spatial_dims)  # (2^n, 1, 2, 2(, 2))
        self.register_buffer("kernel", kernel, persistent=False)

    def _kernel(self, channels: int, like: Tensor) -> Tensor:
        return self.kernel.to(like.dtype).repeat(channels, *(1,) * (self.spatial_dims + 1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` -> ``(B, 8 C, D/2, H/2, W/2)``; 2-D: ``(B, 4 C, H/2, W/2)``."""
        conv = F.conv3d if self.spatial_dims == 3 else F.conv2d
        return conv(x, self._kernel(x.shape[1], x), stride=2, groups=x.shape[1])

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of :meth:`forward` (its transpose, for the transform is orthonormal)."""
        channels = y.shape[1] // self.factor
        conv = F.conv_transpose3d if self.spatial_dims == 3 else F.conv_transpose2d
        return conv(y, self._kernel(channels, y), stride=2, groups=channels)

    @torch.no_grad()
    def start_even(self, conv: nn.Module) -> None:
        """Let the convolution before :meth:`inverse` draw blocks of one value at first.

        Blocks of unrelated values are a checkerboard, which training may leave behind (Aitken et al. 2017).

        Args:
            conv: gives ``C * factor`` channels.
        """
        ones = self.kernel.flatten(1).sum(1)  # (factor,): what a block of ones becomes
        for values in (conv.weight, conv.bias):
            first = values[:: self.factor].clone()  # (C, ...)
            values.copy_(torch.einsum("f,c...->cf...", ones, first).flatten(0, 1))  # (C factor, ...)


def refinement(spatial_dims: int, channels: int, hidden: int) -> nn.Module:
    """What is added behind an inverse stem at full resolution: zero at first, it lets neighbouring blocks agree."""
    conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
    last = conv(hidden, channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(conv(channels, hidden, 3, padding=1), nn.SiLU(), last)
