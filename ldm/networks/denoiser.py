"""The second-stage network: MONAI's ``DiffusionModelUNet`` behind one call.

Conditions reach it in four ways, freely combined: ``planes`` are concatenated to the noisy latent, ``context`` tokens
are attended to, an ``embedding`` joins the time embedding, and ``spade`` planes modulate the decoder's normalisations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from monai.networks.blocks.crossattention import CrossAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, DiffusionUNetResnetBlock
from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffResBlock, SPADEDiffusionModelUNet
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.networks.stem import BlockStem

PATCH_SIZES = (1, 2)

#: of a control: for every feature map that the encoder hands to the decoder, and for the middle
Residuals = tuple[Sequence[Tensor], Tensor]


def loses_means(channels: Sequence[int], norm_num_groups: int) -> bool:
    """Whether the last group normalisation treats every channel on its own.

    It then takes away the spatial mean of every feature, and what the network should predict has one: that of noise on
    16 x 16 voxels has a standard deviation of 1/16. Where there is hardly anything but noise, x0 is what is left of
    epsilon after a division by alpha, 0.01 and less, so that samples of epsilon models drift away.
    """
    return channels[0] <= norm_num_groups


class Denoiser(nn.Module):
    """U-Net that predicts, from a noisy latent, whatever the prediction type asks for.

    Args:
        spatial_dims: 2 or 3.
        latent_channels: channels of the noisy latent, and of the output.
        plane_channels: channels of the conditions that are concatenated to the input.
        context_dim: width of a context token; None builds self-attention instead of cross-attention.
        context_padding: whether a token of the context that is NaN is left out of the attention.
        embedding: whether a condition embedding of width ``4 * channels[0]`` is added to the time embedding.
        adaptive_norm: let the (time + condition) embedding scale and shift the second normalisation of every
            residual block (Dhariwal & Nichol 2021, eq. 9) where MONAI's block only adds it; with SPADE, of those of
            the encoder and the middle.
        spade_channels: classes of a label map that scales and shifts the decoder's normalisations voxel by voxel
            (Park et al. 2019), as in MONAI's ``SPADEDiffusionModelUNet``; 0 for none.
        position_frequencies: sine and cosine pairs per axis that tell every voxel of the latent where it stands, plus
            the coordinate itself; for cohorts in one space, such as registered brains. 0 for none.
        patch_size: 2 lets the U-Net see every 2x2(x2) block of the latent as channels of one voxel, which makes large
            latents cheap (Peebles & Xie 2023, section 3.2; Hoogeboom et al. 2023, section 3.3). The map is orthonormal:
            noise stays noise, and the loss has the same value on either side. 1: every voxel on its own.
        dropout: share of the features of every residual block that is left out in training, before its last
            convolution (Ho et al. 2020, appendix B), against learning few images by heart.
        out_channels: output channels; None for ``latent_channels``.
        channels, num_res_blocks, attention_levels, num_head_channels, norm_num_groups, resblock_updown,
            transformer_num_layers: as in MONAI's ``DiffusionModelUNet``.

    Raises:
        LdmError: the sizes do not fit each other; the message is MONAI's with the values at fault.
    """

    def __init__(
        self,
        spatial_dims: int,
        latent_channels: int,
        plane_channels: int = 0,
        context_dim: int | None = None,
        context_padding: bool = False,
        embedding: bool = False,
        adaptive_norm: bool = False,
        spade_channels: int = 0,
        position_frequencies: int = 0,
        patch_size: int = 1,
        dropout: float = 0.0,
        out_channels: int | None = None,
        channels: Sequence[int] = (64, 128, 192),
        num_res_blocks: int | Sequence[int] = 2,
        attention_levels: Sequence[bool] = (False, False, True),
        num_head_channels: int | Sequence[int] = 32,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resblock_updown: bool = False,
        transformer_num_layers: int = 1,
        use_flash_attention: bool = True,
    ) -> None:
        super().__init__()
        if patch_size not in PATCH_SIZES:
            raise LdmError(
                f"ldm.network.patch_size {patch_size} is not legal; legal: {', '.join(map(str, PATCH_SIZES))}."
            )
        if not 0 <= dropout < 1:
            raise LdmError(f"ldm.network.dropout {dropout} is not legal: a share from 0 (off) to below 1.")
        patch_factor = patch_size**spatial_dims
        position_channels = spatial_dims * (1 + 2 * position_frequencies) if position_frequencies else 0
        self.encoder_arguments = {
            "spatial_dims": spatial_dims,
            "in_channels": position_channels + patch_factor * (latent_channels + plane_channels),
            "channels": tuple(channels),
            "num_res_blocks": _tuple(num_res_blocks),
            "attention_levels": tuple(attention_levels),
            "num_head_channels": _tuple(num_head_channels),
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "resblock_updown": resblock_updown,
            "transformer_num_layers": transformer_num_layers,
            "with_conditioning": context_dim is not None,
            "cross_attention_dim": context_dim,
            "num_class_embeds": 1 if embedding else None,
            "use_flash_attention": use_flash_attention,
        }
        self.spatial_dims, self.position_frequencies = spatial_dims, position_frequencies
        self.patch_factor = patch_factor
        self.adaptive_norm, self.context_padding, self.dropout = adaptive_norm, context_padding, dropout
        kind, spade = (
            (SPADEDiffusionModelUNet, {"label_nc": spade_channels}) if spade_channels else (DiffusionModelUNet, {})
        )
        try:
            unet = kind(
                **self.encoder_arguments, **spade, out_channels=patch_factor * (out_channels or latent_channels)
            )
        except ValueError as error:
            raise LdmError(
                f"ldm.network: {error} (channels {list(channels)}, attention_levels {list(attention_levels)}, "
                f"num_head_channels {num_head_channels}, norm_num_groups {norm_num_groups})"
            ) from error
        self.unet = self.adapted(unet)
        self.patches = BlockStem(spatial_dims, "space_to_depth") if patch_size == 2 else None
        self.downsampling_factor = patch_size * 2 ** (len(channels) - 1)

    def adapted(self, network: nn.Module) -> nn.Module:
        """A network of MONAI's blocks, with ours where they differ; returns it."""
        if self.encoder_arguments["num_class_embeds"]:
            network.class_embedding = nn.Identity()  # MONAI's turns class_labels into what is added; ours is ready-made
        if self.adaptive_norm:
            _replace(network, DiffusionUNetResnetBlock, AdaptiveResnetBlock)
        if self.context_padding:
            _replace(network, CrossAttentionBlock, PaddedAttention)
        if self.dropout:
            _drop_features(network, self.dropout)
        return network.to(memory_format=torch.channels_last_3d) if self.spatial_dims == 3 else network

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        planes: Tensor | None = None,
        context: Tensor | None = None,
        embedding: Tensor | None = None,
        spade: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Network output for a noisy latent.

        Args:
            x: ``(B, C, D, H, W)`` noisy scaled latent.
            t: ``(B,)`` timesteps.
            planes: ``(B, P)`` values, each spread over the whole latent, or ``(B, P, D, H, W)``.
            context: ``(B, tokens, context_dim)``; with ``context_padding`` tokens of NaN are no tokens.
            embedding: ``(B, 4 * channels[0])``.
            spade: ``(B, spade_channels, D, H, W)``.
            residuals: what a control adds to the features that go to the decoder.

        Returns:
            ``(B, out_channels, D, H, W)`` in float32.
        """
        down, middle = residuals or (None, None)
        conditions: dict[str, Any] = {"context": context, "class_labels": embedding}
        if spade is not None:
            conditions["seg"] = spade
        out = self.unet(
            self.with_planes(x, planes),
            t,
            **conditions,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
        return (out if self.patches is None else self.patches.inverse(out)).float()  # (B, out_channels, D, H, W)

    def with_planes(self, x: Tensor, planes: Tensor | None) -> Tensor:
        """The noisy latent ``(B, C, D, H, W)`` with positions and planes behind it: what the first convolution sees."""
        inputs = [self.patched(x)]  # (B, 8 C, D/2, H/2, W/2) with patches, else (B, C, D, H, W), as all below
        if self.position_frequencies:
            where = positions(inputs[0].shape[2:], self.position_frequencies, x.device)  # (1, Q, D, H, W)
            inputs.append(where.to(x.dtype).expand(len(x), *where.shape[1:]))
        if planes is not None:
            if planes.ndim == 2:
                planes = planes.reshape(*planes.shape, *(1,) * self.spatial_dims)
            inputs.append(self.patched(planes.to(x.dtype).expand(-1, -1, *x.shape[2:])))  # (B, P, D, H, W)
        return torch.cat(inputs, dim=1)

    def patched(self, x: Tensor) -> Tensor:
        """An image on the latent grid as the U-Net sees it: with patches ``(B, 8 C, D/2, H/2, W/2)``."""
        return x if self.patches is None else self.patches(x)


def positions(size: Sequence[int], num_frequencies: int, device: torch.device) -> Tensor:
    """Coordinates in [-1, 1] along each axis with sines and cosines of pi, 2 pi, 4 pi, ... times them.

    Returns:
        ``(1, axes * (1 + 2 num_frequencies), *size)``.
    """
    axes = torch.meshgrid(*(torch.linspace(-1, 1, side, device=device) for side in size), indexing="ij")
    planes = []
    for axis in axes:
        angles = [torch.pi * 2**k * axis for k in range(num_frequencies)]
        planes += [axis, *(f(angle) for angle in angles for f in (torch.sin, torch.cos))]
    return torch.stack(planes)[None]


class AdaptiveResnetBlock(nn.Module):
    """MONAI's residual block with adaptive group normalisation.

    h = GroupNorm(conv1(...)) * (1 + scale) + shift, with (scale, shift) a linear map of the embedding that is
    zero at the start of training (Dhariwal & Nichol 2021, eq. 9).
    """

    def __init__(self, block: DiffusionUNetResnetBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.nonlinearity, self.skip_connection = block.nonlinearity, block.skip_connection
        self.resample = block.upsample or block.downsample
        self.emb_proj = nn.Linear(block.emb_channels, 2 * block.out_channels)
        nn.init.zeros_(self.emb_proj.weight)
        nn.init.zeros_(self.emb_proj.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` and ``(B, E)`` -> ``(B, C', D', H', W')``."""
        h = self.nonlinearity(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        scale, shift = self.emb_proj(self.nonlinearity(emb)).chunk(2, dim=1)  # (B, C') each
        spread = (..., *(None,) * (x.ndim - 2))
        h = self.norm2(h) * (1 + scale[spread]) + shift[spread]
        return self.skip_connection(x) + self.conv2(self.nonlinearity(h))


class PaddedAttention(nn.Module):
    """MONAI's cross-attention that leaves out tokens of NaN; every sample needs one that is none."""

    def __init__(self, block: CrossAttentionBlock) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out_proj = block.to_q, block.to_k, block.to_v, block.out_proj
        self.num_heads, self.scale = block.num_heads, block.scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` and a context ``(B, tokens, context_dim)`` -> ``(B, N, C)``."""
        context = x if context is None else context
        present = ~context.isnan().any(-1)  # (B, tokens)
        context = torch.where(present[..., None], context, 0)
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N or tokens, C / heads)
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, present[:, None, None], scale=self.scale)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, C)


def _drop_features(network: nn.Module, share: float) -> None:
    """Dropout before the last convolution of every residual block; by hooks, so that tensors keep their names."""
    for block in network.modules():
        if isinstance(block, (DiffusionUNetResnetBlock, SPADEDiffResBlock, AdaptiveResnetBlock)):
            block.conv2.register_forward_pre_hook(partial(_drop, share))


def _drop(share: float, convolution: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (nn.functional.dropout(inputs[0], share, convolution.training),)


def _replace(module: nn.Module, old: type[nn.Module], new: Callable[[nn.Module], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, old):
            setattr(module, name, new(child))
        else:
            _replace(child, old, new)


def _tuple(value: int | Sequence[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)
