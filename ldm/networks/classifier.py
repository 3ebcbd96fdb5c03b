"""A classifier of noisy latents: the encoder half of a diffusion U-Net, told the time, with a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder
from torch import Tensor, nn

from ldm.errors import LdmError


class NoisyClassifier(nn.Module):
    """MONAI's ``DiffusionModelEncoder``, the network that Wolleb et al. 2022 guide with.

    Args:
        latent_shape: ``(C, *S)`` of what it sees; every level halves it, odd sides rounded up.
        num_classes: classes to tell apart.
        channels, num_res_blocks, attention_levels, num_head_channels, norm_num_groups, resblock_updown: as in MONAI's
            ``DiffusionModelEncoder``.

    Raises:
        LdmError: the sizes do not fit each other; the message is MONAI's with the values at fault.
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int] = (32, 64, 64, 64),
        num_res_blocks: int | Sequence[int] = 1,
        attention_levels: Sequence[bool] = (False, True, True, True),
        num_head_channels: int | Sequence[int] = 32,
        norm_num_groups: int = 32,
        resblock_updown: bool = False,
    ) -> None:
        super().__init__()
        in_channels, *size = latent_shape
        try:
            self.encoder = DiffusionModelEncoder(
                spatial_dims=len(size),
                in_channels=in_channels,
                out_channels=num_classes,
                input_shape=size,
                num_res_blocks=_tuple(num_res_blocks),
                channels=tuple(channels),
                attention_levels=tuple(attention_levels),
                num_head_channels=_tuple(num_head_channels),
                norm_num_groups=norm_num_groups,
                resblock_updown=resblock_updown,
            )
        except ValueError as error:
            raise LdmError(
                f"classifier.network: {error} (channels {list(channels)}, attention_levels {list(attention_levels)}, "
                f"num_head_channels {num_head_channels}, norm_num_groups {norm_num_groups})"
            ) from error

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` float32 of noisy latents ``(B, C, *S)`` at times ``(B,)``."""
        return self.encoder(x, t).to(torch.promote_types(x.dtype, torch.float32))


def _tuple(value: int | Sequence[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)
