"""The logger that needs no account and no network, and the bar that shows a whole run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.errors import LdmError


class JsonlLogger(Logger):
    """Appends every logged value to ``metrics.jsonl``, one JSON object a line with ``step`` and ``time``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._continued = False

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration lies in ``config.yaml`` beside the metrics."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        values = {name: round(float(value), 8) for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._continued:
            _drop_cut_line(self.path)
            self._continued = True
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 2), **values}) + "\n")


def _drop_cut_line(path: Path) -> None:
    """Take off what a kill left of a last line; the next one would be glued to it."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a ``metrics.jsonl``: name -> [(step, value), ...], the last value where a step was logged twice.

    A line that a kill cut short is passed over when it is the last one.

    Raises:
        LdmError: another line is not JSON.
    """
    curves: dict[str, dict[int, float]] = {}
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise LdmError(f"{path}, line {number} is not JSON: {error}.") from error
        step = entry.pop("step") or 0
        entry.pop("time", None)
        for name, value in entry.items():
            curves.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


class RunProgress(Callback):
    """One rich progress bar for the whole run: steps, speed, loss, the latest validation, peak memory."""

    def __init__(self, label: str, metric: str) -> None:
        self.label, self.metric = label, metric
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar on the first rank."""
        if not trainer.is_global_zero:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(self.label, total=1.0, text="")
        self._first_step, self._first_time = module.step, time.monotonic()
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Advance by the share of the budget that is used up."""
        if self._bar is None:
            return
        rate = (module.step - self._first_step) / (time.monotonic() - self._first_time + 1e-9)
        text = f"step {module.step}  {rate:.2f}/s  {peak_memory(module.device)}"
        for name in (f"{self.label.split()[-1]}/train/loss", self.metric):
            if name in module.latest:
                text += f"  {name.split('/', 1)[1]} {module.latest[name]:.4g}"
        self._bar.update(self._task, completed=module.budget.progress(module.step), text=text)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self.on_train_end(trainer, module)


def peak_memory(device: torch.device) -> str:
    """Peak memory so far: of the device on a GPU, of this process on a CPU."""
    return f"{peak_memory_bytes(device) / 2**30:.1f} GiB"


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
