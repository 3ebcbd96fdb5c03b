"""The patch discriminator of the first stage's adversarial loss."""

from __future__ import annotations

import torch
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn

from ldm.errors import LdmError, nearest
from ldm.networks.frozen import without_own_gradients

ADVERSARIAL_LOSSES = ("least_squares", "hinge")


class Discriminator(nn.Module):
    """MONAI's ``PatchDiscriminator`` with its losses; every output is a raw score, without activation.

    Args:
        spatial_dims, in_channels: of the images.
        channels: features of the first layer.
        num_layers_d: number of strided layers.
        loss: ``least_squares`` (Mao et al. 2017) or ``hinge`` (Lim & Ye 2017).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        channels: int = 32,
        num_layers_d: int = 3,
        loss: str = "least_squares",
    ) -> None:
        super().__init__()
        if loss not in ADVERSARIAL_LOSSES:
            raise LdmError(
                f"vae.discriminator.loss '{loss}' is unknown; legal: {', '.join(ADVERSARIAL_LOSSES)}."
                f"{nearest(loss, ADVERSARIAL_LOSSES)}"
            )
        # instance norm would let the discriminator see other patches' statistics only of the same image, and
        # needs no synchronisation between ranks
        self.net = PatchDiscriminator(
            spatial_dims,
            channels=channels,
            in_channels=in_channels,
            out_channels=1,
            num_layers_d=num_layers_d,
            norm="INSTANCE",
        )
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        """Patch scores of images ``(B, C, *S)``."""
        return self.net(x)[-1].float()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """How clearly ``fake`` is told apart; its gradient reaches ``fake`` and never this network's weights."""
        score = without_own_gradients(self, fake)
        return (score - 1).square().mean() if self.loss == "least_squares" else -score.mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of this network; ``fake`` is detached."""
        on_real, on_fake = self(real), self(fake.detach())
        if self.loss == "least_squares":
            return 0.5 * ((on_real - 1).square().mean() + on_fake.square().mean())
        return 0.5 * (torch.relu(1 - on_real).mean() + torch.relu(1 + on_fake).mean())
