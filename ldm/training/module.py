"""What both stages share: a step counter of their own, the learning-rate schedule, named random numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor, nn

from ldm.diffusion.noise import step_generator
from ldm.errors import LdmError, nearest
from ldm.networks.frozen import keep_out_of_checkpoints
from ldm.training.budget import Budget

LR_SCHEDULES = ("constant", "cosine")


class StageModule(L.LightningModule):
    """Base of the stages: manual optimisation, steps counted by ourselves, clipping and accumulation included.

    Args:
        optimizer: ``lr``, ``weight_decay``, ``betas``, ``warmup_steps``, ``schedule`` (``constant`` or
            ``cosine`` down to zero at the end of the budget), ``clip_norm`` (None for none), ``accumulate``
            (batches a step).
        seed: of all random numbers of the stage.
    """

    def __init__(self, optimizer: Mapping[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.settings = dict(optimizer)
        legal = ("lr", "weight_decay", "betas", "warmup_steps", "schedule", "clip_norm", "accumulate")
        for name in self.settings:
            if name not in legal:
                raise LdmError(f"optimizer.{name} is not a setting.{nearest(name, legal)} Legal: {', '.join(legal)}.")
        if self.settings["schedule"] not in LR_SCHEDULES:
            raise LdmError(
                f"optimizer.schedule '{self.settings['schedule']}' is unknown; legal: {', '.join(LR_SCHEDULES)}."
            )
        self.accumulate = int(self.settings.get("accumulate") or 1)
        self.seed = seed
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))
        self._micro = 0  # batches since the last optimisation step
        self.updating = False  # from the first changed weight of a step to its end, where no state is worth keeping
        self._rows: Sequence[int] | Tensor = ()  # records of the current batch, for messages
        keep_out_of_checkpoints(self)
        self.budget: Budget | None = None
        self.latest: dict[str, float] = {}  # everything recorded last, for the progress bar and the model file

    @property
    def step(self) -> int:
        """Optimisation steps taken, over all sessions of a run."""
        return int(self._step)

    # --- optimisation -------------------------------------------------------------------------------

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float | None = None) -> torch.optim.AdamW:
        """AdamW with this stage's settings."""
        settings = self.settings
        return torch.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            lr=settings["lr"] if lr is None else lr,
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
        )

    def lr_factor(self) -> float:
        """Multiplier of the learning rate: linear warm-up, then constant or a cosine to zero over the budget."""
        warmup = self.settings["warmup_steps"]
        factor = min(1.0, (self.step + 1) / warmup) if warmup else 1.0
        if self.settings["schedule"] == "cosine" and self.budget is not None:
            factor *= 0.5 * (1 + math.cos(math.pi * self.budget.progress(self.step)))
        return factor

    def step_optimizers(self, loss: Tensor, networks: Sequence[nn.Module]) -> dict[str, float] | None:
        """Backward pass and, when enough batches are accumulated, one step of every optimizer.

        Args:
            loss: of this batch; divided by the number of accumulated batches here.
            networks: one an optimizer, in their order; each is clipped on its own.

        Returns:
            Gradient norm of each network by class name, or None while accumulating.
        """
        self._micro += 1
        last = self._micro % self.accumulate == 0
        self.manual_backward(loss / self.accumulate)
        if not last:
            return None
        self.updating = True
        factor, norms = self.lr_factor(), {}
        for optimizer, network in zip(_list(self.optimizers()), networks, strict=True):
            for group in optimizer.param_groups:  # a resumed run's groups hold what it was stopped with
                group |= {name: optimizer.defaults[name] for name in ("betas", "weight_decay")}
                group["lr"] = optimizer.defaults["lr"] * factor
            clip = self.settings["clip_norm"]
            norm = nn.utils.clip_grad_norm_(network.parameters(), math.inf if clip is None else clip)
            norms[type(network).__name__] = float(norm)
            self._require_finite_gradient(type(network).__name__, float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return norms

    def on_train_batch_end(self, *_: Any) -> None:
        """The averages have followed: the state is whole."""
        self.updating = False

    # --- random numbers -----------------------------------------------------------------------------

    def generators(self, batch_size: int) -> list[torch.Generator]:
        """One generator a sample of this batch, named by (seed, batch counter, position in the global batch).

        Rank r of W takes items r, r + W, ... of an epoch, so item i of its batch has the global position
        i W + r: one process with the whole batch draws the same numbers.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        batch = self.step * self.accumulate + self._micro % self.accumulate
        return [step_generator(self.seed, batch, i * world + rank) for i in range(batch_size)]

    @contextlib.contextmanager
    def own_dropout(self) -> Iterator[None]:
        """Name what dropout draws by seed, batch and rank, as all noise is; it has torch's one generator."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generators(1)[0])))
            yield

    # --- records ------------------------------------------------------------------------------------

    def record(self, values: Mapping[str, Any], reduce: bool = False) -> None:
        """Hand values to every logger at our own step, and keep them in :attr:`latest`.

        Lightning's ``log`` repeats the last value every step and counts steps its own way.

        Args:
            values: name -> number.
            reduce: average over ranks first.
        """
        numbers = {name: float(value) for name, value in values.items()}
        if reduce and self.trainer.world_size > 1:
            packed = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
            mean = self.trainer.strategy.reduce(packed, reduce_op="mean")
            numbers = dict(zip(numbers, mean.tolist(), strict=True))
        self.latest |= numbers
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, self.step)

    # --- guards -------------------------------------------------------------------------------------

    def require_finite(self, loss: Tensor, terms: Mapping[str, Any], rows: Sequence[int] | Tensor) -> None:
        """Stop on a loss that is not finite, naming the terms and the batch.

        Raises:
            LdmError: naming the step, every term and the ids of the records in the batch.
        """
        self._rows = rows
        if bool(torch.isfinite(loss)):
            return
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
        ids = ", ".join(self.record_names(rows))
        raise LdmError(
            f"The loss is not finite at step {self.step}: {values}. Records of the batch: {ids}. "
            "Lower optimizer.lr, set optimizer.clip_norm, or try trainer.precision=32-true."
        )

    def _require_finite_gradient(self, network: str, norm: float) -> None:
        """A finite loss can have a gradient that is not; one step with it would spoil every weight."""
        if not math.isfinite(norm):
            raise LdmError(
                f"The gradient of {network} is not finite at step {self.step}; no step was taken. Records of the batch "
                f"are {', '.join(self.record_names(self._rows))}. Lower optimizer.lr, or try trainer.precision=32-true."
            )

    def record_names(self, rows: Sequence[int] | Tensor) -> list[str]:
        """Ids of cohort rows, for messages; the numbers themselves without a data module."""
        cohort = getattr(getattr(self.trainer, "datamodule", None), "cohort", None)
        return [str(int(row)) if cohort is None else cohort.records[int(row)].id for row in rows]


def _list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]
