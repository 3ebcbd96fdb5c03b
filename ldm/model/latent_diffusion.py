"""The model a user keeps: everything needed to generate, in one object and one file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.distribution import CovariateDistribution
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.diffusion import guidance, noise
from ldm.diffusion.prediction import Prediction, to_prediction
from ldm.diffusion.samplers import sampler as find_sampler
from ldm.diffusion.schedule import NoiseSchedule, Step
from ldm.errors import LdmError
from ldm.latents.space import LatentSpace
from ldm.model.build import build_first_stage, construct
from ldm.model.file import load_strict, read_header, read_tensors, write_model
from ldm.model.first_stage import freeze
from ldm.model.network import ConditionalDenoiser
from ldm.precision import autocast

logger = logging.getLogger(__name__)

KIND = "latent_diffusion"
CovariateRow = Mapping[str, Any]


@dataclass(frozen=True)
class SamplingOptions:
    """How a sample is drawn; stored with the model as its defaults.

    Attributes:
        sampler: a name in :data:`ldm.diffusion.samplers.SAMPLERS`.
        num_inference_steps: network calls a sample (twice that with guidance).
        timestep_spacing: ``trailing``, ``leading`` or ``linspace``.
        guidance_scale: 1 is the conditional model itself; larger exaggerates the condition.
        options: further options of the sampler, e.g. ``{"eta": 0.5}``.
    """

    sampler: str = "ddim"
    num_inference_steps: int = 50
    timestep_spacing: str = "trailing"
    guidance_scale: float = 1.0
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Samples:
    """Generated images with what was asked for.

    Attributes:
        images: ``(N, C, D, H, W)`` float32 in the model's stored range; 2-D: ``(N, C, H, W)``.
        covariates: one row a sample, in physical units; None where nothing was asked.
        indices: number of each sample in its run; (seed, index) fixes its noise.
    """

    images: np.ndarray
    covariates: list[dict[str, Any]]
    indices: list[int]


class LatentDiffusionModel(nn.Module):
    """First stage, latent statistics, denoiser, conditioner and schedule, with the data's description.

    Use :meth:`load`; the constructor is for training. Images come from :meth:`sample`::

        model = LatentDiffusionModel.load("runs/simulated/ldm/model.safetensors")
        samples = model.sample({"age": 70}, n=4, seed=0)
        scan = model.preprocessing.restore(samples.images[0])   # a nibabel image in the cohort's space

    Args:
        header: the description that is written into the file; see :meth:`describe`.
        space: latent statistics.
        preprocessing: how scans became model input, and the way back.
        schema: covariates the model knows.
        distribution: description of the training covariates, used when none are asked for.
    """

    def __init__(
        self,
        header: Mapping[str, Any],
        space: LatentSpace,
        preprocessing: Preprocessing,
        schema: CovariateSchema,
        distribution: CovariateDistribution | None = None,
        first_stage: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.header = dict(header)
        self.preprocessing, self.schema, self.distribution = preprocessing, schema, distribution
        self.first_stage = freeze(first_stage or build_first_stage(header["first_stage"]))
        self.latent_space = space
        self.network = ConditionalDenoiser(header, schema)
        self.schedule = NoiseSchedule.from_dict(header["schedule"])
        self.prediction_type = header["prediction_type"]
        self.latent_shape = tuple(header["latent_shape"])
        self.defaults = SamplingOptions(**header["sampling"])

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.latent_space.mean.device

    # --- one file -----------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write ``model.safetensors`` atomically; the file alone is enough to sample."""
        header = {
            **self.header,
            "kind": KIND,
            "preprocessing": self.preprocessing.to_dict(),
            "schema": self.schema.to_dict(),
            "distribution": None if self.distribution is None else self.distribution.to_dict(),
        }
        write_model(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> LatentDiffusionModel:
        """Read a model file; nothing in it is executed.

        Raises:
            LdmError: not such a file, or its tensors do not fit its description.
        """
        header = read_header(Path(path), KIND)
        channels = header["latent_shape"][0]
        distribution = header["distribution"]
        schema = CovariateSchema.from_dict(header["schema"])
        model = cls(
            header,
            LatentSpace.identity(channels),
            Preprocessing.from_dict(header["preprocessing"]),
            schema,
            None if distribution is None else CovariateDistribution.from_dict(distribution),
        )
        load_strict(model, read_tensors(path), Path(path))
        return model.to(device).eval()

    # --- sampling -----------------------------------------------------------------------------------

    def covariate_rows(
        self, covariates: CovariateRow | Sequence[CovariateRow] | None, n: int | None, seed: int = 0
    ) -> list[dict[str, Any]]:
        """The rows that will be asked for.

        Args:
            covariates: one row for all samples, one row each, or None to draw from the stored description of
                the training distribution. Names not given fall to their learned null.
            n: number of samples; with several rows they are repeated in turn.
            seed: of the draw when ``covariates`` is None.

        Raises:
            LdmError: unknown name or level; the message names the nearest.
        """
        if covariates is None:
            n = 1 if n is None else n
            if not len(self.schema) or self.distribution is None:
                return [{} for _ in range(n)]
            return self.distribution.sample(n, seed)
        rows = [dict(covariates)] if isinstance(covariates, Mapping) else [dict(row) for row in covariates]
        if not rows:
            raise LdmError("covariates is an empty table: give at least one row, or leave it out.")
        for row in rows:
            self.schema.encode(row)
            for warning in self.schema.out_of_range(row):
                logger.warning("Extrapolation: %s", warning)
        n = len(rows) if n is None else n
        return [rows[i % len(rows)] for i in range(n)]

    def sample(
        self,
        covariates: CovariateRow | Sequence[CovariateRow] | None = None,
        n: int | None = None,
        seed: int = 0,
        batch_size: int = 4,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Samples:
        """Draw images.

        Args:
            covariates: see :meth:`covariate_rows`.
            n: number of samples.
            seed: with the sample's number it fixes the noise, whatever the batch size.
            batch_size: samples computed together.
            progress: called with the number of finished samples.
            options: override the stored :class:`SamplingOptions`.
        """
        rows = self.covariate_rows(covariates, n, seed)
        images = []
        for batch in self.sample_batches(rows, range(len(rows)), seed, batch_size, **options):
            images.append(batch.images)
            if progress is not None:
                progress(len(batch.images))
        return Samples(np.concatenate(images), rows, list(range(len(rows))))

    def sample_batches(
        self,
        rows: Sequence[CovariateRow],
        indices: Sequence[int],
        seed: int = 0,
        batch_size: int = 4,
        precision: str = "auto",
        **options: Any,
    ) -> Iterator[Samples]:
        """Draw samples ``indices`` batch by batch, so that any number fits in memory.

        Args:
            rows: one covariate row a sample.
            indices: number of each sample in its run.
            seed, batch_size: see :meth:`sample`.
            precision: ``auto``, ``bf16`` or ``float32``.
            options: override the stored :class:`SamplingOptions`.
        """
        settings = construct(SamplingOptions, {**vars(self.defaults), **options}, "sample")
        for start in range(0, len(rows), batch_size):
            part, numbers = list(rows[start : start + batch_size]), list(indices[start : start + batch_size])
            with torch.no_grad(), autocast(self.device, precision):
                images = self.decode(self.sample_latents(self.encode_covariates(part), seed, numbers, settings))
            yield Samples(images.float().cpu().numpy(), [dict(row) for row in part], numbers)

    def encode_covariates(self, rows: Sequence[CovariateRow]) -> Tensor:
        """``(B, K)`` codes of covariate rows, NaN where a name is not given."""
        return torch.from_numpy(self.schema.encode_table(rows)).to(self.device)

    @torch.no_grad()
    def sample_latents(
        self, values: Tensor, seed: int, indices: Sequence[int], settings: SamplingOptions | None = None
    ) -> Tensor:
        """Scaled latents ``(B, C, *S)`` for encoded covariates ``(B, K)``."""
        settings = self.defaults if settings is None else settings
        self._require_learned_nulls(values, settings.guidance_scale)
        streams = noise.generators(seed, indices)
        x = noise.draw(streams, self.latent_shape).to(self.device)  # (B, C, *S)
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        denoise = guidance.classifier_free(
            self.denoise_many, values, torch.full_like(values, torch.nan), settings.guidance_scale
        )
        return find_sampler(settings.sampler, **dict(settings.options or {}))(denoise, x, grid, streams)

    def _require_learned_nulls(self, values: Tensor, guidance_scale: float) -> None:
        """Refuse what needs a null of a model that was imported without one (``learned_null`` in the header)."""
        if self.header.get("learned_null", True):
            return
        left_out = [name for name, column in zip(self.schema.names, values.T, strict=True) if column.isnan().any()]
        if left_out:
            raise LdmError(f"This model never learned to go without a covariate; also ask for: {', '.join(left_out)}.")
        if guidance_scale != 1:
            raise LdmError(
                f"guidance_scale is {guidance_scale}, but this model never learned to go without its covariates, which "
                "guidance compares with. Legal: 1."
            )

    def denoise_many(self, x: Tensor, step: Step, conditions: Sequence[Tensor]) -> list[Prediction]:
        """Predictions for the same ``x`` under several conditions, in one network call."""
        count = len(conditions)
        values = torch.cat(list(conditions))  # (count * B, K)
        many = x.repeat(count, *(1,) * (x.ndim - 1))  # (count * B, C, *S)
        t = torch.full((len(many),), step.t, device=x.device)
        output = self.network(many, t, values)  # (count * B, C, *S)
        return [to_prediction(self.prediction_type, part, x, step.alpha, step.sigma) for part in output.chunk(count)]

    @torch.no_grad()
    def decode(self, scaled: Tensor) -> Tensor:
        """Images ``(B, C, D, H, W)`` of scaled latents, clipped to the stored intensity range where it has one."""
        images = self.first_stage.decode(self.latent_space.to_raw(scaled)).float()
        intensity = self.preprocessing.intensity
        return images.clamp(*intensity.range) if intensity.has_range else images
