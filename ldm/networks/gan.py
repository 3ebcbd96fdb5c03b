"""Networks of the GANs: generator, encoder and discriminator, in 2-D and 3-D.

Generator and encoder normalise every image by itself, so that what comes out for one image does not depend on the
others of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm as spectrally_normalised

from ldm.errors import LdmError, nearest
from ldm.networks.stem import BlockStem, refinement

NORMS = ("spectral", "group", "none")
SLOPE = 0.2  # of the leaky rectifiers


class Generator(nn.Module):
    """Noise and a condition to an image: a linear map to a small grid, then levels that double it.

    Every level repeats each voxel and then convolves, which leaves no checkerboard, unlike transposed convolutions,
    whose kernels overlap unevenly (Odena et al. 2016). Noise and condition go through one hidden layer, start the small
    grid, and scale and shift the normalised features of every level, as the class does in Brock et al. 2019. A side
    that is no multiple of ``2**levels`` is drawn a little larger and cut off on both ends.

    Args:
        spatial_dims: 2 or 3.
        out_channels: image channels.
        image_size: spatial shape of an image.
        latent_dim: numbers of noise.
        channels: features of each level, from coarse to fine; the last is at full resolution, or half of it (``stem``).
        embedding_dim: width of the condition, 0 for none.
        norm_num_groups: groups of the group normalisation.
        value_range: of the images, which end in a tanh that spans it; None leaves values unbounded.
        stem: ``space_to_depth`` or ``haar``: the last level is at half the resolution, and its last convolution gives
            blocks of 2x2(x2) voxels (:mod:`ldm.networks.stem`), which is many times cheaper in 3-D; ``none``.
        refine_channels: hidden channels of the residual convolution behind the stem; 0 leaves it out.

    Raises:
        LdmError: a channel count is not a multiple of ``norm_num_groups``, or an unknown stem.
    """

    def __init__(
        self,
        spatial_dims: int,
        out_channels: int,
        image_size: Sequence[int],
        latent_dim: int = 128,
        channels: Sequence[int] = (64, 64, 32, 16),
        embedding_dim: int = 0,
        norm_num_groups: int = 8,
        value_range: Sequence[float] | None = None,
        stem: str = "none",
        refine_channels: int = 8,
    ) -> None:
        super().__init__()
        _check_channels("gan.network.channels", channels, norm_num_groups)
        self.stem = None if stem == "none" else BlockStem(spatial_dims, stem)
        self.refine = None
        if self.stem is not None and refine_channels:
            self.refine = refinement(spatial_dims, out_channels, refine_channels)
        self.image_size = tuple(image_size)
        halvings = len(channels) + (self.stem is not None)
        self.grid = tuple(math.ceil(side / 2**halvings) for side in image_size)
        self.value_range = None if value_range is None else tuple(value_range)
        self.mapping = nn.Sequential(
            nn.Linear(latent_dim + embedding_dim, latent_dim),
            nn.LeakyReLU(SLOPE),
            nn.Linear(latent_dim, latent_dim),
            nn.LeakyReLU(SLOPE),
        )
        self.start = nn.Linear(latent_dim, channels[0] * math.prod(self.grid))
        self.levels = nn.ModuleList(
            UpBlock(spatial_dims, before, after, latent_dim, norm_num_groups)
            for before, after in zip((channels[0], *channels), channels, strict=False)
        )
        block = 1 if self.stem is None else self.stem.factor
        self.last = Convolution(spatial_dims, channels[-1], out_channels * block, kernel_size=3, conv_only=True)
        if self.stem is not None:
            self.stem.start_even(self.last.conv)

    def forward(self, z: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Images ``(B, C, *S)`` float32 of noise ``(B, latent_dim)`` and an embedding ``(B, E)``."""
        style = self.mapping(z if embedding is None else torch.cat([z, embedding], dim=1))  # (B, latent_dim)
        x = self.start(style).unflatten(1, (-1, *self.grid))  # (B, channels[0], *grid)
        for level in self.levels:
            x = level(x, style)  # (B, channels[i], *twice)
        x = self.last(x)
        if self.stem is not None:
            x = self.stem.inverse(x)  # (B, C, *twice)
        if self.refine is not None:
            x = x + self.refine(x)
        x = _centre(x, self.image_size).float()  # (B, C, *S)
        if self.value_range is None:
            return x
        low, high = self.value_range
        return (low + high) / 2 + (high - low) / 2 * x.tanh()


class UpBlock(nn.Module):
    """Twice the resolution: repeat, convolve, normalise, scale and shift by a style, rectify."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, style_dim: int, groups: int) -> None:
        super().__init__()
        self.conv = Convolution(spatial_dims, in_channels, out_channels, kernel_size=3, conv_only=True)
        self.norm = nn.GroupNorm(groups, out_channels, affine=False)
        self.modulation = nn.Linear(style_dim, 2 * out_channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """``(B, C, *S)`` and ``(B, style_dim)`` -> ``(B, out_channels, *2S)``."""
        x = self.norm(self.conv(F.interpolate(x, scale_factor=2, mode="nearest")))  # (B, out, *2S)
        scale, shift = self.modulation(style)[(..., *(None,) * (x.ndim - 2))].chunk(2, dim=1)  # (B, out, 1, ...) each
        return F.leaky_relu(x * (1 + scale) + shift, SLOPE)


class Encoder(nn.Module):
    """An image and a condition to the posterior of the generator's noise; strided convolutions and a linear map.

    Args:
        spatial_dims, in_channels, image_size: of the images.
        latent_dim: numbers of noise.
        channels: features of each level; every level halves the resolution.
        embedding_dim: width of the condition, 0 for none.
        norm_num_groups: groups of the group normalisation.

    Raises:
        LdmError: a channel count is not a multiple of ``norm_num_groups``, or the image is too small for the levels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        image_size: Sequence[int],
        latent_dim: int = 128,
        channels: Sequence[int] = (32, 64, 128, 128),
        embedding_dim: int = 0,
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()
        _check_channels("gan.encoder.channels", channels, norm_num_groups)
        norm = ("GROUP", {"num_groups": norm_num_groups})
        self.trunk = Trunk(spatial_dims, in_channels, image_size, channels, norm, "gan.encoder.channels")
        self.head = nn.Linear(self.trunk.size + embedding_dim, 2 * latent_dim)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, ``(B, latent_dim)`` float32 each, of images ``(B, C, *S)``."""
        features = self.trunk(x)[-1].flatten(1)  # (B, size)
        outputs = self.head(features if embedding is None else torch.cat([features, embedding], dim=1)).float()
        mean, log_variance = outputs.chunk(2, dim=1)  # (B, latent_dim) each
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


class ImageDiscriminator(nn.Module):
    """One raw score an image, which may depend on a condition: does this image look real, for this condition?

    Strided convolutions, a hidden layer that sees where things are, and a linear score; the condition adds its inner
    product with the hidden layer (Miyato & Koyama 2018).

    Args:
        spatial_dims, in_channels, image_size: of the images.
        channels: features of each level; every level halves the resolution.
        hidden: width of the hidden layer.
        embedding_dim: width of the condition, 0 for none.
        norm: ``spectral`` bounds the Lipschitz constant of every layer (Miyato et al. 2018); ``group`` normalises the
            features of each level over all channels and positions; ``none`` goes with a gradient penalty (Mescheder et
            al. 2018).
        minibatch_std: images that are compared with each other, 0 for none: the hidden layer also sees how much so
            many consecutive images of a batch differ (Karras et al. 2018, section 3), by which it recognises a
            generator that draws the same image again and again. With it a score depends on the batch.

    Raises:
        LdmError: the image is too small for the levels, an unknown ``norm``, or ``minibatch_std`` is 1 or less than 0.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        image_size: Sequence[int],
        channels: Sequence[int] = (32, 64, 128, 128),
        hidden: int = 128,
        embedding_dim: int = 0,
        norm: str = "spectral",
        minibatch_std: int = 0,
    ) -> None:
        super().__init__()
        if minibatch_std < 0 or minibatch_std == 1:
            raise LdmError(f"gan.discriminator.minibatch_std is {minibatch_std}; legal: 0 for none, or 2 and more.")
        self.minibatch_std = minibatch_std
        if norm not in NORMS:
            raise LdmError(
                f"gan.discriminator.norm '{norm}' is unknown; legal: {', '.join(NORMS)}.{nearest(str(norm), NORMS)}"
            )
        of_features = ("GROUP", {"num_groups": 1}) if norm == "group" else None
        self.trunk = Trunk(spatial_dims, in_channels, image_size, channels, of_features, "gan.discriminator.channels")
        self.hidden = nn.Linear(self.trunk.size + bool(minibatch_std), hidden)
        self.score = nn.Linear(hidden, 1)
        self.project = nn.Linear(embedding_dim, hidden, bias=False) if embedding_dim else None
        if norm == "spectral":
            for module in [one for one in self.modules() if isinstance(one, nn.Conv2d | nn.Conv3d | nn.Linear)]:
                spectrally_normalised(module)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Raw scores ``(B,)`` float32 of images ``(B, C, *S)`` and an embedding ``(B, E)``."""
        features = self.trunk(x)[-1].flatten(1)  # (B, size)
        if self.minibatch_std:
            features = torch.cat([features, minibatch_spread(features, self.minibatch_std)], dim=1)  # (B, size + 1)
        h = F.leaky_relu(self.hidden(features), SLOPE)  # (B, hidden)
        score = self.score(h)[:, 0]  # (B,)
        if embedding is not None and self.project is not None:
            score = score + (self.project(embedding) * h).sum(1)
        return score.float()


def minibatch_spread(features: Tensor, group: int) -> Tensor:
    """How much each ``group`` consecutive rows of ``(B, F)`` differ: their mean standard deviation, ``(B, 1)``.

    What is left over at the end is a smaller group. Rows that are all alike have a spread of next to 0, and a gradient
    of 0 instead of an undefined one.
    """
    groups = features.float().split(group)
    spreads = [rows.var(0, correction=0).add(1e-8).sqrt().mean().expand(len(rows), 1) for rows in groups]
    return torch.cat(spreads)  # (B, 1)


class Trunk(nn.Module):
    """Convolutions that halve the resolution, each rectified.

    Attributes:
        size: number of features of the last level, all positions together.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, image_size: Sequence[int], channels: Sequence[int], norm, where: str
    ) -> None:
        super().__init__()
        if not channels or min(image_size) < 2 ** len(channels):
            raise LdmError(
                f"{where} is {list(channels)}: an image of {'x'.join(map(str, image_size))} can be halved "
                f"{int(math.log2(min(image_size)))} times; legal: one to as many levels."
            )
        rectifier = ("LEAKYRELU", {"negative_slope": SLOPE})
        self.levels = nn.ModuleList(
            # a kernel that its stride divides touches every voxel equally often
            Convolution(spatial_dims, before, after, 2, 4, adn_ordering="NA", act=rectifier, norm=norm, padding=1)
            for before, after in zip((in_channels, *channels), channels, strict=False)
        )
        self.size = channels[-1] * math.prod(side // 2 ** len(channels) for side in image_size)

    def forward(self, x: Tensor, count: int | None = None) -> list[Tensor]:
        """Features ``(B, channels[i], *S / 2^(i+1))`` of the first ``count`` levels, all by default."""
        features = []
        for level in self.levels[:count]:
            x = level(x)
            features.append(x)
        return features


def _centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle ``(B, C, *size)`` of a larger ``x``."""
    starts = [(whole - side) // 2 for whole, side in zip(x.shape[2:], size, strict=True)]
    return x[(..., *(slice(start, start + side) for start, side in zip(starts, size, strict=True)))]


def _check_channels(where: str, channels: Sequence[int], groups: int) -> None:
    if not channels or any(width < 1 or width % groups for width in channels):
        raise LdmError(f"{where} is {list(channels)}; every level needs a multiple of norm_num_groups, {groups}.")
