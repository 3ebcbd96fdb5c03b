"""First-stage networks: MONAI's ``AutoencoderKL`` with an invertible stem, and the identity.

Every first stage answers the same four questions: ``encode(x)`` gives the mean and standard deviation
of the posterior, ``decode(z)`` gives images, ``downsampling_factor`` and ``latent_channels`` give the
shape of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL
from torch import Tensor, nn

from ldm.errors import LdmError, nearest
from ldm.networks.stem import STEMS, BlockStem, refinement


class AutoencoderKL(MonaiAutoencoderKL):
    """KL-regularised autoencoder with MONAI's arguments and state-dict keys, and an optional stem.

    With ``stem="none"`` it *is* MONAI's network, so published weights load by name. With a stem the
    network sees ``2**spatial_dims`` times the channels at half the resolution, which removes the most
    expensive level; a small full-resolution residual convolution after the inverse stem (zero at the
    start of training) lets neighbouring blocks agree, so that no block pattern is left.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels, also the number of output channels.
        channels: feature channels per level; each level after the first halves the resolution.
        num_res_blocks: residual blocks per level.
        attention_levels: which levels have self-attention.
        latent_channels: channels of a latent.
        norm_num_groups: groups of the group normalisation.
        stem: ``none``, ``space_to_depth``, ``haar``, or ``auto`` (``space_to_depth`` in 3-D, ``none`` in 2-D).
        refine_channels: hidden channels of the residual convolution behind the inverse stem; 0 leaves it out.
        use_checkpoint: recompute activations in the backward pass to save memory.

    Raises:
        LdmError: the stem is unknown, or a channel count is not a multiple of ``norm_num_groups``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128),
        num_res_blocks: int | Sequence[int] = 1,
        attention_levels: Sequence[bool] = (False, False),
        latent_channels: int = 3,
        norm_num_groups: int = 16,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = False,
        with_decoder_nonlocal_attn: bool = False,
        use_checkpoint: bool = False,
        use_flash_attention: bool = True,
        stem: str = "auto",
        refine_channels: int = 8,
    ) -> None:
        if stem == "auto":
            stem = "space_to_depth" if spatial_dims == 3 else "none"
        if stem not in STEMS:
            raise LdmError(f"stem '{stem}' is unknown; legal: auto, {', '.join(STEMS)}.{nearest(stem, STEMS)}")
        block = 1 if stem == "none" else 2**spatial_dims
        try:
            super().__init__(
                spatial_dims,
                in_channels=in_channels * block,
                out_channels=in_channels * block,
                channels=tuple(channels),
                num_res_blocks=num_res_blocks if isinstance(num_res_blocks, int) else tuple(num_res_blocks),
                attention_levels=tuple(attention_levels),
                latent_channels=latent_channels,
                norm_num_groups=norm_num_groups,
                norm_eps=norm_eps,
                with_encoder_nonlocal_attn=with_encoder_nonlocal_attn,
                with_decoder_nonlocal_attn=with_decoder_nonlocal_attn,
                use_checkpoint=use_checkpoint,
                use_flash_attention=use_flash_attention,
            )
        except ValueError as error:
            raise LdmError(
                f"vae.network: {error} (channels {list(channels)}, attention_levels {list(attention_levels)}, "
                f"norm_num_groups {norm_num_groups}, num_res_blocks {num_res_blocks})"
            ) from error
        self.spatial_dims, self.stem_kind = spatial_dims, stem
        self.stem = None if stem == "none" else BlockStem(spatial_dims, stem)
        self.refine = None
        if self.stem is not None and refine_channels:
            self.refine = refinement(spatial_dims, in_channels, refine_channels)
        halvings = len(channels) - 1 + (self.stem is not None)
        self.downsampling_factor = 2**halvings
        if spatial_dims == 3:  # the layout in which CPU and GPU convolutions are fastest
            self.to(memory_format=torch.channels_last_3d)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the losses' gradient norms are compared."""
        return self.decoder.blocks[-1].conv.weight

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of an image.

        Args:
            x: ``(B, C, D, H, W)`` in the model's stored range; 2-D: ``(B, C, H, W)``.

        Returns:
            Mean and standard deviation, each ``(B, latent_channels, D/f, H/f, W/f)``.
        """
        if self.stem is not None:
            x = self.stem(x)  # (B, 8C, D/2, H/2, W/2)
        return super().encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Image of a raw latent: ``(B, latent_channels, D/f, H/f, W/f)`` -> ``(B, C, D, H, W)``."""
        x = super().decode(z)
        if self.stem is not None:
            x = self.stem.inverse(x)  # (B, C, D, H, W)
        return x if self.refine is None else x + self.refine(x)


class IdentityAutoencoder(nn.Module):
    """The first stage of pixel-space diffusion: an image is its own latent, without uncertainty."""

    downsampling_factor = 1

    def __init__(self, spatial_dims: int, in_channels: int = 1) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.latent_channels = in_channels

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image as mean, with zero standard deviation."""
        return x, torch.zeros_like(x)

    def decode(self, z: Tensor) -> Tensor:
        """The latent as it is."""
        return z
