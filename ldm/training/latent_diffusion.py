"""The second stage: a conditional diffusion model on cached posteriors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.noise import step_generator
from ldm.diffusion.posterior import variational_term
from ldm.diffusion.prediction import target
from ldm.diffusion.weighting import loss_weight
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.ema import EMA, PowerEMA
from ldm.training.module import StageModule

logger = logging.getLogger(__name__)

NUM_BINS = 10


class LatentDiffusion(StageModule):
    """Trains the denoiser and the conditioners of a :class:`LatentDiffusionModel`.

    The model's own network is the first exponential moving average, so what is validated, sampled and saved is
    always the average and no weights are ever swapped. First stage and statistics are kept out of the module
    tree: they are neither optimised, nor wrapped for distributed training, nor stored in the resume checkpoint.

    Args:
        model: holds the latent space, the schedule and the prediction type.
        optimizer: see :class:`ldm.training.module.StageModule`.
        loss: ``weighting`` (``uniform`` or ``min_snr``), ``gamma``, and ``vlb_weight`` of the variational bound, for
            models that learn a variance (Nichol & Dhariwal 2021, eq. 16: 0.001).
        ema_decays: one average a decay; the first is the model's.
        sigma_rels: widths of power-function averages beside them, of which snapshots can be kept.
        log_every: steps between two logged steps.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        optimizer: Mapping[str, Any],
        loss: Mapping[str, Any],
        ema_decays: Sequence[float] = (0.999,),
        log_every: int = 20,
        seed: int = 0,
        sigma_rels: Sequence[float] = (),
    ) -> None:
        super().__init__(optimizer, seed)
        self.network = model.network
        self.ema = EMA(self.network, ema_decays)
        self.power_ema = PowerEMA(self.network, sigma_rels) if sigma_rels else None
        model.network = self.ema.module
        self._model = [model]
        self.loss = dict(loss)
        self._check_loss()
        self.log_every = log_every
        self.validation: dict[str, Any] = {}

    @property
    def model(self) -> LatentDiffusionModel:
        """The model that is sampled from and saved: moving average, first stage, statistics."""
        return self._model[0]

    def _check_loss(self) -> None:
        loss, schedule = self.loss, self.model.schedule
        loss_weight(loss["weighting"], self.model.prediction_type, torch.zeros(1), loss["gamma"])  # fail early
        if loss["weighting"] == "min_snr" and schedule.ends_in_pure_noise:
            logger.warning(
                "ldm.loss.weighting=min_snr gives pure noise no weight, but this schedule's chains start there: "
                "the first step is hardly learned. uniform is safer."
            )
        if self.model.learned_variance and not loss.get("vlb_weight", 0) > 0:
            raise LdmError("ldm.learned_variance needs ldm.loss.vlb_weight > 0 (the paper's is 0.001).")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over denoiser and conditioners."""
        return self.adamw(self.network.parameters())

    def on_fit_start(self) -> None:
        """First stage and statistics follow the module to its device."""
        self.model.to(self.device)

    on_validation_start = on_fit_start

    # --- training -----------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch: draw the posterior, the time and the noise; weighted squared error of the output."""
        draws = self._draws(batch)
        with self.own_dropout():
            weighted, plain = self.losses(self.network, batch, draws)
        loss = weighted.mean()
        self.require_finite(loss.detach(), {"loss": loss.detach()}, batch["row"])
        norms = self.step_optimizers(loss, [self.network])
        if norms is None:
            return
        self.ema.update(self.network)
        if self.power_ema is not None:
            self.power_ema.update(self.network)
        if (self.step - 1) % self.log_every == 0:
            values = {"loss": loss.detach(), "loss_unweighted": plain.mean().detach(), "lr": self._lr()}
            values |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
            self.record({f"ldm/train/{name}": value for name, value in values.items()}, reduce=True)

    def losses(
        self, network: torch.nn.Module, batch: Mapping[str, Any], draws: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss of each sample.

        Args:
            network: the trained one, or an average.
            batch: ``mean``, ``std`` ``(B, C, *S)``, and what the condition is made of.
            draws: ``posterior`` and ``eps`` ``(B, C, *S)``, ``t`` ``(B,)``, ``hide`` ``(B, num_uniforms)`` or None.

        Returns:
            Weighted and unweighted loss, ``(B,)`` each.
        """
        model, t = self.model, draws["t"]
        condition = model.batch_condition(batch)
        if draws["hide"] is not None:
            condition = model.network.conditioners.drop(condition, draws["hide"])
        with torch.autocast(t.device.type, enabled=False):  # the process itself is float32 or better
            x0 = model.latent_space.draw(batch["mean"].float(), batch["std"].float(), draws["posterior"])
            x_t = model.schedule.add_noise(x0, draws["eps"], t)  # (B, C, *S)
            alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)  # (B,) each
            wanted = target(model.prediction_type, x0, draws["eps"], alpha, sigma)
        output = model.evaluate(network, x_t, t, condition)  # (B, C or 2 C, *S)
        plain = (output[:, : x0.shape[1]] - wanted).square().flatten(1).mean(1)  # (B,)
        weight = loss_weight(
            self.loss["weighting"], model.prediction_type, model.schedule.log_snr(t), self.loss["gamma"]
        )
        loss = weight * plain
        if model.learned_variance:  # L_simple + lambda L_vlb, the sum over T terms estimated by one
            term = variational_term(model.schedule, model.read_output(output, x_t, alpha, sigma), x0, t)
            loss = loss + self.loss["vlb_weight"] * model.schedule.num_train_timesteps * term
        return loss, plain

    def _draws(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """All random numbers of a batch, one named stream a sample."""
        size, *shape = batch["mean"].shape
        count = self.model.network.conditioners.num_uniforms
        generators = self.generators(size)
        uniforms = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # (B,)
        draws = {
            "t": self.model.schedule.time_at(uniforms),
            "hide": torch.stack([torch.rand(count, generator=g) for g in generators]),
            "posterior": torch.stack([torch.randn(shape, generator=g) for g in generators]),
            "eps": torch.stack([torch.randn(shape, generator=g) for g in generators]),
        }
        return {name: value.to(batch["mean"].device) for name, value in draws.items()}

    def _lr(self) -> float:
        return self.settings["lr"] * self.lr_factor()

    # --- validation ---------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start collecting the loss per bin of training times, each a tenth of them."""
        self.validation = {"sum": torch.zeros(NUM_BINS), "count": torch.zeros(NUM_BINS)}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Loss of the moving average with fixed noise, each sample once in the middle of every bin of times."""
        shape, size = batch["mean"].shape[1:], len(batch["mean"])
        for index in range(NUM_BINS):
            streams = [step_generator(self.seed, index, int(row)) for row in batch["row"]]
            middle = torch.full((size,), (index + 0.5) / NUM_BINS, dtype=torch.float64)
            draws = {
                "t": self.model.schedule.time_at(middle).to(self.device),
                "hide": None,
                "posterior": torch.stack([torch.randn(shape, generator=g) for g in streams]).to(self.device),
                "eps": torch.stack([torch.randn(shape, generator=g) for g in streams]).to(self.device),
            }
            _, plain = self.losses(self.model.network, batch, draws)
            self.validation["sum"][index] += float(plain.sum())
            self.validation["count"][index] += size

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss, and the loss of every bin (bin 0 is the least noisy)."""
        bins = self.validation["sum"] / self.validation["count"].clamp(min=1)
        if not torch.isfinite(bins).all():
            raise LdmError("The validation loss of the second stage is not finite: lower ldm.optimizer.lr.")
        metrics = {f"ldm/val/loss_bin/{index}": float(value) for index, value in enumerate(bins)}
        self.record({"ldm/val/loss": float(bins.mean()), **metrics}, reduce=True)
