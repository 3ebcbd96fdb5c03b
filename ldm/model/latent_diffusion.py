"""The model a user keeps: everything needed to generate, in one object and one file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.base import COVARIATES, Condition, stack
from ldm.conditioning.planes import PlaneConditioner
from ldm.data.distribution import CovariateDistribution
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.diffusion import guidance, noise
from ldm.diffusion.checks import check_choice, check_count
from ldm.diffusion.grid import Step
from ldm.diffusion.prediction import Denoise, Prediction, to_prediction
from ldm.diffusion.process import check_process, schedule_from_dict
from ldm.diffusion.samplers import sampler as find_sampler
from ldm.diffusion.schedule import TIMESTEP_SPACINGS
from ldm.errors import LdmError
from ldm.latents.space import LatentSpace
from ldm.model.build import build_first_stage, construct
from ldm.model.editing import Editing
from ldm.model.generative import CovariateRow, Generative, Samples
from ldm.model.inputs import Inputs, encode_condition, input_names
from ldm.model.network import ConditionalDenoiser, with_new_names
from ldm.networks.frozen import freeze
from ldm.precision import autocast

KIND = "latent_diffusion"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingOptions:
    """How a sample is drawn; stored with the model as its defaults.

    Attributes:
        sampler: a name in :data:`ldm.diffusion.samplers.SAMPLERS`.
        num_inference_steps: moves of the chain; a network call each, two with ``heun``, times the conditions evaluated.
        timestep_spacing: ``trailing``, ``leading``, ``linspace``, ``karras`` or ``cubic``, see the schedule's ``grid``.
        guidance_scale: 1 is the conditional model itself; larger exaggerates the condition. A mapping such as
            ``{"age": 2.0, "mask": 1.5}`` gives covariates or conditioners scales of their own, 1 where none is given:
            ``eps = eps(c) + sum_k (s_k - 1) (eps(c) - eps(c without k))``.
        guidance_interval: ``(low, high)`` of sigma / alpha, where alone there is guidance; None for everywhere.
        guidance_rescale: 0 is off; towards 1 the guided prediction keeps the spread of the conditional one.
        options: further options of the sampler, e.g. ``{"eta": 0.5}``.

    Raises:
        LdmError: an unknown name, or a number outside its range.
    """

    sampler: str = "dpmpp_2m_sde"
    num_inference_steps: int = 20
    timestep_spacing: str = "karras"
    guidance_scale: float | Mapping[str, float] = 1.0
    guidance_interval: Sequence[float] | None = None
    guidance_rescale: float = 0.0
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        find_sampler(self.sampler, **dict(self.options or {}))
        check_count("num_inference_steps", self.num_inference_steps)
        guidance.check_scale(self.guidance_scale)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        guidance.check_rescale(self.guidance_rescale)
        if self.guidance_interval is not None:
            guidance.check_interval(self.guidance_interval)


class LatentDiffusionModel(Editing, Generative):
    """First stage, latent statistics, denoiser, conditioners and schedule, with the data's description.

    Use :meth:`load`; the constructor is for training. Images come from :meth:`sample`::

        model = LatentDiffusionModel.load("runs/simulated/ldm/model.safetensors")
        samples = model.sample({"age": 70}, n=4, seed=0)
        scan = model.preprocessing.restore(samples.images[0])   # a nibabel image in the cohort's space

    Args:
        header: the description that is written into the file; see :meth:`describe`.
        space: latent statistics.
        preprocessing: how scans became model input, and the way back. That of images that are given lies in the header
            as ``input_preprocessing`` where what is generated is something else, label maps.
        schema: covariates the model knows.
        distribution: description of the training covariates, used when none are asked for.
    """

    kind = KIND
    section = "ldm"
    what = "diffusion model"
    reconstructs = True

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
        given = header.get("input_preprocessing")
        self.input_preprocessing = preprocessing if given is None else Preprocessing.from_dict(given)
        self.first_stage = freeze(first_stage or build_first_stage(header["first_stage"]))
        self.latent_space = space
        self.network = ConditionalDenoiser(header, schema)
        self.latent_shape = tuple(header["latent_shape"])
        self.schedule = schedule_from_dict(header["schedule"], math.prod(self.latent_shape[1:]))
        self.prediction_type = header["prediction_type"]
        self.learned_variance = bool(header.get("learned_variance"))
        check_process(self.schedule, self.prediction_type, self.learned_variance)
        self.defaults = construct(SamplingOptions, header["sampling"], "ldm.sampling")
        self._check_settings(self.defaults)
        self._too_many = math.inf  # samples in one call that memory did not allow

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.latent_space.mean.device

    @property
    def classes(self) -> LabelClasses | None:
        """See :class:`Generative`."""
        target = self.header.get("target")
        return None if target is None else LabelClasses.from_config(target["labels"])

    # --- one file -----------------------------------------------------------------------------------

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> LatentDiffusionModel:
        """See :meth:`Generative.from_header`."""
        distribution = header["distribution"]
        return cls(
            header,
            LatentSpace.identity(header["latent_shape"][0]),
            Preprocessing.from_dict(header["preprocessing"]),
            CovariateSchema.from_dict(header["schema"]),
            None if distribution is None else CovariateDistribution.from_dict(distribution),
        )

    @staticmethod
    def with_names_of_now(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See :meth:`Generative.with_names_of_now`."""
        return with_new_names(tensors, "network.")

    # --- sampling -----------------------------------------------------------------------------------

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
        """Draw samples ``indices`` batch by batch; see :meth:`Generative.sample_batches`."""
        settings = self.settings(options)
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            part, numbers = list(rows[batch]), list(indices[batch])
            condition = self.encode_condition(part, {name: values[batch] for name, values in (inputs or {}).items()})
            with torch.no_grad(), autocast(self.device, precision):
                images = self.decode(self.sample_latents(condition, seed, numbers, settings))
            yield Samples(images.float().cpu().numpy(), [dict(row) for row in part], numbers)

    def reconstruct(self, images: Tensor, rows: Sequence[CovariateRow] = ()) -> Tensor:
        """Images ``(B, C, *S)`` through the first stage and the latent space that samples go through; float32."""
        with torch.no_grad(), autocast(self.device):
            mean, _ = self.first_stage.encode(images.to(self.device))
            return self.decode(self.latent_space.to_scaled(mean.float()))  # (B, C, *S)

    def settings(self, options: Mapping[str, Any]) -> SamplingOptions:
        """The stored options with ``options`` in their place; of those of another sampler only ``clip`` is kept.

        Raises:
            LdmError: an unknown name, or an illegal value.
        """
        asked = {**vars(self.defaults), **options}
        kept = dict(self.defaults.options or {})
        if asked["sampler"] != self.defaults.sampler:
            kept = {name: value for name, value in kept.items() if name == "clip"}
        given = {**asked, "options": {**kept, **(options.get("options") or {})}}
        settings = construct(SamplingOptions, given, "sample")
        self._check_settings(settings)
        return settings

    def encode_condition(self, rows: Sequence[CovariateRow], inputs: Inputs | None = None) -> Condition:
        """The condition of rows and inputs, one each a sample; see :func:`ldm.model.inputs.encode_condition`."""
        size = self.latent_shape[1:]
        recipe = self.input_preprocessing
        condition = encode_condition(self.network.conditioners, recipe, self.schema, size, rows, inputs)
        return {name: value.to(self.device) for name, value in condition.items()}

    def batch_condition(self, batch: Mapping[str, Any]) -> Condition:
        """The condition of cached latents: their codes and planes, and the captions of their covariates.

        Args:
            batch: ``covariates`` ``(B, K)``; ``labels`` and ``images`` ``(B, P, *S)`` where the network wants them.
        """
        codes, condition = batch["covariates"], {COVARIATES: batch["covariates"]}
        for name in input_names(self.network.conditioners):
            one = self.network.conditioners[name]
            if isinstance(one, PlaneConditioner):
                condition[name] = batch[one.cached_as]
            else:
                rows = [self.schema.decode(vector) for vector in codes.cpu().numpy()]
                condition[name] = torch.stack([one.encode(None, row, ()) for row in rows]).to(codes.device)
        return condition

    @torch.no_grad()
    def sample_latents(
        self, condition: Condition, seed: int, indices: Sequence[int], settings: SamplingOptions | None = None
    ) -> Tensor:
        """Scaled latents ``(B, C, *S)`` for the condition of B samples."""
        settings = self.defaults if settings is None else settings
        grid = self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        streams = noise.generators(seed, indices)
        x = grid.start_std * noise.draw(streams, self.latent_shape).to(self.device)  # (B, C, *S)
        denoise = self.guided_denoise(condition, settings)
        return find_sampler(settings.sampler, **dict(settings.options or {}))(denoise, x, grid, streams)

    def guided_denoise(self, condition: Condition, settings: SamplingOptions) -> Denoise:
        """The ``denoise`` of a sampler, guided as the settings say, for the condition of B samples.

        Raises:
            LdmError: a guidance scale for what the model is not conditioned on, or what needs a null that was never
                learned: such a scale, or a sample that is not given a covariate, a label map or an image.
        """
        self._require_learned_nulls(condition, settings)
        scale, rescale = settings.guidance_scale, settings.guidance_rescale
        if isinstance(scale, Mapping):
            nulls = [self._without(condition, name) for name in scale]
            denoise = guidance.part_by_part(self.denoise_many, condition, nulls, list(scale.values()), rescale)
        else:
            null = self.network.conditioners.null(condition)
            denoise = guidance.classifier_free(self.denoise_many, condition, null, scale, rescale)
        if settings.guidance_interval is None:
            return denoise
        plain = guidance.guided(self.denoise_many, (condition,), (1.0,))
        return guidance.within(settings.guidance_interval, denoise, plain)

    def _without(self, condition: Condition, name: str) -> Condition:
        """``condition`` without one covariate, or without all that one conditioner says."""
        self._check_part(name)
        conditioners = self.network.conditioners
        if name in conditioners:
            return conditioners.without(condition, name)
        hidden = condition[COVARIATES].clone()  # (B, K)
        hidden[:, self.schema.names.index(name)] = torch.nan
        return {**condition, COVARIATES: hidden}

    def _check_settings(self, settings: SamplingOptions) -> None:
        """Raise LdmError for what is legal of itself and not with this model."""
        self.schedule.grid(settings.num_inference_steps, settings.timestep_spacing)
        if (settings.options or {}).get("variance") == "learned" and not self.learned_variance:
            raise LdmError("variance 'learned' needs a model with ldm.learned_variance=true; use 'small' or 'large'.")
        if not isinstance(settings.guidance_scale, Mapping):
            return
        for name in settings.guidance_scale:
            self._check_part(name)
        guided = [name for name, scale in settings.guidance_scale.items() if scale != 1]
        twice = [name for name in guided if name in self.schema.names]
        if twice and COVARIATES in guided:
            raise LdmError(
                f"guidance_scale: {', '.join(twice)} would be guided twice, by '{COVARIATES}' too. Leave one out."
            )

    def _check_part(self, name: str) -> None:
        """Raise LdmError unless ``name`` can have a guidance scale of its own."""
        conditioners = self.network.conditioners
        covariates = self.schema.names if COVARIATES in conditioners else ()
        check_choice("guidance_scale: covariate or conditioner", name, [*covariates, *conditioners])
        told = conditioners["text"].caption if "text" in conditioners else None
        if name in covariates and told is not None and name in told.names:
            raise LdmError(
                f"guidance_scale: {name} is also told by the caption, so that leaving out the covariate alone leaves "
                "it known. Legal: scales for text and for covariates that the caption does not name."
            )

    def _require_learned_nulls(self, condition: Condition, settings: SamplingOptions) -> None:
        """Refuse what needs a null that was never learned; see :attr:`unlearned`."""
        for name in self.unlearned:
            key = self.drop_key if name == COVARIATES else f"ldm.conditioners.{name}.drop_rate"
            self._require_given(name, condition[name], key)
            self._require_unguided(name, settings.guidance_scale, key)

    def _require_given(self, name: str, value: Tensor, key: str) -> None:
        """Raise LdmError where ``(B, ...)`` of a conditioner has a sample to which it is not given."""
        if name == COVARIATES:
            self.require_covariates(value)
            return
        given = self.network.conditioners[name].is_given(value)  # (B,)
        if "learned_nulls" in self.header and not given.all():  # older files are asked as ever
            raise LdmError(
                f"This model never learned to go without its {name}: give one for every sample. It would have learned "
                f"it with {key} above 0."
            )

    def _require_unguided(self, name: str, scale: float | Mapping[str, float], key: str) -> None:
        """Raise LdmError for a guidance scale that compares with a sample without the conditioner ``name``."""
        parts = (name, *(set(self.schema.names) - set(self.nulls))) if name == COVARIATES else (name,)
        scales = [scale.get(part, 1) for part in parts] if isinstance(scale, Mapping) else [scale]
        if any(one != 1 for one in scales):
            raise LdmError(
                f"guidance_scale is {scale}, but this model never learned to go without its {name}, which guidance "
                f"compares with. Legal: 1; it would have learned it with {key} above 0."
            )

    def denoise_many(self, x: Tensor, step: Step, conditions: Sequence[Condition]) -> list[Prediction]:
        """Predictions for the same ``x`` under several conditions, in one network call where memory allows."""
        count = len(conditions)
        if count > 1 and count * len(x) < self._too_many:
            try:
                return self._denoise_together(x, step, conditions)
            except torch.OutOfMemoryError:
                logger.warning("Not enough memory for %d conditions in one call: one after the other from here.", count)
                self._too_many = count * len(x)
        return [self._denoise_together(x, step, [condition])[0] for condition in conditions]

    def _denoise_together(self, x: Tensor, step: Step, conditions: Sequence[Condition]) -> list[Prediction]:
        count = len(conditions)
        many = x.repeat(count, *(1,) * (x.ndim - 1))  # (count * B, C, *S)
        t = torch.full((len(many),), step.t, device=x.device)
        output = self.evaluate(self.network, many, t, stack(conditions))  # (count * B, C or 2 C, *S)
        return [self.read_output(part, x, step.alpha, step.sigma) for part in output.chunk(count)]

    def evaluate(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What a network of this model says of ``x_t``, in training as in sampling: scaled input, its own time.

        Args:
            network: the model's, or the one that is being trained.
            x_t: (B, C, *S).
            t: (B,) times of the schedule.
            condition: of the B samples.

        Returns:
            (B, C, *S) float32; with a learned variance (B, 2 C, *S).
        """
        scale = self.schedule.input_scale(t).view(-1, *[1] * (x_t.ndim - 1))  # (B, 1, ..., 1)
        return network(scale * x_t, self.schedule.network_time(t), condition).float()

    def read_output(self, output: Tensor, x_t: Tensor, alpha: Any, sigma: Any) -> Prediction:
        """A network output as a prediction; the second half of one with a learned variance is in [-1, 1].

        Args:
            output: of :meth:`evaluate`.
            x_t: (B, C, *S).
            alpha, sigma: of ``x_t``; a float, or (B,).
        """
        if not self.learned_variance:
            return to_prediction(self.prediction_type, output, x_t, alpha, sigma)
        output, v = output.chunk(2, dim=1)  # (B, C, *S) each
        prediction = to_prediction(self.prediction_type, output, x_t, alpha, sigma)
        return Prediction(prediction.x0, prediction.eps, (v + 1) / 2)

    @torch.no_grad()
    def decode(self, scaled: Tensor) -> Tensor:
        """Images ``(B, C, D, H, W)`` of scaled latents, clipped to the stored intensity range where it has one."""
        images = self.first_stage.decode(self.latent_space.to_raw(scaled)).float()
        intensity = self.preprocessing.intensity
        return images.clamp(*intensity.range) if intensity.has_range else images
