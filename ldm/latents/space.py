"""The three named spaces: image -> raw latent (posterior mean, std) -> scaled latent."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.errors import LdmError


class LatentSpace(nn.Module):
    """Converts between raw and scaled latents; the only place where a latent is scaled.

    The statistics are those of a posterior *draw*, so a scaled latent has zero mean and unit standard
    deviation per channel over the training split, posterior noise included. They are buffers and travel
    with the weights.

    Args:
        mean, std: ``(C,)`` per-channel statistics of raw latents.

    Raises:
        LdmError: the statistics are not finite, or a channel is constant (a collapsed first stage).
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        if mean.shape != std.shape or mean.ndim != 1:
            raise LdmError(f"Latent statistics need one value a channel, got {tuple(mean.shape)}, {tuple(std.shape)}.")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise LdmError("Latent statistics are not finite: the first stage produces NaN or Inf; train it again.")
        if (std <= 1e-6).any():
            dead = ", ".join(str(int(channel)) for channel in (std <= 1e-6).nonzero())
            raise LdmError(
                f"Latent channel(s) {dead} are constant over the training split: the first stage has collapsed "
                "there. Lower vae.loss.kl_weight or vae.network.latent_channels and train it again."
            )
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())

    @classmethod
    def identity(cls, channels: int) -> LatentSpace:
        """Statistics that change nothing: published weights that were trained without scaling."""
        zeros = torch.zeros(channels, device="cpu")  # whose values are looked at, also in a model without memory
        return cls(zeros, torch.ones_like(zeros))

    @classmethod
    def fit(cls, posteriors: Iterable[tuple[Tensor, Tensor]]) -> LatentSpace:
        """Statistics over batches of posteriors, accumulated in float64.

        Args:
            posteriors: (mean, std) pairs, each ``(B, C, *S)``.
        """
        count, total, squares = 0, 0.0, 0.0
        for mean, std in posteriors:
            axes = [0, *range(2, mean.ndim)]
            mean, std = mean.double(), std.double()
            count += mean.numel() // mean.shape[1]
            total = total + mean.sum(axes)  # (C,)
            squares = squares + (mean**2 + std**2).sum(axes)  # E[z^2] of a draw z = mean + std * eps
        if not count:
            raise LdmError("No latents to fit statistics on: the training split is empty.")
        mean = total / count
        return cls(mean, (squares / count - mean**2).clamp(min=0).sqrt())

    def _spread(self, buffer: Tensor, like: Tensor) -> Tensor:
        return buffer.reshape(1, -1, *(1,) * (like.ndim - 2))

    def to_scaled(self, raw: Tensor) -> Tensor:
        """Raw latent ``(B, C, *S)`` -> scaled latent, zero mean and unit std per channel."""
        return (raw - self._spread(self.mean, raw)) / self._spread(self.std, raw)

    def to_raw(self, scaled: Tensor) -> Tensor:
        """Scaled latent ``(B, C, *S)`` -> raw latent, what the decoder takes."""
        return scaled * self._spread(self.std, scaled) + self._spread(self.mean, scaled)

    def draw(self, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
        """A scaled draw of the posterior: ``to_scaled(mean + std * eps)``, all ``(B, C, *S)``."""
        return self.to_scaled(mean + std * eps)
