"""Denoiser and conditioner as one network, which is what is trained, averaged and sampled from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.conditioning.covariates import Conditioning, build_conditioner
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.build import construct
from ldm.networks.denoiser import Denoiser


class ConditionalDenoiser(nn.Module):
    """A denoiser that takes encoded covariates.

    Args:
        header: model description with ``denoiser`` (arguments of the U-Net), ``condition``, ``latent_shape`` and, where
            the network also learns a variance and has twice the output channels, ``learned_variance``.
        schema: covariates to condition on.

    Raises:
        LdmError: an unknown setting, sizes that do not fit, or a latent the U-Net cannot halve often enough.
    """

    def __init__(self, header: Mapping[str, Any], schema: CovariateSchema) -> None:
        super().__init__()
        network, condition = dict(header["denoiser"]), header["condition"]
        latent_channels, *size = header["latent_shape"]
        levels = [len(covariate.levels or ()) for covariate in schema]
        self.conditioner = build_conditioner(levels, condition, 4 * network["channels"][0])
        mode = None if self.conditioner is None else self.conditioner.mode
        settings = {
            **network,
            "spatial_dims": len(size),
            "latent_channels": latent_channels,
            "out_channels": latent_channels * (2 if header.get("learned_variance") else 1),
            "plane_channels": 0 if self.conditioner is None else self.conditioner.plane_channels,
            "context_dim": None if self.conditioner is None else self.conditioner.context_dim(condition["dim"]),
            "embedding": mode == "adaptive_norm",
            "adaptive_norm": mode == "adaptive_norm",
        }
        self.denoiser = construct(Denoiser, settings, "ldm.network")
        factor = self.denoiser.downsampling_factor
        if any(length % factor for length in size):
            raise LdmError(
                f"A latent of {'x'.join(map(str, size))} cannot be halved {len(network['channels']) - 1} times by "
                f"the U-Net (every side must be a multiple of {factor}): use fewer ldm.network.channels, or a "
                f"data.shape that is a multiple of {factor} times the first stage's factor."
            )

    def forward(self, x: Tensor, t: Tensor, values: Tensor) -> Tensor:
        """Network output ``(B, C, *S)`` for noisy latents ``(B, C, *S)``, times ``(B,)`` and codes ``(B, K)``."""
        condition = Conditioning() if self.conditioner is None else self.conditioner(values)
        return self.denoiser(x, t, **condition.as_kwargs())
