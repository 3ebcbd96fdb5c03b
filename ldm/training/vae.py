"""The first stage: a KL autoencoder with reconstruction, KL, perceptual and adversarial losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from ldm.data.labels import LabelClasses
from ldm.errors import LdmError, nearest
from ldm.latents.space import LatentSpace
from ldm.metrics.grid import blockiness, pattern_share
from ldm.model.build import build_first_stage, construct
from ldm.networks.discriminator import Discriminator
from ldm.networks.perceptual import PerceptualLoss
from ldm.training.module import StageModule

logger = logging.getLogger(__name__)

RECONSTRUCTION = {"l1": F.l1_loss, "l2": F.mse_loss}
VALIDATION = ("psnr", "ssim", "l1", "kl", "grid_pattern", "blockiness")
SHOWN = 4  # held-out cases in a panel
LOSS_KEYS = (
    "reconstruction",
    "kl_weight",
    "adversarial_weight",
    "adversarial_start",
    "adversarial_adaptive",
    "perceptual_weight",
    "perceptual_weights",
    "perceptual_backbone",
)


class VAE(StageModule):
    """Trains a first stage.

    The loss is per image element: ``reconstruction`` (mean over voxels and channels) + ``kl_weight`` x KL, where
    KL is summed over the latent and divided by the number of image elements, so that the weight means the same
    at every image size (Kingma & Welling 2014, appendix B; both terms per voxel). Public recipes weight the KL
    *summed* over the latent: their weight is ours divided by the number of image elements, see
    :meth:`summed_kl_weight`.

    Generator and discriminator take one backward pass together: the adversarial term sees the discriminator's
    weights detached, and the discriminator's loss sees the images detached, so each gradient stays where it
    belongs and distributed training needs no search for unused parameters.

    Args:
        network: ``kind`` and arguments of the first stage (:func:`ldm.model.build.build_first_stage`).
        loss: see ``conf/vae``.
        optimizer: see :class:`ldm.training.module.StageModule`.
        discriminator: arguments of :class:`ldm.networks.discriminator.Discriminator` and its ``lr``.
        image_range: the model's intensity range, for PSNR and SSIM; None (z-scores) takes the batch's own.
        image_shape: ``(C, *S)`` of a whole image, for the printed conversion of the KL weight.
        log_every: steps between two logged steps; gradient norms are measured then.
        seed: of the posterior's noise.
        targets: classes of the label maps whose masks are compressed in the place of images; None: images.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        loss: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        discriminator: Mapping[str, Any],
        image_shape: tuple[int, ...],
        image_range: tuple[float, float] | None = (0.0, 1.0),
        log_every: int = 20,
        seed: int = 0,
        targets: LabelClasses | None = None,
    ) -> None:
        super().__init__(optimizer, seed)
        self.loss, self.targets = _checked_loss(loss), targets
        self.network = build_first_stage(network)
        self.config = dict(network)
        if "stem" in self.config:  # a file says which stem it has, whatever `auto` means to its reader
            self.config["stem"] = self.network.stem_kind
        self.image_range, self.image_shape, self.log_every = image_range, tuple(image_shape), log_every
        spatial_dims, channels = self.network.spatial_dims, image_shape[0]
        settings = dict(discriminator)
        self.discriminator_lr = settings.pop("lr")
        self.discriminator = None
        if self.loss["adversarial_weight"]:
            settings |= {"spatial_dims": spatial_dims, "in_channels": channels}
            self.discriminator = construct(Discriminator, settings, "vae.discriminator")
        self.perceptual: list[PerceptualLoss] = []  # a list keeps it out of the state and out of DDP
        if self.loss["perceptual_weight"]:
            backbone, weights = self.loss["perceptual_backbone"], self.loss["perceptual_weights"]
            self.perceptual.append(PerceptualLoss(spatial_dims, str(weights), backbone))
        self.validation: dict[str, Any] = {}
        logger.info(
            "kl_weight %.3g per image element equals %.3g on the KL summed over a whole latent of %s.",
            self.loss["kl_weight"],
            self.summed_kl_weight,
            "x".join(map(str, self.image_shape)),
        )

    @property
    def summed_kl_weight(self) -> float:
        """The weight that public recipes would give to the KL summed over the latent of one whole image."""
        return self.loss["kl_weight"] / math.prod(self.image_shape)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the autoencoder and, with an adversarial loss, another for the discriminator."""
        optimizers = [self.adamw(self.network.parameters())]
        if self.discriminator is not None:
            optimizers.append(self.adamw(self.discriminator.parameters(), self.discriminator_lr))
        return optimizers

    def on_fit_start(self) -> None:
        """The frozen perceptual network follows the module to its device."""
        for network in self.perceptual:
            network.to(self.device)

    # --- training -----------------------------------------------------------------------------------

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction and posterior of images ``(B, C, *S)``; ``eps`` None decodes the posterior mean."""
        mean, std = self.network.encode(x)  # (B, c, *s) each
        z = mean if eps is None else mean + std * eps
        return self.network.decode(z).float(), mean.float(), std.float()

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch: weighted sum of all terms, one backward pass."""
        x = self._compressed(batch)
        reconstruction, mean, std = self(x, self._noise(x))
        terms = self.loss_terms(x, reconstruction, mean, std)
        weights = self.loss_weights(terms)
        loss = sum(weights[name] * term for name, term in terms.items())
        self.require_finite(loss.detach(), terms, batch["index"])
        log_now = self.step % self.log_every == 0
        norms = self.gradient_norms(terms, weights) if log_now else {}
        total, networks = loss, [self.network]
        if self.discriminator is not None:
            networks.append(self.discriminator)
            if self.adversarial_on:
                terms["discriminator"] = self.discriminator.discriminator_loss(x, reconstruction)
            else:  # every parameter takes part in every backward pass, which DDP relies on
                terms["discriminator"] = 0.0 * sum(p.sum() for p in self.discriminator.parameters())
            total = loss + terms["discriminator"]
        clipped = self.step_optimizers(total, networks)
        if log_now and clipped is not None:
            self._log_training(loss, terms, weights, norms, clipped)

    def _compressed(self, batch: Mapping[str, Any]) -> Tensor:
        """Images ``(B, C, *S)``, or the masks of label maps ``(B, K, *S)``."""
        if self.targets is None:
            return batch["image"]
        return torch.stack([self.targets.masks(labels) for labels in batch["labels"]])

    @property
    def adversarial_on(self) -> bool:
        """Whether the delayed adversarial term has started."""
        return self.discriminator is not None and self.step >= self.loss["adversarial_start"]

    def _noise(self, x: Tensor) -> Tensor:
        """Posterior noise, one named stream a sample: ``(B, c, *s)``."""
        factor = self.network.downsampling_factor
        shape = (self.network.latent_channels, *(length // factor for length in x.shape[2:]))
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators(len(x))]).to(x.device)

    def loss_terms(self, x: Tensor, reconstruction: Tensor, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        """Every term before its weight."""
        terms = {
            "reconstruction": RECONSTRUCTION[self.loss["reconstruction"]](reconstruction, x),
            "kl": kl_divergence(mean, std).sum() / x.numel(),
        }
        for network in self.perceptual:
            with torch.autocast(x.device.type, enabled=False):
                terms["perceptual"] = network(reconstruction, x)
        if self.adversarial_on:
            terms["adversarial"] = self.discriminator.generator_loss(reconstruction)
        return terms

    def loss_weights(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Weight of every term; the adversarial one can follow the gradient norms (Esser et al. 2021, eq. 7)."""
        weights = {"reconstruction": 1.0, "kl": self.loss["kl_weight"]}
        if "perceptual" in terms:
            weights["perceptual"] = self.loss["perceptual_weight"]
        if "adversarial" in terms:
            weights["adversarial"] = self.loss["adversarial_weight"]
            if self.loss["adversarial_adaptive"]:
                other = sum(weights[name] * terms[name] for name in ("reconstruction", "perceptual") if name in terms)
                ratio = self._norm_at_last_layer(other) / (self._norm_at_last_layer(terms["adversarial"]) + 1e-4)
                weights["adversarial"] *= min(ratio, 1e4)
        return weights

    def gradient_norms(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
        """Norm of each weighted term's gradient at the decoder's last layer; the KL does not reach it."""
        return {
            name: weights[name] * self._norm_at_last_layer(term)
            for name, term in terms.items()
            if name in weights and name != "kl"
        }

    def _norm_at_last_layer(self, term: Tensor) -> float:
        (gradient,) = torch.autograd.grad(term, self.network.last_layer, retain_graph=True)
        return float(gradient.norm())

    def _log_training(self, loss, terms, weights, norms, clipped) -> None:
        values = {"train/loss": loss.detach()}
        values |= {f"train/{name}": term.detach() for name, term in terms.items()}
        values |= {f"train/weight/{name}": weight for name, weight in weights.items()}
        values |= {f"train/grad_last_layer/{name}": norm for name, norm in norms.items()}
        values |= {f"train/grad_norm/{name}": norm for name, norm in clipped.items()}
        values["train/lr"] = self.settings["lr"] * self.lr_factor()
        self.record({f"vae/{name}": value for name, value in values.items()}, reduce=True)

    # --- validation ---------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        self.validation = {name: [] for name in (*VALIDATION, "posteriors", "panels")}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Held-out reconstruction from the posterior mean."""
        x = self._compressed(batch)
        reconstruction, mean, std = self(x)
        low, high = self.image_range or (float(x.min()), float(x.max()))
        reconstruction = reconstruction.clamp(low, high)
        store = self.validation
        with torch.autocast(x.device.type, enabled=False):  # SSIM is a difference of large numbers
            for one, other in zip(x.float(), reconstruction.float(), strict=True):
                store["psnr"].append(psnr(one, other, high - low))
                store["ssim"].append(
                    float(ssim(other[None], one[None], gaussian_kernel=False, kernel_size=7, data_range=high - low))
                )
                store["grid_pattern"].append(pattern_share(other - one, self.network.downsampling_factor))
                if self.targets is None:  # of masks, whose steps are few and large, it says nothing
                    store["blockiness"].append(blockiness(other) / blockiness(one))
        store["l1"].append(float(F.l1_loss(reconstruction, x)))
        store["kl"].append(float(kl_divergence(mean, std).sum() / x.numel()))
        store["posteriors"].append((mean.cpu(), std.cpu()))
        batches = self.trainer.num_val_batches[0]
        shown = [case * batches // SHOWN for case in range(SHOWN)].count(batch_index)  # evenly from all
        store["panels"] += [(one.cpu(), other.cpu()) for one, other in zip(x, reconstruction, strict=True)][:shown]

    def on_validation_epoch_end(self) -> None:
        """Log the means, among them traces of the decoder's grid, and the statistics of every latent channel."""
        store = self.validation
        means = {name: sum(store[name]) / len(store[name]) for name in VALIDATION if store[name]}
        space = LatentSpace.fit(store.pop("posteriors"))
        metrics = {f"vae/val/{name}": value for name, value in means.items()}
        metrics |= {f"vae/val/latent_mean/{c}": float(value) for c, value in enumerate(space.mean)}
        metrics |= {f"vae/val/latent_std/{c}": float(value) for c, value in enumerate(space.std)}
        self.record(metrics, reduce=True)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of every latent element (Kingma & Welling 2014, appendix B), in nats."""
    variance = std.square()
    return 0.5 * (mean.square() + variance - 1 - variance.clamp(min=1e-30).log())


def psnr(x: Tensor, y: Tensor, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB of two images of any shape."""
    error = float((x.double() - y.double()).square().mean())
    return 10 * math.log10(data_range**2 / max(error, 1e-12))


def _checked_loss(loss: Mapping[str, Any]) -> dict[str, Any]:
    for name in loss:
        if name not in LOSS_KEYS:
            raise LdmError(
                f"vae.loss.{name} is not a setting.{nearest(name, LOSS_KEYS)} Legal: {', '.join(LOSS_KEYS)}."
            )
    if loss["reconstruction"] not in RECONSTRUCTION:
        raise LdmError(f"vae.loss.reconstruction '{loss['reconstruction']}' is unknown; legal: l1, l2.")
    for name in ("kl_weight", "adversarial_weight", "perceptual_weight"):
        if loss[name] < 0:
            raise LdmError(f"vae.loss.{name} is {loss[name]}; legal: 0 or more.")
    return dict(loss)
