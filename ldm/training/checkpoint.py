"""Nothing is lost: the resume checkpoint is written often, atomically, and when a run is interrupted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn

logger = logging.getLogger(__name__)


class ResumeCheckpoint(Callback):
    """Writes ``last.ckpt`` every ``every_seconds``, after each validation, at the end and on an interruption.

    The file holds plain tensors, numbers and dicts, so that ``weights_only`` loading accepts it; it is written
    beside the old one and then put in its place.

    Args:
        folder: the run folder.
        every_seconds: between two writes during training.
        save_model: writes ``model.safetensors``; called after each validation and at the end.
    """

    def __init__(self, folder: Path, every_seconds: float, save_model: Callable[[], Any]) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_seconds, self.save_model = every_seconds, save_model
        self._last = time.monotonic()
        self._step = -1

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        trainer.save_checkpoint(temporary)  # collective under DDP; rank 0 writes
        if trainer.is_global_zero:
            os.replace(temporary, self.path)
        self._last, self._step = time.monotonic(), module.step

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Count from here."""
        self._last, self._step = time.monotonic(), module.step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Write when it is time; all ranks agree on it."""
        due = time.monotonic() - self._last >= self.every_seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._save(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """A validated state is worth keeping: checkpoint and model file."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._save(trainer, module)
        if trainer.is_global_zero:
            self.save_model()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The final state."""
        self._save(trainer, module)
        if trainer.is_global_zero:
            self.save_model()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Ctrl-C and SIGTERM keep the work done since the last write, unless a step is half taken."""
        if (
            isinstance(exception, KeyboardInterrupt | SystemExit)
            and trainer.world_size == 1
            and module.step > self._step
            and not module.updating
        ):
            self._save(trainer, module)
            logger.info("Interrupted at step %d; run the same command to go on.", module.step)
