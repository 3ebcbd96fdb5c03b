"""Denoiser and conditioners as one network, which is what is trained, averaged and sampled from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.conditioning.base import Condition
from ldm.conditioning.build import build_conditioners
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.build import construct
from ldm.networks.control import Control
from ldm.networks.denoiser import Denoiser
from ldm.networks.frozen import freeze

#: Where the only conditioner was, in files that were written before there could be several.
OLD_PREFIX, PREFIX = "conditioner.", "conditioners.covariates."


class ConditionalDenoiser(nn.Module):
    """A denoiser that takes a condition, and perhaps a control.

    With a control (a conditioner of mode ``control``) it alone is trained; denoiser and other conditioners are frozen.

    Args:
        header: model description with ``denoiser`` (arguments of the U-Net), ``condition``, ``latent_shape`` and, where
            there are any, ``conditioners``; ``learned_variance`` where the network has twice the output channels.
        schema: covariates to condition on.

    Raises:
        LdmError: an unknown setting, sizes that do not fit, or a latent the U-Net cannot halve often enough.
    """

    def __init__(self, header: Mapping[str, Any], schema: CovariateSchema) -> None:
        super().__init__()
        network, condition = dict(header["denoiser"]), header["condition"]
        latent_channels, *size = header["latent_shape"]
        self.conditioners = build_conditioners(
            schema, condition, header.get("conditioners", {}), len(size), 4 * network["channels"][0]
        )
        settings = {
            **network,
            "spatial_dims": len(size),
            "latent_channels": latent_channels,
            "out_channels": latent_channels * (2 if header.get("learned_variance") else 1),
            "plane_channels": self.conditioners.plane_channels,
            "context_dim": self.conditioners.context_dim,
            "context_padding": self.conditioners.has_padding,
            "spade_channels": self.conditioners.spade_channels,
            "embedding": self.conditioners.has_embedding,
            "adaptive_norm": self.conditioners.has_embedding,
        }
        self.denoiser = construct(Denoiser, settings, "ldm.network")
        factor = self.denoiser.downsampling_factor
        if any(length % factor for length in size):
            raise LdmError(
                f"A latent of {'x'.join(map(str, size))} cannot be halved {factor.bit_length() - 1} times by "
                f"the U-Net (every side must be a multiple of {factor}): use fewer ldm.network.channels or "
                f"patch_size 1, or a data.shape that is a multiple of {factor} times the first stage's factor."
            )

        self.control: Control | None = None
        if self.conditioners.control_channels:
            self.control = Control(self.denoiser, self.conditioners.control_channels)
            for part in (self.denoiser, *self.conditioners.values()):
                freeze(part)

    def start_control(self, other: ConditionalDenoiser) -> None:
        """Put a trained network in place of the frozen one, and start the control from its encoder.

        Args:
            other: the same network without a control.
        """
        self.denoiser.load_state_dict(other.denoiser.state_dict())
        self.conditioners.load_state_dict(other.conditioners.state_dict())
        self.control.copy_encoder(self.denoiser)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Network output ``(B, C, *S)`` for noisy latents ``(B, C, *S)``, times ``(B,)`` and a condition.

        Raises:
            LdmError: a part of the condition is missing, or has a wrong shape.
        """
        given = self.conditioners(condition)
        residuals = None
        if self.control is not None:
            seen = self.denoiser.with_planes(x, given.planes)
            hint = self.denoiser.patched(given.control)
            residuals = self.control(seen, t, hint, given.context, given.embedding)
        return self.denoiser(x, t, given.planes, given.context, given.embedding, given.spade, residuals)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        renamed = with_new_names(state_dict, prefix)
        state_dict.clear()
        state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def with_new_names(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict of this network, under ``prefix``, with the conditioner of older files where it is today."""
    old = prefix + OLD_PREFIX
    return {f"{prefix}{PREFIX}{n.removeprefix(old)}" if n.startswith(old) else n: v for n, v in tensors.items()}
