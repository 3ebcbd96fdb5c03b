"""Guidance wraps ``denoise``: the predictions under several conditions become one.

A condition is whatever the caller's ``denoise_many`` understands; nothing here looks inside. All conditions
of a step go to it in one call, so that it can batch them in one forward pass of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ldm.diffusion.prediction import Denoise, Prediction
from ldm.diffusion.schedule import Step
from ldm.errors import LdmError

#: ``denoise_many(x, step, conditions)`` with x (B, C, *S) -> one Prediction a condition, in their order
DenoiseMany = Callable[[Tensor, Step, Sequence[Any]], Sequence[Prediction]]


def classifier_free(denoise_many: DenoiseMany, condition: Any, null: Any, scale: float) -> Denoise:
    """Classifier-free guidance: ``eps = eps_null + scale (eps_condition - eps_null)``.

    Ho & Salimans 2022, eq. 6, with scale = 1 + w: 0 ignores the condition, 1 is the conditional model itself
    (the null is then not evaluated), more exaggerates the condition.
    """
    return guided(denoise_many, (condition, null), (scale, 1 - scale))


def guided(denoise_many: DenoiseMany, conditions: Sequence[Any], weights: Sequence[float]) -> Denoise:
    """A ``denoise`` whose eps is the weighted sum of the eps under each condition.

    Weights sum to one. Scales s_k of several conditions (Liu et al. 2022, conjunction) are the weights s_k
    and, for the null, 1 - sum s_k. A condition of weight 0 is not evaluated.

    Raises:
        LdmError: weights that do not sum to one, or not one for each condition.
    """
    if len(weights) != len(conditions) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise LdmError(
            f"Guidance needs one weight a condition, summing to 1; got {list(weights)} for {len(conditions)}."
        )
    terms = [(condition, weight) for condition, weight in zip(conditions, weights, strict=True) if weight != 0]
    kept_conditions = [condition for condition, _ in terms]
    kept_weights = [weight for _, weight in terms]

    def denoise(x: Tensor, step: Step) -> Prediction:
        return combine(denoise_many(x, step, kept_conditions), kept_weights)

    return denoise


def combine(predictions: Sequence[Prediction], weights: Sequence[float]) -> Prediction:
    """Weighted sum of predictions for one ``x_t``; the weights sum to one.

    Each prediction satisfies ``x_t = alpha x0 + sigma eps``, so the sum of the x0 is exactly the x0 that
    belongs to the sum of the eps, without a division by alpha. A learned variance is taken from the first
    prediction.
    """
    if len(predictions) == 1:
        return predictions[0]
    pairs = list(zip(weights, predictions, strict=True))
    return Prediction(
        x0=sum(weight * prediction.x0 for weight, prediction in pairs),
        eps=sum(weight * prediction.eps for weight, prediction in pairs),
        variance=predictions[0].variance,
    )
