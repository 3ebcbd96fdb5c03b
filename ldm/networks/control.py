"""ControlNet (Zhang et al. 2023): a second encoder that steers a denoiser which stays as it is."""

from __future__ import annotations

import torch
from monai.networks.nets.controlnet import ControlNet
from torch import Tensor, nn

from ldm.networks.denoiser import Denoiser, Residuals


class Control(nn.Module):
    """MONAI's ``ControlNet`` for a denoiser: a copy of the encoder half of its U-Net that also sees a hint.

    The hint passes a convolution that starts at zero, and so does what is added to the features of the denoiser
    ("zero convolutions"), so that an untrained control changes nothing. The hint is on the latent grid already, so
    that its embedding does not halve it.

    Args:
        denoiser: what is controlled.
        hint_channels: channels of the hint.
    """

    def __init__(self, denoiser: Denoiser, hint_channels: int) -> None:
        super().__init__()
        arguments = denoiser.encoder_arguments
        self.net = denoiser.adapted(
            ControlNet(
                **arguments,
                conditioning_embedding_in_channels=denoiser.patch_factor * hint_channels,
                conditioning_embedding_num_channels=arguments["channels"][:1],
            )
        )

    @torch.no_grad()
    def copy_encoder(self, denoiser: Denoiser) -> None:
        """Start from the weights of the denoiser's encoder."""
        theirs = denoiser.unet.state_dict()
        for name, value in self.net.state_dict().items():
            if not name.startswith("controlnet_"):
                value.copy_(theirs[name])

    def forward(
        self, x: Tensor, t: Tensor, hint: Tensor, context: Tensor | None, embedding: Tensor | None
    ) -> Residuals:
        """What to add to the features of the denoiser; nothing for samples without a hint.

        Args:
            x: ``(B, C, D, H, W)``, what the first convolution of the denoiser sees.
            t: ``(B,)``.
            hint: ``(B, P, D, H, W)``, on the same grid; NaN for a sample that is not controlled.
            context, embedding: see :class:`Denoiser`.
        """
        given = ~hint.isnan().flatten(1).any(1)  # (B,)
        switch = given.view(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)
        hint = torch.where(switch, hint, 0).to(x.dtype)
        down, middle = self.net(x, t, controlnet_cond=hint, context=context, class_labels=embedding)
        return [torch.where(switch, one, 0) for one in down], torch.where(switch, middle, 0)
