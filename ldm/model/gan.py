"""A trained GAN: everything needed to generate, in one object and one file, sampled like a diffusion model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.base import COVARIATES, Condition
from ldm.conditioning.build import build_conditioners
from ldm.data.distribution import CovariateDistribution
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.diffusion import noise
from ldm.errors import LdmError, nearest
from ldm.model.build import construct
from ldm.model.generative import CovariateRow, Generative, Samples
from ldm.model.inputs import Inputs, check_inputs
from ldm.networks.gan import Encoder, Generator
from ldm.precision import autocast

KIND = "gan"
METHODS = {"lsgan": "LSGAN", "vaegan": "VAE-GAN"}
CONDITIONS = ("adaptive_norm", "none")


@dataclass(frozen=True)
class NoOptions:
    """A GAN draws in one network call: there is nothing to choose."""


def gan_conditioners(header: Mapping[str, Any], schema: CovariateSchema) -> nn.ModuleDict:
    """The conditioners of a GAN's networks: covariates as one embedding, or nothing.

    Raises:
        LdmError: another mode than ``adaptive_norm`` or ``none``.
    """
    condition = header["condition"]
    if condition["mode"] not in CONDITIONS:
        raise LdmError(f"gan.condition.mode is '{condition['mode']}'; legal: {', '.join(CONDITIONS)}.")
    return build_conditioners(schema, condition, {}, header["network"]["spatial_dims"], condition["dim"])


class ConditionalGenerator(nn.Module):
    """Conditioners, generator and, for a VAE-GAN, encoder: what is trained, averaged and sampled from.

    Args:
        header: model description with ``method``, ``network`` (arguments of the generator), ``encoder`` (``channels``
            and ``norm_num_groups``, of a VAE-GAN) and ``condition``.
        schema: covariates to condition on.

    Raises:
        LdmError: an unknown method or setting, or sizes that do not fit.
    """

    def __init__(self, header: Mapping[str, Any], schema: CovariateSchema) -> None:
        super().__init__()
        if header["method"] not in METHODS:
            hint = nearest(header["method"], METHODS)
            raise LdmError(f"gan.method '{header['method']}' is unknown; legal: {', '.join(METHODS)}.{hint}")
        self.conditioners = gan_conditioners(header, schema)
        settings = dict(header["network"])
        width = {"embedding_dim": header["condition"]["dim"] if self.conditioners.has_embedding else 0}
        self.generator = construct(Generator, {**settings, **width}, "gan.network")
        self.encoder = None
        if header["method"] == "vaegan":
            shared = {name: settings[name] for name in ("spatial_dims", "image_size", "latent_dim")}
            shared |= {"in_channels": settings["out_channels"], **width}
            self.encoder = construct(Encoder, {**header["encoder"], **shared}, "gan.encoder")

    def embed(self, condition: Condition) -> Tensor | None:
        """The embedding ``(B, E)`` of a condition; None without covariates."""
        return self.conditioners(condition).embedding

    def forward(self, z: Tensor, condition: Condition) -> Tensor:
        """Images ``(B, C, *S)`` of noise ``(B, latent_dim)``."""
        return self.generator(z, self.embed(condition))


class GAN(Generative):
    """An LSGAN or the generator and encoder of a VAE-GAN, with the data's description.

    Use :meth:`load`; the constructor is for training. Images come from :meth:`sample`, as of a
    :class:`ldm.model.latent_diffusion.LatentDiffusionModel`.

    Args:
        header: the description that is written into the file; see :class:`ConditionalGenerator`.
        preprocessing: how scans became model input, and the way back.
        schema: covariates the model knows.
        distribution: description of the training covariates, used when none are asked for.
    """

    kind = KIND
    section = "gan"

    def __init__(
        self,
        header: Mapping[str, Any],
        preprocessing: Preprocessing,
        schema: CovariateSchema,
        distribution: CovariateDistribution | None = None,
    ) -> None:
        super().__init__()
        self.header = dict(header)
        self.preprocessing, self.schema, self.distribution = preprocessing, schema, distribution
        self.network = ConditionalGenerator(header, schema)
        self.latent_shape = (int(header["network"]["latent_dim"]),)
        self.defaults = NoOptions()
        self.what = METHODS[header["method"]]
        self.reconstructs = self.network.encoder is not None

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.network.generator.start.weight.device

    # --- one file -----------------------------------------------------------------------------------

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> GAN:
        """See :meth:`Generative.from_header`."""
        distribution = header["distribution"]
        return cls(
            header,
            Preprocessing.from_dict(header["preprocessing"]),
            CovariateSchema.from_dict(header["schema"]),
            None if distribution is None else CovariateDistribution.from_dict(distribution),
        )

    # --- sampling -----------------------------------------------------------------------------------

    def settings(self, options: Mapping[str, Any]) -> NoOptions:
        """Nothing can be chosen.

        Raises:
            LdmError: there is an option; the message names it.
        """
        if options:
            raise LdmError(
                f"{', '.join(options)}: the {self.what} draws in one network call and has no sampling options; leave "
                "it out."
            )
        return self.defaults

    def condition(self, rows: Sequence[CovariateRow]) -> dict[str, Tensor]:
        """The condition of covariate rows: codes ``(B, K)``, NaN where not given."""
        return {COVARIATES: torch.from_numpy(self.schema.encode_table(rows)).to(self.device)}

    def sample_batches(
        self,
        rows: Sequence[CovariateRow],
        indices: Sequence[int],
        seed: int = 0,
        batch_size: int = 4,
        precision: str = "auto",
        inputs: Inputs | None = None,
        **options: Any,
    ) -> Iterator[Samples]:
        """Draw samples ``indices`` batch by batch; see :meth:`Generative.sample_batches`.

        Raises:
            LdmError: an option, an input, or a sample without a covariate that training never hid.
        """
        self.settings(options)
        check_inputs(self.network.conditioners, inputs or {})
        for start in range(0, len(rows), batch_size):
            part, numbers = list(rows[start : start + batch_size]), list(indices[start : start + batch_size])
            condition = self.condition(part)
            self.require_covariates(condition[COVARIATES])
            z = noise.draw(noise.generators(seed, numbers), self.latent_shape).to(self.device)  # (B, latent_dim)
            with torch.no_grad(), autocast(self.device, precision):
                images = self.network(z, condition)  # (B, C, *S)
            yield Samples(images.float().cpu().numpy(), [dict(row) for row in part], numbers)

    def reconstruct(self, images: Tensor, rows: Sequence[CovariateRow]) -> Tensor:
        """Images ``(B, C, *S)`` from the mean of their posteriors.

        Raises:
            LdmError: the GAN has no encoder.
        """
        if self.network.encoder is None:
            raise LdmError(f"The {self.what} has no encoder: it cannot reconstruct.")
        with torch.no_grad(), autocast(self.device):
            embedding = self.network.embed(self.condition(rows))
            mean, _ = self.network.encoder(images.to(self.device), embedding)
            return self.network.generator(mean, embedding)
