"""Trains the network that predicts covariates from images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.schema import CovariateSchema
from ldm.model.predictor import Targets, build_predictor
from ldm.training.module import StageModule


class PredictorModule(StageModule):
    """Cross-entropy of levels and smooth L1 of standardised values, added up; missing values do not count.

    Args:
        network: see :func:`ldm.model.predictor.build_predictor`.
        targets: what is predicted.
        schema: of the cohort, whose vector the batches hold.
        optimizer: see :class:`ldm.training.module.StageModule`.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        targets: Targets,
        schema: CovariateSchema,
        optimizer: Mapping[str, Any],
        log_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.network = build_predictor(network)
        self.targets, self.log_every = targets, log_every
        self.columns = [schema.names.index(name) for name in targets.schema.names]
        self.validation: dict[str, Any] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return self.adamw(self.network.parameters())

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch of ``image`` ``(B, C, *S)`` and ``covariates`` ``(B, K)``."""
        codes = batch["covariates"][:, self.columns]  # (B, T)
        terms = losses(self.targets, self.network(batch["image"]), codes)
        loss = sum(terms.values())
        self.require_finite(loss.detach(), terms, batch["index"])
        norms = self.step_optimizers(loss, [self.network])
        if norms is not None and (self.step - 1) % self.log_every == 0:
            values = {f"predictor/train/loss/{name}": term.detach() for name, term in terms.items()}
            values["predictor/train/loss"] = loss.detach()
            values["predictor/train/grad_norm"] = sum(norms.values())
            self.record(values, reduce=True)

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self.validation = {"outputs": [], "codes": []}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Keep outputs and truth."""
        self.validation["outputs"].append(self.network(batch["image"]))
        self.validation["codes"].append(batch["covariates"][:, self.columns])

    def on_validation_epoch_end(self) -> None:
        """Log loss and agreement over the images of all ranks."""
        outputs, codes = (torch.cat(self.validation[name]) for name in ("outputs", "codes"))  # (N, O), (N, T)
        if self.trainer.world_size > 1:
            outputs, codes = (self.all_gather(x).flatten(0, 1) for x in (outputs, codes))
        values = {"loss": sum(losses(self.targets, outputs, codes).values()), **agreement(self.targets, outputs, codes)}
        self.record({f"predictor/val/{name}": value for name, value in values.items()})


def losses(targets: Targets, outputs: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Mean loss of each target over the images in which it is known; 0 where none has it.

    Args:
        outputs: ``(B, O)`` of the network.
        codes: ``(B, T)`` encoded covariates of ``targets.schema``.
    """
    truth, result = targets.truth(codes), {}
    for name, found in targets.split(outputs).items():  # (B, L) or (B,)
        given, wanted = ~truth[name].isnan(), truth[name].nan_to_num(0)  # (B,)
        if found.ndim == 2:
            each = F.cross_entropy(found, wanted.long(), reduction="none")  # (B,)
        else:
            each = F.smooth_l1_loss(found, wanted, reduction="none")  # (B,)
        result[name] = (each * given).sum() / given.sum().clamp(min=1)
    return result


def agreement(targets: Targets, outputs: Tensor, codes: Tensor) -> dict[str, float]:
    """``accuracy/NAME`` of categorical targets, ``mae/NAME`` (in the unit) and ``r/NAME`` of continuous ones.

    Over the images in which the target is known; what these do not determine is left out.

    Args:
        outputs: ``(N, O)`` of the network.
        codes: ``(N, T)`` encoded covariates of ``targets.schema``.
    """
    truth, result = targets.truth(codes), {}
    for name, found in targets.split(outputs).items():
        given = ~truth[name].isnan()
        found, wanted = found[given].double().cpu().numpy(), truth[name][given].double().cpu().numpy()
        if not len(wanted):
            continue
        if found.ndim == 2:
            result[f"accuracy/{name}"] = float((found.argmax(1) == wanted).mean())
            continue
        result[f"mae/{name}"] = float(np.abs(found - wanted).mean()) * targets.moments[name][1]
        if len(wanted) > 2 and found.std() > 0 and wanted.std() > 0:
            result[f"r/{name}"] = float(np.corrcoef(found, wanted)[0, 1])
    return result
