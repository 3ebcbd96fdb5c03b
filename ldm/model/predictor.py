"""A predictor of covariates from clean images: an instrument, and a feature network for distances of distributions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema, Value
from ldm.errors import LdmError
from ldm.model.build import construct
from ldm.model.trained import TrainedNetwork
from ldm.networks.predictor import PooledResNet
from ldm.precision import autocast

KIND = "predictor"


def build_predictor(config: Mapping[str, Any]) -> PooledResNet:
    """The network that ``config`` describes; see :class:`ldm.networks.predictor.PooledResNet`.

    Raises:
        LdmError: an argument that does not exist, or an illegal one.
    """
    return construct(PooledResNet, config, "predictor.network")


@dataclass(frozen=True)
class Targets:
    """The covariates that are predicted, and what the network's outputs ``(B, O)`` mean.

    A categorical covariate takes one output a level, the logits; a continuous one takes one output, the value in
    standard deviations from the mean of the training split.

    Attributes:
        schema: the covariates, in the order of the outputs.
        moments: mean and standard deviation of each continuous covariate, in its unit.
    """

    schema: CovariateSchema
    moments: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(
        cls, schema: CovariateSchema, rows: Iterable[Mapping[str, Value]], names: Sequence[str] | None = None
    ) -> Targets:
        """Targets ``names`` (None: all) of a cohort's ``schema``, their moments taken from the training ``rows``.

        Raises:
            LdmError: no covariate at all, one that does not exist, or one without a value in ``rows``.
        """
        chosen = CovariateSchema(schema[name] for name in (schema.names if names is None else names))
        if not len(chosen):
            raise LdmError(
                "A predictor needs covariates to predict: set data.covariates, and name them or null in "
                f"predictor.targets. Known: {', '.join(schema.names) or 'none'}."
            )
        table, moments = list(rows), {}
        for covariate in chosen:
            given = [row[covariate.name] for row in table if row.get(covariate.name) is not None]
            if not given:
                raise LdmError(f"predictor.targets: no training record has a value of '{covariate.name}'.")
            if covariate.kind == "continuous":
                values = np.array([covariate.number(value) for value in given])
                moments[covariate.name] = (float(values.mean()), float(values.std()) or 1.0)
        return cls(chosen, moments)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of outputs of each covariate."""
        return {c.name: len(c.levels) if c.kind == "categorical" else 1 for c in self.schema}

    def split(self, outputs: Tensor) -> dict[str, Tensor]:
        """Outputs ``(B, O)`` by covariate: logits ``(B, L)``, or standardised values ``(B,)``."""
        parts = outputs.split(list(self.sizes.values()), dim=1)
        return {c.name: x if c.kind == "categorical" else x[:, 0] for c, x in zip(self.schema, parts, strict=True)}

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        """Outputs ``(B, O)`` as probabilities ``(B, L)``, or values ``(B,)`` in the covariate's unit."""
        return {
            name: x.softmax(1) if x.ndim == 2 else x * self.moments[name][1] + self.moments[name][0]
            for name, x in self.split(outputs).items()
        }

    def truth(self, codes: Tensor) -> dict[str, Tensor]:
        """What should come out, from encoded covariates ``(B, T)`` of :attr:`schema`; NaN where missing.

        Level indices ``(B,)``, or standardised values ``(B,)``.
        """
        result = {}
        for covariate, code in zip(self.schema, codes.unbind(1), strict=True):  # (B,)
            if covariate.kind == "continuous":
                (low, high), (mean, std) = covariate.range, self.moments[covariate.name]
                code = (low + code * (high - low) - mean) / std
            result[covariate.name] = code
        return result


@dataclass
class Predictor(TrainedNetwork):
    """A trained network that predicts covariates, and what it was trained on.

    Attributes:
        network: images ``(B, C, *S)`` -> outputs ``(B, O)``.
        config: see :func:`build_predictor`.
        targets: what the outputs mean.
        preprocessing: how scans become its input.
        metrics: held-out accuracy, or correlation and mean absolute error.
        facts: cohort, split hash.
    """

    kind = KIND
    build = staticmethod(build_predictor)

    network: PooledResNet
    config: Mapping[str, Any]
    targets: Targets
    preprocessing: Preprocessing
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def description(self) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        return {
            "targets": self.targets.schema.to_dict(),
            "moments": {name: list(pair) for name, pair in self.targets.moments.items()},
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def further_fields(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`TrainedNetwork`."""
        moments = {name: (float(mean), float(std)) for name, (mean, std) in header["moments"].items()}
        return {
            "targets": Targets(CovariateSchema.from_dict(header["targets"]), moments),
            "preprocessing": Preprocessing.from_dict(header["preprocessing"]),
        }

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Covariates of preprocessed images ``(B, C, *S)``, on the network's device.

        Returns:
            Probabilities of the levels ``(B, L)``, or values ``(B,)`` in the covariate's unit, float32.

        Raises:
            LdmError: images of another number of axes or channels.
        """
        x = self._images(images)
        with autocast(x.device, "float32"):  # a measurement should not depend on the machine's precision
            return self.targets.predict(self.network(x))

    @torch.no_grad()
    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """Pooled activations before the head, ``(B, F)`` float32, of preprocessed images ``(B, C, *S)``.

        Raises:
            LdmError: images of another number of axes or channels.
        """
        x = self._images(images)
        with autocast(x.device, "float32"):
            return self.network.features(x)

    def _images(self, images: Tensor | np.ndarray) -> Tensor:
        x = torch.as_tensor(images, dtype=torch.float32, device=self.network.head.weight.device)
        axes, channels = self.config["spatial_dims"], self.config["in_channels"]
        if x.ndim != axes + 2 or x.shape[1] != channels:
            raise LdmError(
                f"The predictor takes batches of {axes}-D images with {channels} channels, (B, {channels}, *S), not "
                f"{tuple(x.shape)}."
            )
        return x
