"""Trains the classifier of noisy latents that guides a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.schema import Covariate
from ldm.diffusion.noise import step_generator
from ldm.errors import LdmError
from ldm.model.classifier import build_classifier, evaluate
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.module import StageModule

NUM_BINS = 10


class ClassifierModule(StageModule):
    """Cross-entropy on noisy latents, at the times and with the noise of the diffusion model's own training.

    Args:
        network: see :func:`ldm.model.classifier.build_classifier`.
        model: the diffusion model: latent space and schedule. It is neither trained nor stored here.
        target: categorical covariate whose levels are the classes.
        weights: of the classes in the loss, ``(L,)``.
        optimizer: see :class:`ldm.training.module.StageModule`.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        model: LatentDiffusionModel,
        target: Covariate,
        weights: Sequence[float],
        optimizer: Mapping[str, Any],
        log_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.network = build_classifier(network)
        self.target, self.log_every = target, log_every
        self.column = model.schema.names.index(target.name)
        self.schedule, self._space = model.schedule, [model.latent_space]
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.validation: dict[str, Any] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return self.adamw(self.network.parameters())

    def on_fit_start(self) -> None:
        """Statistics and weights follow the module to its device."""
        self._space[0].to(self.device)
        self.weights = self.weights.to(self.device)

    on_validation_start = on_fit_start

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch: draw the posterior, the time and the noise; weighted cross-entropy of the class."""
        logits, classes = self._logits(batch, self.generators(len(batch["mean"])))
        given = classes >= 0
        each = F.cross_entropy(logits, classes.clamp(min=0), self.weights, reduction="none")  # (B,)
        loss = (each * given).sum() / given.sum().clamp(min=1)
        self.require_finite(loss.detach(), {"loss": loss.detach()}, batch["row"])
        norms = self.step_optimizers(loss, [self.network])
        if norms is not None and (self.step - 1) % self.log_every == 0:
            accuracy = ((logits.argmax(1) == classes) & given).sum() / given.sum().clamp(min=1)
            values = {"loss": loss.detach(), "accuracy": accuracy, "grad_norm": sum(norms.values())}
            self.record({f"classifier/train/{name}": value for name, value in values.items()}, reduce=True)

    def _logits(
        self, batch: Mapping[str, Any], streams: Sequence[torch.Generator], u: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits ``(B, L)`` of freshly noised latents, and classes ``(B,)``, -1 where the target is missing.

        Args:
            batch: ``mean``, ``std`` ``(B, C, *S)`` and ``covariates`` ``(B, K)``.
            streams: a generator a sample.
            u: quantile of the training times for all, or None to draw one each.
        """
        mean, std = batch["mean"].float(), batch["std"].float()
        shape = mean.shape[1:]
        drawn = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in streams])  # (B,)
        t = self.schedule.time_at(drawn if u is None else torch.full_like(drawn, u)).to(mean.device)  # (B,)
        posterior, eps = (
            torch.stack([torch.randn(shape, generator=g) for g in streams]).to(mean.device) for _ in range(2)
        )
        with torch.autocast(mean.device.type, enabled=False):  # the process itself is float32
            x_t = self.schedule.add_noise(self._space[0].draw(mean, std, posterior), eps, t)  # (B, C, *S)
        return evaluate(self.network, self.schedule, x_t, t), batch["covariates"][:, self.column].nan_to_num(-1).long()

    # --- validation ---------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start counting per class and bin of training times, each a tenth of them."""
        count = len(self.target.levels)
        self.validation = {
            "right": torch.zeros(NUM_BINS, count),
            "all": torch.zeros(NUM_BINS, count),
            "loss": torch.zeros(NUM_BINS),
        }

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Each sample once in the middle of every bin of times, with fixed noise."""
        for index in range(NUM_BINS):
            streams = [step_generator(self.seed, index, int(row)) for row in batch["row"]]
            logits, classes = self._logits(batch, streams, (index + 0.5) / NUM_BINS)
            given = classes >= 0
            logits, classes = logits[given].float(), classes[given]
            of_class = F.one_hot(classes, len(self.target.levels)).float()  # (B, L)
            self.validation["right"][index] += ((logits.argmax(1) == classes)[:, None] * of_class).sum(0).cpu()
            self.validation["all"][index] += of_class.sum(0).cpu()
            self.validation["loss"][index] += float(F.cross_entropy(logits, classes, reduction="sum"))

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, balanced accuracy and loss, and the balanced accuracy of every bin (0 is the least noisy)."""
        packed = torch.cat([self.validation["right"], self.validation["all"], self.validation["loss"][:, None]], 1)
        if self.trainer.world_size > 1:
            packed = self.all_gather(packed.to(self.device)).sum(0).cpu()
        count = len(self.target.levels)
        right, total, loss = packed[:, :count], packed[:, count : 2 * count], packed[:, -1]
        if not torch.isfinite(loss).all():
            raise LdmError("The validation loss of the classifier is not finite: lower classifier.optimizer.lr.")
        present = total[0] > 0
        balanced = (right[:, present] / total[:, present]).mean(1)  # (NUM_BINS,)
        values = {
            "loss": float(loss.sum() / total.sum()),
            "accuracy": float(right.sum() / total.sum()),
            "balanced_accuracy": float(balanced.mean()),
            **{f"balanced_accuracy_bin/{index}": float(value) for index, value in enumerate(balanced)},
            **{f"accuracy_bin/{i}": float(right[i].sum() / total[i].sum()) for i in range(NUM_BINS)},
        }
        self.record({f"classifier/val/{name}": value for name, value in values.items()})
