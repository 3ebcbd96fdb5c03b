"""How long to train: a number of steps, a time, or whichever ends first, counted over resumes."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.errors import LdmError


class Budget(Callback):
    """Stops training when its steps or its time are used up, and drives the learning rate's decay.

    Steps are optimisation steps of the module's own counter (``module.step``), because Lightning's
    ``global_step`` counts every optimizer under manual optimisation. Time counts from the first batch, over
    all sessions of a run. :attr:`progress` in [0, 1] is what the learning-rate schedule sees, so that a run
    limited by time decays as well as one limited by steps.

    Args:
        max_steps: optimisation steps, or None.
        max_time: ``DD:HH:MM:SS`` (shorter forms count from the right), or None.

    Raises:
        LdmError: neither is given, or one is not legal.
    """

    def __init__(self, max_steps: int | None, max_time: str | None = None) -> None:
        self.max_steps = max_steps
        self.max_seconds = None if max_time is None else seconds(max_time)
        if not self.max_steps and not self.max_seconds:
            raise LdmError("Training needs an end: set trainer.max_steps or trainer.max_time (DD:HH:MM:SS).")
        self._elapsed = self._agreed = 0.0  # the latter is what all ranks take for it at the end of a step
        self._since: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all sessions."""
        return self._elapsed + (time.monotonic() - self._since if self._since is not None else 0.0)

    def progress(self, step: int) -> float:
        """Share of the budget that is used up after ``step`` steps."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = self._agreed / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._agreed = self.elapsed
        if trainer.world_size > 1:  # clocks differ, and with them learning rates and weights would
            elapsed = torch.tensor(self.elapsed, device=module.device)
            self._agreed = float(trainer.strategy.reduce(elapsed, reduce_op="max"))
        if trainer.strategy.reduce_boolean_decision(self.progress(module.step) >= 1, all=False):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._elapsed, self._since = self.elapsed, None

    def state_dict(self) -> dict[str, float]:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._elapsed = self._agreed = state["elapsed"]


def seconds(text: str | int) -> float:
    """Seconds of ``DD:HH:MM:SS``, ``HH:MM:SS``, ``MM:SS`` or ``SS``.

    Raises:
        LdmError: another form, or a number of 60 hours and more.
    """
    if isinstance(text, int) and text >= 60**3:
        raise LdmError(
            f"trainer.max_time is {text}: YAML takes 1:00:00:00 without quotes for a number to the base of 60, and so "
            "many seconds are hardly meant. Write DD:HH:MM:SS in quotes."
        )
    if not re.fullmatch(r"\d+(:\d+){0,3}", str(text)):
        raise LdmError(f"trainer.max_time '{text}' is not a time; legal: DD:HH:MM:SS, e.g. 00:01:00:00 for an hour.")
    units = (1, 60, 3600, 86400)
    return float(sum(int(part) * unit for part, unit in zip(reversed(str(text).split(":")), units, strict=False)))
