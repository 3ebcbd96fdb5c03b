"""Trains the segmentation network that serves as an instrument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss

from ldm.data.labels import LabelClasses
from ldm.metrics.overlap import dice_per_class
from ldm.model.segmenter import build_segmenter
from ldm.training.module import StageModule


class SegmenterModule(StageModule):
    """Dice and cross-entropy on the cohort's label maps.

    Args:
        network: see :func:`ldm.model.segmenter.build_segmenter`.
        labels: classes of the label maps.
        optimizer: see :class:`ldm.training.module.StageModule`.
        voxel_mm3: volume of a voxel, for the agreement of volumes.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        labels: LabelClasses,
        optimizer: Mapping[str, Any],
        voxel_mm3: float = 1.0,
        log_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.network = build_segmenter(network)
        self.labels, self.voxel_mm3, self.log_every = labels, voxel_mm3, log_every
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        self.validation: dict[str, Any] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return self.adamw(self.network.parameters())

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch of ``image`` ``(B, C, *S)`` and ``labels`` ``(B, *S)``."""
        target = self.labels.classes(batch["labels"])  # (B, *S)
        with self.own_dropout():
            loss = self.loss(self.network(batch["image"]).float(), target[:, None])
        self.require_finite(loss.detach(), {"loss": loss.detach()}, batch["index"])
        norms = self.step_optimizers(loss, [self.network])
        if norms is not None and (self.step - 1) % self.log_every == 0:
            self.record({"segmenter/train/loss": loss.detach(), "segmenter/train/grad_norm": sum(norms.values())}, True)

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self.validation = {"dice": [], "true": [], "found": []}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Dice and volume of every class, image by image."""
        found = self.network(batch["image"]).argmax(1)  # (B, *S)
        truth = self.labels.classes(batch["labels"])  # (B, *S)
        for one, other in zip(found, truth, strict=True):
            self.validation["dice"].append(dice_per_class(one, other, len(self.labels)))
            for name, classes in (("found", one), ("true", other)):
                counts = torch.bincount(classes.flatten(), minlength=len(self.labels))[1:]
                self.validation[name].append(counts.double().cpu().numpy() * self.voxel_mm3)

    def on_validation_epoch_end(self) -> None:
        """Log mean Dice and the correlation of volumes per class; a class that is in no image is left out."""
        dice = self._class_dice()  # (K - 1,)
        true, found = (self._of_all_ranks(self.validation[name]) for name in ("true", "found"))  # (N, K - 1) each
        metrics = {}
        if not np.isnan(dice).all():
            metrics["segmenter/val/dice"] = float(np.nanmean(dice))
        for index, name in enumerate(self.labels.names):
            if not np.isnan(dice[index]):
                metrics[f"segmenter/val/dice/{name}"] = float(dice[index])
            if len(true) > 2 and true[:, index].std() > 0 and found[:, index].std() > 0:
                metrics[f"segmenter/val/volume_r/{name}"] = float(np.corrcoef(true[:, index], found[:, index])[0, 1])
        # of a class that was found in vain before, and is not any more, nothing is kept
        self.latest = {name: value for name, value in self.latest.items() if "/val/" not in name}
        self.record(metrics)

    def _of_all_ranks(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        values = torch.from_numpy(np.array(rows)).to(self.device)  # (N, K - 1)
        return (self.all_gather(values).flatten(0, 1) if self.trainer.world_size > 1 else values).cpu().numpy()

    def _class_dice(self) -> np.ndarray:
        """Mean Dice of every class over the images of all ranks that have it ``(K - 1,)``; NaN where none has."""
        scores = np.array(self.validation["dice"]).reshape(-1, len(self.labels) - 1)  # (N, K - 1)
        sums = torch.from_numpy(np.stack([np.nansum(scores, 0), (~np.isnan(scores)).sum(0)])).to(self.device)
        if self.trainer.world_size > 1:  # or a rank without a class would log other names than the rest
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        total, count = sums.cpu().numpy()
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
