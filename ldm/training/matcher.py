"""Trains the network that recognises a scan again, by contrast (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.model.matcher import build_matcher
from ldm.training.module import StageModule


class MatcherModule(StageModule):
    """Two views of one scan come to lie together, views of different subjects apart.

    Args:
        network: see :func:`ldm.model.matcher.build_matcher`.
        optimizer: see :class:`ldm.training.module.StageModule`.
        temperature: of the loss; smaller looks at the nearest others only.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        temperature: float = 0.1,
        log_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.network = build_matcher(network)
        self.temperature, self.log_every = temperature, log_every
        self.validation: dict[str, Any] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return self.adamw(self.network.parameters())

    def embed(self, views: Tensor) -> Tensor:
        """Unit vectors ``(2, B, E)`` of views ``(B, 2, C, *S)``."""
        z = F.normalize(self.network(views.flatten(0, 1)), dim=1)  # (2 B, E)
        return z.unflatten(0, (-1, 2)).transpose(0, 1)  # (2, B, E)

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch of ``views`` ``(B, 2, C, *S)`` and ``subject`` ``(B,)``."""
        loss = nt_xent(self.embed(batch["views"]), batch["subject"], self.temperature)
        self.require_finite(loss.detach(), {"nt_xent": loss.detach()}, batch["index"])
        norms = self.step_optimizers(loss, [self.network])
        if norms is not None and (self.step - 1) % self.log_every == 0:
            values = {"matcher/train/loss": loss.detach(), "matcher/train/grad_norm": sum(norms.values())}
            self.record(values, reduce=True)

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self.validation = {"z": [], "subject": []}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Keep embeddings and subjects."""
        self.validation["z"].append(self.embed(batch["views"]))
        self.validation["subject"].append(batch["subject"])

    def on_validation_epoch_end(self) -> None:
        """Log the loss and how often a validation scan is recognised, over the scans of all ranks."""
        z, subject = torch.cat(self.validation["z"], 1), torch.cat(self.validation["subject"])  # (2, N, E), (N,)
        if self.trainer.world_size > 1:
            z = self.all_gather(z).transpose(0, 1).flatten(1, 2)  # (2, W N, E)
            subject = self.all_gather(subject).flatten()
        values = {"loss": nt_xent(z, subject, self.temperature), "recognised": recognised(z, subject)}
        self.record({f"matcher/val/{name}": value for name, value in values.items()})


def nt_xent(z: Tensor, subject: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, eq. 1), averaged over all views.

    Two scans of one subject are no example of different ones: they are left out of each other's denominator.

    Args:
        z: ``(2, B, E)`` unit vectors of two views of B scans.
        subject: ``(B,)`` whose scans they are.
        temperature: tau.
    """
    flat, who = z.flatten(0, 1).float(), subject.repeat(2)  # (2 B, E), (2 B,)
    partner = torch.arange(len(flat), device=z.device).roll(len(subject))  # (2 B,)
    logits = _products(flat, flat) / temperature  # (2 B, 2 B)
    hidden = who[:, None] == who[None]  # (2 B, 2 B)
    hidden[torch.arange(len(flat), device=z.device), partner] = False
    return F.cross_entropy(logits.masked_fill(hidden, -torch.inf), partner)


def recognised(z: Tensor, subject: Tensor) -> float:
    """Share of first views whose nearest second view is of the same subject; ``z`` ``(2, N, E)``, ``(N,)``."""
    found = _products(*z).argmax(1)  # (N,)
    return float((subject[found] == subject).float().mean())


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Inner products ``(N, M)`` in float32: near 1, those of neighbours are one number in bfloat16."""
    with torch.autocast(first.device.type, enabled=False):
        return first.float() @ second.float().T
