"""GAN baselines: a least-squares GAN, and a VAE-GAN, both conditional on covariates.

Generator and discriminator take one backward pass together: the generator's terms see the discriminator's weights
detached, and the discriminator's loss sees the generated images detached, so each gradient stays where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.conditioning.base import COVARIATES, Condition
from ldm.diffusion.checks import check_count
from ldm.diffusion.noise import step_generator
from ldm.errors import LdmError, nearest
from ldm.metrics.kernels import kernel_distance
from ldm.model.build import construct
from ldm.model.gan import GAN, gan_conditioners
from ldm.networks.frozen import without_own_gradients
from ldm.networks.gan import ImageDiscriminator
from ldm.training.ema import EMA
from ldm.training.module import StageModule
from ldm.training.vae import kl_divergence, psnr

POOLED = 8  # cells an axis in which images are compared at validation
SHOWN = 4  # reconstructions in a panel
DISCRIMINATOR_TERMS = ("discriminator", "r1")  # which the generator's loss has not


def discriminator_loss(real: Tensor, *fakes: Tensor) -> Tensor:
    """Least squares with targets 1 and 0 (Mao et al. 2017, eq. 9, a = 0, b = 1); kinds of fakes share one half.

    Args:
        real, fakes: scores ``(B,)``.
    """
    on_fakes = torch.stack([fake.square().mean() for fake in fakes]).mean()
    return 0.5 * ((real - 1).square().mean() + on_fakes)


def generator_loss(fake: Tensor) -> Tensor:
    """Least squares towards the score of a real image (Mao et al. 2017, eq. 9, c = 1)."""
    return 0.5 * (fake - 1).square().mean()


def gradient_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """R1: half the mean squared length of the gradient of scores ``(B,)`` by their real images ``(B, C, *S)``.

    It keeps the discriminator flat around real images, without which it overfits few of them (Mescheder et al. 2018,
    eq. 9). The graph is kept, so that it can be trained on; lengths are in the range of the images.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)  # (B, C, *S)
    return 0.5 * gradient.float().square().flatten(1).sum(1).mean()


class ConditionalDiscriminator(nn.Module):
    """A discriminator with conditioners of its own, which a model file has no need of."""

    def __init__(self, conditioners: nn.ModuleDict, network: ImageDiscriminator) -> None:
        super().__init__()
        self.conditioners, self.network = conditioners, network

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """Raw scores ``(B,)`` of images ``(B, C, *S)``."""
        return self.network(x, self.conditioners(condition).embedding)

    def features(self, x: Tensor, level: int) -> Tensor:
        """Features ``(B, F, *S / 2^(level+1))`` of images ``(B, C, *S)``, which no condition enters."""
        return self.network.trunk(x, level + 1)[-1].float()


class _Features(nn.Module):
    """The features of a discriminator as a module of their own, for `without_own_gradients`."""

    def __init__(self, discriminator: ConditionalDiscriminator, level: int) -> None:
        super().__init__()
        self.discriminator, self.level = discriminator, level

    def forward(self, x: Tensor) -> Tensor:
        return self.discriminator.features(x, self.level)


class LSGAN(StageModule):
    """Trains a least-squares GAN (Mao et al. 2017) conditional on covariates (Miyato & Koyama 2018).

    The model's own network is the moving average of the generator, so what is validated, sampled and saved is always
    the average. Covariates are hidden at random, from generator and discriminator alike, so that each has a null.

    Args:
        model: header, preprocessing and schema; its network is the one that is trained.
        optimizer: see :class:`ldm.training.module.StageModule`.
        discriminator: arguments of :class:`ldm.networks.gan.ImageDiscriminator` and its ``lr``.
        loss: weights of the terms, see ``conf/gan``.
        ema_decay: of the moving average.
        log_every: steps between two logged steps.
        seed: of the random numbers.

    Raises:
        LdmError: a setting that is not legal.
    """

    LOSS_KEYS: Sequence[str] = ("adversarial_weight", "r1_weight", "r1_every")

    def __init__(
        self,
        model: GAN,
        optimizer: Mapping[str, Any],
        discriminator: Mapping[str, Any],
        loss: Mapping[str, Any],
        ema_decay: float = 0.999,
        log_every: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        if not 0 <= ema_decay < 1:
            raise LdmError(f"gan.ema_decay is {ema_decay}; legal: from 0 to below 1.")
        self.loss = self._checked(loss)
        self.network = model.network
        self.discriminator_lr, self.discriminator = _build_discriminator(model, discriminator)
        self.ema = EMA(self.network, (ema_decay,))
        model.network = self.ema.module
        self._model = [model]  # a list keeps it out of the module tree
        self.log_every = log_every
        self.image_range = model.preprocessing.value_range
        self.validation: dict[str, Any] = {}

    @property
    def model(self) -> GAN:
        """The model that is sampled from and saved: the moving average."""
        return self._model[0]

    def _checked(self, loss: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in loss.items():
            if name not in self.LOSS_KEYS:
                hint = nearest(name, self.LOSS_KEYS)
                raise LdmError(f"gan.loss.{name} is not a setting.{hint} Legal: {', '.join(self.LOSS_KEYS)}.")
            if value < 0:
                raise LdmError(f"gan.loss.{name} is {value}; legal: 0 or more.")
        check_count("gan.loss.r1_every", loss["r1_every"])
        return dict(loss)

    def fit_conditioners(self, codes: Tensor) -> None:
        """Standardise continuous covariates by their distribution, ``(N, K)`` encoded training values."""
        for network in (self.network, self.discriminator, self.model.network):
            if COVARIATES in network.conditioners:
                network.conditioners[COVARIATES].fit(codes)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for the generator (with an encoder, if there is one), and another for the discriminator."""
        return [
            self.adamw(self.network.parameters()),
            self.adamw(self.discriminator.parameters(), self.discriminator_lr),
        ]

    # --- training -----------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """One batch: all terms, one backward pass, one step of both optimizers, one of the average."""
        x, draws = batch["image"], self._draws(batch)
        condition = self.network.conditioners.drop({COVARIATES: batch["covariates"]}, draws["hide"])
        terms, scores = self.loss_terms(x, condition, draws)
        loss = self.weighted(terms)
        total = loss + self.of_discriminator(terms)
        terms = {name: term.detach() for name, term in terms.items()}
        self.require_finite(total.detach(), terms, batch["index"])
        norms = self.step_optimizers(total, [self.network, self.discriminator])
        if norms is None:
            return
        self.ema.update(self.network)
        if (self.step - 1) % self.log_every == 0:
            values = {"loss": loss.detach(), "lr": self.settings["lr"] * self.lr_factor()}
            values |= terms
            values |= {f"score/{name}": score.detach().mean() for name, score in scores.items()}
            values |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
            self.record({f"gan/train/{name}": value for name, value in values.items()}, reduce=True)

    def weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The generator's loss: its terms with their weights."""
        own = (name for name in terms if name not in DISCRIMINATOR_TERMS)
        return sum(self.loss[f"{name}_weight"] * terms[name] for name in own)

    def of_discriminator(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The discriminator's loss, with its penalty if there is one; one of every k steps counts k times."""
        penalty = self.loss["r1_weight"] * self.loss["r1_every"] * terms["r1"] if "r1" in terms else 0.0
        return terms["discriminator"] + penalty

    def loss_terms(
        self, x: Tensor, condition: Condition, draws: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every term before its weight, and scores ``(B,)`` of every kind of image.

        Args:
            x: real images ``(B, C, *S)``.
            condition: of these images.
            draws: ``z`` ``(B, latent_dim)``.
        """
        fake = self.network(draws["z"], condition)  # (B, C, *S)
        scores = self._scores(x, condition, {"sample": (fake, condition)})
        terms = {
            "adversarial": generator_loss(without_own_gradients(self.discriminator, fake, condition)),
            "discriminator": discriminator_loss(scores["real"], scores["sample"]),
            **self._penalty(x, condition),
        }
        return terms, scores

    def _scores(
        self, x: Tensor, condition: Condition, fakes: Mapping[str, tuple[Tensor, Condition]]
    ) -> dict[str, Tensor]:
        """Scores ``(B,)`` of real and detached fake images, which train the discriminator."""
        fake = {name: self.discriminator(image.detach(), given) for name, (image, given) in fakes.items()}
        return {"real": self.discriminator(x, condition), **fake}

    def _penalty(self, x: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The term ``r1`` of real images, in float32, in which alone a gradient's gradient is exact enough; or none.

        Seldom is enough of it, and cheaper (Karras et al. 2020, appendix B, "lazy regularization").
        """
        if not self.loss["r1_weight"] or self.step % self.loss["r1_every"]:
            return {}
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().float().requires_grad_()
            return {"r1": gradient_penalty(self.discriminator(x, condition), x)}

    def _draws(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """All random numbers of a batch, one named stream a sample."""
        generators, count = self.generators(len(batch["image"])), self.network.conditioners.num_uniforms
        shape = self.model.latent_shape
        draws = {
            "hide": torch.stack([torch.rand(count, generator=g) for g in generators]),  # (B, num_uniforms)
            "z": torch.stack([torch.randn(shape, generator=g) for g in generators]),  # (B, latent_dim)
            "posterior": torch.stack([torch.randn(shape, generator=g) for g in generators]),  # (B, latent_dim)
        }
        return {name: value.to(batch["image"].device) for name, value in draws.items()}

    # --- validation ---------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start collecting; the model follows the module to its device."""
        self.model.to(self.device)
        self.validation = {"score/real": [], "score/sample": [], "pooled/real": [], "pooled/sample": [], "panels": []}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """Held-out images beside samples of the average at their covariates, with fixed noise."""
        x, condition, store = batch["image"], {COVARIATES: batch["covariates"]}, self.validation
        streams = [step_generator(self.seed, 0, int(row)) for row in batch["index"]]
        z = torch.stack([torch.randn(self.model.latent_shape, generator=g) for g in streams]).to(x.device)
        for name, images in (("real", x), ("sample", self.model.network(z, condition))):
            store[f"score/{name}"] += self.discriminator(images, condition).tolist()
            store[f"pooled/{name}"].append(_pooled(images))

    def on_validation_epoch_end(self) -> None:
        """Log mean scores, and how far the samples are from the held-out images when both are seen coarsely."""
        store = self.validation
        metrics = {f"score/{name}": float(np.mean(store[f"score/{name}"])) for name in ("real", "sample")}
        real, sample = (np.concatenate(store[f"pooled/{name}"]) for name in ("real", "sample"))
        if not np.isfinite(sample).all():
            raise LdmError("Generated images are not finite: lower gan.optimizer.lr.")
        if len(real) > 1:
            metrics["pooled_kid"] = kernel_distance(sample, real)
        self.record({f"gan/val/{name}": value for name, value in metrics.items()}, reduce=True)


class VAEGAN(LSGAN):
    """Trains a VAE-GAN (Larsen et al. 2016): an encoder beside a generator, which is its decoder.

    As in algorithm 1 of the paper the encoder is trained on KL and reconstruction, the generator on the reconstruction
    and on fooling the discriminator with reconstructions and with draws of N(0, I), and the discriminator on real
    images, reconstructions and draws. Images are compared in the features of one level of the discriminator (eq. 8).
    Other than in the paper, the adversarial terms are least squares, and an L1 term stands beside the features, which
    leave open how bright an image is (Kwon et al. 2019 train a GAN of brain volumes with L1). All terms are means over
    their elements, and the KL is divided by the number of image elements, as in :class:`ldm.training.vae.VAE`.

    Args:
        loss: beside weights, ``feature_level``, the discriminator's level, counted from 0.
    """

    LOSS_KEYS = (
        "adversarial_weight",
        "r1_weight",
        "r1_every",
        "l1_weight",
        "features_weight",
        "kl_weight",
        "feature_level",
    )

    def __init__(self, model: GAN, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        level, count = self.loss["feature_level"], len(self.discriminator.network.trunk.levels)
        if level not in range(count):
            raise LdmError(f"gan.loss.feature_level is {level}; the discriminator has levels 0 to {count - 1}.")

    def loss_terms(
        self, x: Tensor, condition: Condition, draws: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every term before its weight, and scores ``(B,)`` of every kind of image.

        Args:
            x: real images ``(B, C, *S)``.
            condition: of these images.
            draws: ``z`` and ``posterior`` ``(B, latent_dim)``.
        """
        embedding = self.network.embed(condition)  # (B, E)
        mean, std = self.network.encoder(x, embedding)  # (B, latent_dim) each
        code = mean + std * draws["posterior"]
        rebuilt = self.network.generator(code, embedding)  # (B, C, *S)
        # the same images once more, now without a way back to the encoder, and draws of the prior
        codes = torch.cat([code.detach(), draws["z"]])  # (2 B, latent_dim)
        fakes = self.network.generator(codes, None if embedding is None else embedding.repeat(2, 1))  # (2 B, C, *S)
        kinds = dict(zip(("reconstruction", "sample"), fakes.chunk(2), strict=True))  # (B, C, *S) each
        # apart, as the discriminator may compare the images of a batch with each other
        scores = self._scores(x, condition, {name: (images, condition) for name, images in kinds.items()})
        fooled = [without_own_gradients(self.discriminator, images, condition) for images in kinds.values()]
        see = _Features(self.discriminator, self.loss["feature_level"])
        with torch.no_grad():
            wanted = see(x)
        terms = {
            "l1": F.l1_loss(rebuilt, x),
            "features": F.mse_loss(without_own_gradients(see, rebuilt), wanted),
            "kl": kl_divergence(mean, std).sum() / x.numel(),
            "adversarial": generator_loss(torch.cat(fooled)),
            "discriminator": discriminator_loss(scores["real"], scores["reconstruction"], scores["sample"]),
            **self._penalty(x, condition),
        }
        return terms, scores

    def on_validation_epoch_start(self) -> None:
        """Start collecting."""
        super().on_validation_epoch_start()
        self.validation |= {"psnr": [], "kl": []}

    def validation_step(self, batch: Mapping[str, Any], batch_index: int) -> None:
        """As of a GAN, and held-out reconstructions from the posterior mean."""
        super().validation_step(batch, batch_index)
        x, network, store = batch["image"], self.model.network, self.validation
        embedding = network.embed({COVARIATES: batch["covariates"]})
        mean, std = network.encoder(x, embedding)
        rebuilt = network.generator(mean, embedding)  # (B, C, *S)
        low, high = self.image_range or (float(x.min()), float(x.max()))
        store["psnr"] += [psnr(one, other, high - low) for one, other in zip(x, rebuilt, strict=True)]
        store["kl"].append(float(kl_divergence(mean, std).sum() / x.numel()))
        left = SHOWN - len(store["panels"])
        store["panels"] += [(one.cpu(), other.cpu()) for one, other in zip(x[:left], rebuilt[:left], strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        super().on_validation_epoch_end()
        means = {f"gan/val/{name}": float(np.mean(self.validation[name])) for name in ("psnr", "kl")}
        self.record(means, reduce=True)


MODULES = {"lsgan": LSGAN, "vaegan": VAEGAN}


def _build_discriminator(model: GAN, settings: Mapping[str, Any]) -> tuple[float, ConditionalDiscriminator]:
    """The discriminator's learning rate, and itself."""
    settings, header = dict(settings), model.header
    lr, conditioners = settings.pop("lr"), gan_conditioners(header, model.schema)
    settings |= {name: header["network"][name] for name in ("spatial_dims", "image_size")}
    settings |= {
        "in_channels": header["network"]["out_channels"],
        "embedding_dim": header["condition"]["dim"] if conditioners.has_embedding else 0,
    }
    return lr, ConditionalDiscriminator(conditioners, construct(ImageDiscriminator, settings, "gan.discriminator"))


def _pooled(images: Tensor) -> np.ndarray:
    """Images ``(B, C, *S)`` as they look from far: means over a coarse grid, ``(B, F)``."""
    size = [min(POOLED, side) for side in images.shape[2:]]
    pool = F.adaptive_avg_pool3d if len(size) == 3 else F.adaptive_avg_pool2d
    return pool(images.float(), size).flatten(1).double().cpu().numpy()
