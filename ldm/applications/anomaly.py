"""Weakly supervised anomaly detection: what would this image look like if it were healthy? (Wolleb et al. 2022)

An image is brought to noise by DDIM up to a level L, and back by DDIM that is guided towards "healthy"; where the two
differ is the anomaly. Training needs one word an image, healthy or diseased, and no lesion masks.

=============  ================================================================================================
guide          way in; way back
=============  ================================================================================================
``classifier`` DDIM encoding; DDIM guided by the gradient of a classifier of noisy latents (the paper)
``free``       DDIM encoding; classifier-free guidance of one conditional model towards "healthy"
``none``       noise of level L; ancestral sampling (partial noising, as AnoDDPM, Wyatt et al. 2022, but with Gaussian
               noise; learned on healthy and diseased images alike, it is a baseline here and no contender)
=============  ================================================================================================

The model is asked with its null for everything that is not the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ldm.conditioning.base import COVARIATES
from ldm.data.schema import Covariate
from ldm.diffusion import guidance, noise
from ldm.diffusion.checks import check_choice, check_count, check_number
from ldm.diffusion.grid import Grid
from ldm.diffusion.prediction import Denoise
from ldm.diffusion.samplers import ddim, ddim_encode, ddpm
from ldm.errors import LdmError
from ldm.model.build import PIXELS
from ldm.model.classifier import Classifier
from ldm.model.first_stage import FirstStage
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.precision import autocast

GUIDES = ("classifier", "free", "none")
REDUCTIONS = ("sum", "mean")
CHANGES = ("both", "brighter", "darker")
SCORES = ("mean", "p99", "max")
#: What a level of a covariate is called where it means "healthy".
HEALTHY_WORDS = ("0", "healthy", "normal", "control", "no", "false")
#: s where nothing was chosen: Wolleb et al. 2022 for a classifier; a common scale for classifier-free guidance
SCALES = {"classifier": 100.0, "free": 3.0, "none": 0.0}
#: Options of maps and scores alone, which counterparts do not depend on.
MAP_OPTIONS = ("channels", "change", "smoothing", "score")
#: In place of a scale: decode as was encoded, without guidance.
ROUND_TRIP = None


@dataclass(frozen=True)
class DetectionOptions:
    """How a healthy counterpart is made, and a map and a score of it.

    Attributes:
        guide: one of `GUIDES`.
        level: L, a time of the schedule (500 of 1000 in the paper); None is the middle of the training times.
        scale: s; None is that of `SCALES`.
        steps: moves of the whole chain, of which those that start at level L or below are walked.
        timestep_spacing: of the chain.
        encode_as: level of the class that the way in is told (``free`` only); None for the null.
        channels: ``sum`` (the paper) or ``mean`` of the channels' differences, or the name of the channel that counts.
        change: what is a difference: ``both`` ways (the paper), or only what is ``brighter`` or ``darker`` than in the
            healthy counterpart, where it is known how the lesions look.
        smoothing: standard deviation, in voxels, of a Gaussian that the map is smoothed with; 0 for none.
        score: of an image: ``mean``, 99th percentile (``p99``) or ``max`` of its map.

    Raises:
        LdmError: an unknown name, or a number outside its range.
    """

    guide: str = "classifier"
    level: float | None = None
    scale: float | None = None
    steps: int = 100
    timestep_spacing: str = "trailing"
    encode_as: str | None = None
    channels: str = "sum"
    change: str = "both"
    smoothing: float = 0.0
    score: str = "p99"

    def __post_init__(self) -> None:
        check_choice("guide", self.guide, GUIDES)
        check_choice("change", self.change, CHANGES)
        check_choice("score", self.score, SCORES)
        check_count("steps", self.steps)
        check_number("smoothing", self.smoothing, 0, math.inf, "0 (none) or a standard deviation in voxels")
        if self.level is not None:
            check_number("level", self.level, 0, math.inf, "a time of the model's schedule")
        if self.encode_as is not None and self.guide != "free":
            raise LdmError(f"encode_as has no meaning with guide={self.guide}: only guide=free tells the class.")
        if self.scale is None:
            object.__setattr__(self, "scale", SCALES[self.guide])
        check_number("scale", self.scale, 0, math.inf, "0 (no guidance) or more; less would lead to disease")


def find_healthy(target: Covariate, asked: str | None) -> str:
    """The level of ``target`` that means healthy: the one asked for, or the one with such a name.

    Raises:
        LdmError: no such level; or none asked for, and not exactly one has a name of `HEALTHY_WORDS`.
    """
    if asked is not None:
        return target.levels[target.level_index(asked)]
    named = [level for level in target.levels if level.casefold() in HEALTHY_WORDS]
    if len(named) != 1:
        raise LdmError(
            f"healthy is not set, and the levels of '{target.name}' do not tell which it is: "
            f"{', '.join(target.levels)}. Set healthy=LEVEL."
        )
    return named[0]


class Detector:
    """A diffusion model, and what tells it healthy from diseased.

    Args:
        model: the diffusion model.
        target: the categorical covariate that says healthy or diseased.
        healthy: its level that means healthy.
        classifier: of the model's noisy latents; for ``guide=classifier``.
        precision: ``auto``, ``bf16`` or ``float32`` of the diffusion model.
        rebuilder: the first stage whose reconstructions are compared; None for that of the model.

    Raises:
        LdmError: the classifier is of other latents or another schedule.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        target: Covariate,
        healthy: str,
        classifier: Classifier | None = None,
        precision: str = "auto",
        rebuilder: FirstStage | None = None,
    ) -> None:
        if classifier is not None:
            classifier.expect_space_of(model)
        self.model, self.target, self.healthy = model, target, healthy
        self.classifier, self.precision, self.rebuilder = classifier, precision, rebuilder
        if rebuilder is not None:
            rebuilder.network.to(model.device)

    @property
    def rebuilds(self) -> bool:
        """Whether :meth:`reconstructions` differ from the images; in pixel space they do not."""
        return self.rebuilder is not None or self.model.header["first_stage"]["kind"] != PIXELS

    def check(self, options: DetectionOptions) -> None:
        """Refuse what the model cannot be asked, before any image is read.

        Raises:
            LdmError: no such channel; no classifier for ``classifier``; a model that does not know the class, for
                ``free``; a null that was never trained; a level outside the chain.
        """
        self.grid(options)
        check_choice("channels", options.channels, (*REDUCTIONS, *self.model.preprocessing.channels))
        conditioners = self.model.network.conditioners
        if options.guide == "classifier" and self.classifier is None:
            raise LdmError("guide=classifier needs a classifier: ldm train-classifier, or guide=free or none.")
        conditioned = COVARIATES in conditioners and self.target.name in self.model.schema.names
        if options.guide == "free" and not conditioned:
            raise LdmError(
                f"guide=free needs a model that is conditioned on '{self.target.name}'; this one is conditioned on "
                f"{self.model.condition_in_words()}. Train one with data.covariates.{self.target.name} and "
                "ldm.condition, or use guide=classifier."
            )
        rates = [self.model.header["condition"].get(name, 0) for name in ("drop_rate", "drop_all_rate")]
        if not self.model.header.get("learned_null", True) or (len(conditioners) and not any(rates)):
            raise LdmError(
                "This model never learned to go without its condition, which detection asks of it: train it with "
                "ldm.condition.drop_all_rate above 0, or without a condition (ldm.condition.mode=none)."
            )
        told_alone = len(self.model.schema.names) == 1 or self.model.header["condition"].get("drop_rate", 0) > 0
        if (options.guide == "free" or options.encode_as is not None) and not told_alone:
            raise LdmError(
                f"guide=free tells the model nothing but '{self.target.name}', and this one was never trained without "
                f"the rest of {', '.join(self.model.schema.names)}: train it with ldm.condition.drop_rate above 0, or "
                f"with no covariate beside '{self.target.name}'."
            )
        if options.encode_as is not None:
            self.target.level_index(options.encode_as)

    def grid(self, options: DetectionOptions) -> Grid:
        """The moves of the chain from level L down.

        Raises:
            LdmError: a level above the chain's first time or below its last.
        """
        grid = self.model.schedule.grid(options.steps, options.timestep_spacing)
        top = self.time_at(1.0)
        level = self.level(options)
        if not grid.t[-2] <= level <= top:
            raise LdmError(
                f"level is {level:g}; legal: {grid.t[-2]:g} (the last move of steps={options.steps}) to {top:g}, times "
                "of the model's schedule."
            )
        return grid.below(level)

    def level(self, options: DetectionOptions) -> float:
        """L, of the options or the middle of the training times: 500 of 1000."""
        if options.level is not None:
            return options.level
        return self.time_at(0.5)

    def time_at(self, share: float) -> float:
        """The time of the schedule that this share of the training times does not exceed."""
        return self.model.schedule.time_at(torch.tensor([share], dtype=torch.float64)).item()

    @torch.no_grad()
    def counterparts(
        self,
        images: np.ndarray,
        options: DetectionOptions,
        scales: Sequence[float | None] | None = None,
        indices: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[np.ndarray]:
        """Images as they would be if they were healthy, once for each scale; encoded once for all.

        Args:
            images: ``(B, C, *S)`` on the model's grid and in its range.
            options: see :class:`DetectionOptions`.
            scales: s, or `ROUND_TRIP`; None for that of the options.
            indices: number of each image in its run, which with ``seed`` fixes the noise of ``none``.

        Returns:
            ``(B, C, *S)`` for each scale.
        """
        scales = [options.scale] if scales is None else scales
        indices = range(len(images)) if indices is None else indices
        pixels = torch.as_tensor(np.asarray(images, np.float32)).to(self.model.device)
        with autocast(self.model.device, self.precision):
            x0, grid = self.latents(pixels), self.grid(options)
            if options.guide == "none":
                eps = noise.draw(noise.generators(seed, indices), x0.shape[1:]).to(x0)  # (B, c, *s)
                x = grid.alpha[0] * x0 + grid.sigma[0] * eps
            else:
                x = ddim_encode(self.denoise(options, ROUND_TRIP, len(x0)), x0, grid)
            found = []
            for scale in scales:
                denoise = self.denoise(options, scale, len(x0))
                if options.guide == "none":  # a stream of its own, so that no noise is drawn twice
                    back = ddpm(denoise, x, grid, noise.generators(seed + 1, indices))
                else:
                    back = ddim(denoise, x, grid)
                found.append(self.model.decode(back).float().cpu().numpy())  # (B, C, *S)
        return found

    @torch.no_grad()
    def reconstructions(self, images: np.ndarray) -> np.ndarray:
        """Images ``(B, C, *S)`` through the first stage alone."""
        pixels = torch.as_tensor(np.asarray(images, np.float32)).to(self.model.device)
        with autocast(self.model.device, self.precision):
            if self.rebuilder is None:
                rebuilt = self.model.decode(self.latents(pixels))
            else:
                rebuilt = self.rebuilder.network.decode(self.rebuilder.network.encode(pixels)[0])
            return rebuilt.float().cpu().numpy()

    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents ``(B, c, *s)`` of images ``(B, C, *S)``: the posteriors' means."""
        mean, _ = self.model.first_stage.encode(pixels)
        return self.model.latent_space.to_scaled(mean.float())

    def denoise(self, options: DetectionOptions, scale: float | None, count: int) -> Denoise:
        """What a chain of ``count`` images calls: guided with a scale, or, for `ROUND_TRIP`, as the way in is."""
        model = self.model
        null = self._condition(None, count)
        if options.guide == "free" and scale is not ROUND_TRIP:
            return guidance.classifier_free(model.denoise_many, self._condition(self.healthy, count), null, scale)
        told = null if options.encode_as is None else self._condition(options.encode_as, count)
        plain = guidance.guided(model.denoise_many, (told,), (1.0,))
        if options.guide == "classifier" and scale is not ROUND_TRIP:
            return guidance.classifier(plain, self.classifier.log_prob(self.healthy), scale)
        return plain

    def _condition(self, level: str | None, count: int) -> Any:
        row: Mapping[str, Any] = {} if level is None else {self.target.name: level}
        return self.model.encode_condition([row] * count)


def anomaly_map(
    images: np.ndarray, counterparts: np.ndarray, options: DetectionOptions, names: Sequence[str] = ()
) -> np.ndarray:
    """How images differ from their counterparts, smoothed as the options say: ``(B, C, *S)`` twice -> ``(B, *S)``.

    Each channel counts in units of the model's intensity range; ``names`` are theirs, for options that name one.
    """
    difference = np.asarray(images, np.float32) - counterparts  # (B, C, *S)
    if options.change == "both":
        difference = np.abs(difference)
    else:
        difference = np.maximum(difference if options.change == "brighter" else -difference, 0)
    if options.channels in REDUCTIONS:
        return smoothed(difference.sum(1) if options.channels == "sum" else difference.mean(1), options)
    return smoothed(difference[:, list(names).index(options.channels)], options)


def smoothed(maps: np.ndarray, options: DetectionOptions) -> np.ndarray:
    """Maps ``(B, *S)``, smoothed as the options say."""
    if not options.smoothing:
        return maps
    return gaussian_filter(maps, (0, *(options.smoothing,) * (maps.ndim - 1)))


def image_scores(maps: np.ndarray, options: DetectionOptions) -> np.ndarray:
    """One number an image, ``(B, *S)`` -> ``(B,)``; larger is less healthy."""
    flat = maps.reshape(len(maps), -1)
    if options.score == "p99":
        return np.percentile(flat, 99, axis=1)
    return flat.mean(1) if options.score == "mean" else flat.max(1)
