"""Fit a stage: trainer, resume, final validation. The same call continues an interrupted run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import SIGTERMException

from ldm.errors import LdmError, nearest
from ldm.precision import fast_at_bf16
from ldm.training.budget import Budget
from ldm.training.checkpoint import ResumeCheckpoint
from ldm.training.logging import JsonlLogger, RunProgress, peak_memory_bytes
from ldm.training.module import StageModule
from ldm.training.narrow import guard_narrow_convolutions

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "bf16-mixed", "32-true")
TRAINER_KEYS = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "max_steps",
    "max_time",
    "val_every",
    "val_batches",
    "checkpoint_seconds",
    "log_every",
)
#: of an identity, what checkpoints of earlier versions may lack; they are taken as they are
ADDED = ("labels", "preprocessing", "order")

RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that Lightning sets


@contextlib.contextmanager
def own_ranks() -> Iterator[None]:
    """Leave the group of processes that a training ran in, so that the next in this process starts its own."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@own_ranks()
def fit(
    module: StageModule,
    datamodule: L.LightningDataModule,
    trainer: Mapping[str, Any],
    run_dir: Path,
    identity: Mapping[str, Any],
    save_model: Callable[[Mapping[str, float]], Any],
    label: str,
    monitor: str,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[L.Callback] = (),
    accepted: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train ``module`` to the end of its budget, from ``last.ckpt`` if there is one.

    Args:
        module, datamodule: what is trained, on what; the data module has ``start_at(batches)``.
        trainer: the ``trainer`` section of the configuration.
        run_dir: the run folder.
        identity: what a checkpoint has to agree with to be continued, e.g. the network and the split hash.
        save_model: writes ``model.safetensors``, given the latest validation metrics.
        label: of the progress bar; its last word is the panel group.
        monitor: validation metric that the progress bar shows.
        loggers: beside ``metrics.jsonl``.
        callbacks: further ones, e.g. figures.
        accepted: called when it is clear that the run folder is this run's, before anything is trained.

    Returns:
        The final validation metrics.

    Raises:
        LdmError: the checkpoint in ``run_dir`` belongs to another configuration.
    """
    check_trainer(trainer)
    guard_narrow_convolutions(module)
    run_dir = Path(run_dir)
    checkpoint = run_dir / "last.ckpt"
    budget = Budget(trainer["max_steps"], trainer["max_time"])
    module.budget = budget
    state = read_checkpoint(checkpoint, identity) if checkpoint.is_file() else None
    accepted()
    lightning = _trainer(
        trainer,
        budget,
        run_dir,
        label,
        monitor,
        loggers,
        callbacks,
        lambda: save_model(_validation(module)),
        module.accumulate,
    )
    position = _Position(identity)
    lightning.callbacks.insert(0, position)
    if state is not None and _finished(state, budget):
        logger.info(
            "Already trained for %d steps: %s. Raise trainer.max_steps to go on.",
            state["ldm"]["step"],
            run_dir,
        )
    else:
        if state is not None:
            logger.info("Going on at step %d of %s.", state["ldm"]["step"], checkpoint)
            datamodule.start_at(state["ldm"]["step"] * module.accumulate)
        try:
            lightning.fit(module, datamodule, ckpt_path=checkpoint if state is not None else None, weights_only=True)
        except SIGTERMException as stop:  # alone it would end the process as if all were done
            raise SystemExit(128 + signal.SIGTERM) from stop
        if lightning.interrupted:
            raise KeyboardInterrupt
        state = None
    if state is not None:  # the weights of the finished run, for the final validation
        module.load_state_dict(state["state_dict"])
    if position.validated_at != module.step:  # Lightning validates by itself where the budget ends a run
        lightning.validate(module, datamodule, verbose=False)
    metrics = _validation(module)
    metrics["train_seconds"] = budget.elapsed or state["ldm"]["elapsed"]
    metrics["peak_memory_gib"] = peak_memory_bytes(module.device) / 2**30
    if lightning.is_global_zero:
        save_model(metrics)
    _end_runs(loggers)
    return metrics


def _end_runs(loggers: Sequence[Any]) -> None:
    """End the runs of Weights & Biases, which Lightning leaves open: the next job of a sweep would go on in them.

    What stops early ends with its process, which says how.
    """
    for one in loggers:
        if isinstance(one, WandbLogger):
            one.experiment.finish()


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read a resume checkpoint of ours; nothing in it is executed.

    Raises:
        LdmError: unreadable, or made by another configuration; the message names what differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = state["ldm"]["identity"]
    except Exception as error:  # torch raises many types for a file that is cut short or hostile
        raise LdmError(
            f"{path} is not a checkpoint of this package ({type(error).__name__}). Remove it to start anew."
        ) from error
    known = {name: value for name, value in identity.items() if name in stored or name not in ADDED}
    differing = [name for name in sorted({*stored, *known}) if not _agree(stored.get(name), known.get(name))]
    if differing:
        what = "; ".join(f"{name} is {identity.get(name)} now, was {stored.get(name)}" for name in differing)
        raise LdmError(
            f"{path.parent} holds a run with another configuration: {what}. Undo the change, write to another folder "
            "with run_dir=..., or remove the folder to start anew."
        )
    return state


def _agree(stored: Any, now: Any) -> bool:
    """Whether two settings are one; what an earlier version did not have, and is off now, it did not do."""
    if not (isinstance(stored, Mapping) and isinstance(now, Mapping)):
        return stored == now
    off = not any(now[name] for name in now.keys() - stored.keys())
    return off and stored.keys() <= now.keys() and all(_agree(stored[name], now[name]) for name in stored)


class _Position(L.Callback):
    """Puts what a checkpoint belongs to, and how far it is, into the checkpoint; goes on from there.

    Our step counter is the only position. Lightning's own loops count batches, also those of a step that an
    interruption cut off, and repeat an epoch from its start; their state is left out, and the counters that
    decide on epochs and validations follow from ours.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.validated_at: int | None = None  # the step of the latest validation

    def on_validation_end(self, trainer: L.Trainer, module: StageModule) -> None:
        self.validated_at = module.step

    def on_save_checkpoint(self, trainer: L.Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ldm"] = {"identity": self.identity, "step": module.step, "elapsed": module.budget.elapsed}
        checkpoint.pop("loops", None)

    def on_load_checkpoint(self, trainer: L.Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("loops", None)  # of a file that an earlier version wrote

    def on_train_start(self, trainer: L.Trainer, module: StageModule) -> None:
        batches = module.step * module.accumulate
        loop = trainer.fit_loop
        for progress, count in (
            (loop.epoch_loop.batch_progress.total, batches),
            (loop.epoch_progress.total, batches // trainer.num_training_batches),
            (loop.epoch_progress.current, batches // trainer.num_training_batches),
        ):
            progress.ready = progress.started = progress.processed = progress.completed = count


def _validation(module: StageModule) -> dict[str, float]:
    return {name: value for name, value in module.latest.items() if "/val/" in name}


def _finished(state: Mapping[str, Any], budget: Budget) -> bool:
    by_steps = budget.max_steps is not None and state["ldm"]["step"] >= budget.max_steps
    by_time = budget.max_seconds is not None and state["ldm"]["elapsed"] >= budget.max_seconds
    return by_steps or by_time


def _trainer(config, budget, run_dir, label, monitor, loggers, callbacks, save_model, accumulate: int) -> L.Trainer:
    limit = config["val_batches"]
    return L.Trainer(
        accelerator=config["accelerator"],
        devices=config["devices"],
        num_nodes=config["num_nodes"],
        # buffers are counters and constants, equal on all ranks by construction
        strategy=DDPStrategy(broadcast_buffers=False) if config["strategy"] == "ddp" else config["strategy"],
        precision=_precision(config),
        max_epochs=-1,  # the budget ends the run
        val_check_interval=config["val_every"] * accumulate,  # Lightning counts batches
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if limit is None else limit,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # modules log every `log_every` optimisation steps
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=[JsonlLogger(run_dir), *loggers],
        callbacks=[
            budget,
            RunProgress(label, monitor),
            *callbacks,
            ResumeCheckpoint(run_dir, config["checkpoint_seconds"], save_model),
        ],
        default_root_dir=run_dir,
    )


def _precision(config: Mapping[str, Any]) -> str:
    if config["precision"] != "auto":
        return config["precision"]
    wants_gpu = config["accelerator"] == "gpu" or (config["accelerator"] == "auto" and torch.cuda.is_available())
    return "bf16-mixed" if fast_at_bf16(torch.device("cuda" if wants_gpu else "cpu")) else "32-true"


def check_trainer(config: Mapping[str, Any]) -> None:
    """Refuse a ``trainer`` section that `fit` would refuse; to be asked before anything is read or prepared.

    Raises:
        LdmError: an unknown key, an illegal value, or no legal end of training.
    """
    Budget(config["max_steps"], config["max_time"])
    if config["precision"] not in PRECISIONS:  # others need a scaled loss, or keep averages that cannot move
        raise LdmError(
            f"trainer.precision is '{config['precision']}'; legal: {', '.join(PRECISIONS)}."
            f"{nearest(str(config['precision']), PRECISIONS)}"
        )
    for name in ("val_every", "val_batches", "log_every"):
        if config.get(name) is not None and config[name] < 1:
            raise LdmError(f"trainer.{name} is {config[name]}; legal: 1 and more.")
    for name in config:
        if name not in TRAINER_KEYS:
            raise LdmError(
                f"trainer.{name} is not a setting.{nearest(name, TRAINER_KEYS)} Legal: {', '.join(TRAINER_KEYS)}."
            )
