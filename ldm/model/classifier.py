"""A classifier of a diffusion model's noisy latents, whose gradient guides the model's chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.data.schema import Covariate, CovariateSchema
from ldm.diffusion.grid import Step
from ldm.diffusion.guidance import LogProb
from ldm.diffusion.process import schedule_from_dict
from ldm.diffusion.schedule import Schedule
from ldm.errors import LdmError
from ldm.model.build import construct
from ldm.model.file import tensors_hash
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.trained import TrainedNetwork
from ldm.networks.classifier import NoisyClassifier
from ldm.precision import autocast

KIND = "classifier"


def build_classifier(config: Mapping[str, Any]) -> NoisyClassifier:
    """The network that ``config`` describes; see :class:`ldm.networks.classifier.NoisyClassifier`.

    Raises:
        LdmError: an argument that does not exist, or an illegal one.
    """
    return construct(NoisyClassifier, config, "classifier.network")


def noisy_space(model: LatentDiffusionModel) -> dict[str, Any]:
    """What a noisy latent of ``model`` is: a classifier that was trained on others would be asked of what it never saw.

    Two diffusion models on one first stage, with the same statistics, schedule and preprocessing, have one space.
    """
    return {
        "latent_shape": list(model.latent_shape),
        "latent_space_sha256": tensors_hash(model.latent_space.state_dict()),
        "first_stage_sha256": model.header["first_stage_sha256"],
        "schedule": model.schedule.to_dict(),
        "preprocessing_sha256": model.preprocessing.fingerprint(),
    }


@dataclass
class Classifier(TrainedNetwork):
    """A trained classifier of noisy latents.

    Attributes:
        network: scaled input ``(B, C, *S)``, network time ``(B,)`` -> logits ``(B, L)``.
        config: see :func:`build_classifier`.
        target: the categorical covariate whose levels are the classes.
        space: see :func:`noisy_space`.
        metrics: held-out accuracy per bin of training times.
        facts: cohort, split hash, hash of the diffusion model it was trained beside.
    """

    kind = KIND
    build = staticmethod(build_classifier)

    network: NoisyClassifier
    config: Mapping[str, Any]
    target: Covariate
    space: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.schedule: Schedule = schedule_from_dict(self.space["schedule"])

    def description(self) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {"target": CovariateSchema([self.target]).to_dict(), "space": dict(self.space)}

    @classmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        (target,) = CovariateSchema.from_dict(header["target"])
        return {"target": target, "space": header["space"]}

    def expect_space_of(self, model: LatentDiffusionModel) -> None:
        """Refuse a diffusion model of other latents or another schedule.

        Raises:
            LdmError: naming what differs.
        """
        theirs = noisy_space(model)
        differing = [name for name in theirs if theirs[name] != self.space.get(name)]
        if differing:
            raise LdmError(
                f"The classifier was trained on the noisy latents of another diffusion model ({', '.join(differing)} "
                "differ). Train one for this model: ldm train-classifier model=PATH."
            )

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits ``(B, L)`` of noisy scaled latents ``(B, C, *S)`` at times ``(B,)`` of the schedule."""
        return evaluate(self.network, self.schedule, x_t, t)

    def log_prob(self, level: str) -> LogProb:
        """``log p(level | x_t, t)`` as :func:`ldm.diffusion.guidance.classifier` takes it.

        Raises:
            LdmError: no such level.
        """
        index = self.target.level_index(level)

        def log_prob(x: Tensor, step: Step) -> Tensor:
            t = torch.full((len(x),), step.t, device=x.device)
            with autocast(x.device, "float32"):  # a gradient in 8 bits would be mostly rounding
                return self.logits(x, t).log_softmax(1)[:, index]  # (B,)

        return log_prob


def evaluate(network: torch.nn.Module, schedule: Schedule, x_t: Tensor, t: Tensor) -> Tensor:
    """Logits of ``x_t``, in training as in guidance: scaled input, the network's own time, as the denoiser's.

    Args:
        network: the classifier's, or the one that is being trained.
        schedule: of the diffusion model.
        x_t: ``(B, C, *S)``.
        t: ``(B,)`` times of the schedule.
    """
    scale = schedule.input_scale(t).view(-1, *[1] * (x_t.ndim - 1))  # (B, 1, ..., 1)
    return network(scale * x_t, schedule.network_time(t))
