"""Snapshots of power-function averages during training, and an average of any length from them afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from ldm.errors import LdmError
from ldm.model.file import read_header, read_tensors, write_model
from ldm.training.ema import PowerEMA
from ldm.training.power_profile import coefficients, exponent_of

KIND = "ema_snapshot"


@dataclass(frozen=True)
class PosthocEMA:
    """Whether, of which widths and how often snapshots are kept: ``ldm.posthoc_ema``.

    Attributes:
        sigma_rels: widths of the averages that are kept.
        every: optimisation steps between two snapshots; None keeps none.

    Raises:
        LdmError: a number outside its range.
    """

    sigma_rels: Sequence[float]
    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None and not (isinstance(self.every, int) and self.every > 0):
            raise LdmError(f"ldm.posthoc_ema.every is {self.every}; legal: a positive number of steps, or null.")
        if not self.sigma_rels or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise LdmError(
                f"ldm.posthoc_ema.sigma_rels is {list(self.sigma_rels)}; legal: one or more different widths."
            )
        for sigma_rel in self.sigma_rels:
            exponent_of(sigma_rel)


@dataclass(frozen=True)
class Snapshot:
    """One stored average: the file, the width of its profile and the step it was taken at."""

    path: Path
    sigma_rel: float
    step: int


class EMASnapshots(Callback):
    """Writes the averages every so many steps and at the end, a file each, atomically.

    A run that goes on at a step rewrites what is behind it; what an earlier run left there is removed first.

    Args:
        folder: of the snapshots.
        averages: of the module that is trained.
        every: optimisation steps between two snapshots.
    """

    def __init__(self, folder: Path, averages: PowerEMA, every: int) -> None:
        self.folder, self.averages, self.every = Path(folder), averages, every
        self._step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove snapshots of steps that are still to come."""
        self._step = module.step
        if trainer.is_global_zero and self.folder.is_dir():
            for snapshot in find_snapshots(self.folder):
                if snapshot.step > module.step:
                    snapshot.path.unlink()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Write when a step was taken and it is time."""
        if module.step % self.every == 0:
            self._write(trainer, module.step)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The final averages."""
        self._write(trainer, module.step)

    def _write(self, trainer: Trainer, step: int) -> None:
        if step > self._step and trainer.is_global_zero:
            for sigma_rel, average in zip(self.averages.sigma_rels, self.averages.averages, strict=True):
                path = self.folder / f"step{step:08d}-sigma_rel{sigma_rel}.safetensors"
                tensors = {name: parameter.data for name, parameter in average.named_parameters()}
                write_model(path, tensors, {"kind": KIND, "sigma_rel": sigma_rel, "step": step})
        self._step = step


def find_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots of a folder, in the order of their steps."""
    headers = [(path, read_header(path, KIND)) for path in Path(folder).glob("*.safetensors")]
    found = [Snapshot(path, header["sigma_rel"], header["step"]) for path, header in headers]
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.sigma_rel))


def reconstruct(snapshots: Sequence[Snapshot], sigma_rel: float, step: int) -> tuple[dict[str, Tensor], float]:
    """The average of another width, as it was after ``step`` steps, from the snapshots up to there.

    Snapshots are read one after the other and added up in float64.

    Args:
        snapshots: of one run.
        sigma_rel: the wanted width.
        step: at most that of the last snapshot.

    Returns:
        Parameters by name, and the part of the wanted profile that the snapshots' do not give, see
        :func:`ldm.training.power_profile.coefficients`.

    Raises:
        LdmError: a width that is not legal, or no snapshot up to ``step``.
    """
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not used:
        raise LdmError(f"There is no snapshot up to step {step}.")
    times, gammas = [one.step for one in used], [exponent_of(one.sigma_rel) for one in used]
    factors, left = coefficients(times, gammas, step, exponent_of(sigma_rel))
    total: dict[str, Tensor] = {}
    for factor, snapshot in zip(factors.tolist(), used, strict=True):
        for name, tensor in read_tensors(snapshot.path).items():
            total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64)).add_(tensor, alpha=factor)
    return {name: tensor.float() for name, tensor in total.items()}, left
