"""Guidance wraps ``denoise``: the predictions under several conditions become one.

A condition is whatever the caller's ``denoise_many`` understands; nothing here looks inside. All conditions
of a step go to it in one call, so that it can batch them in one forward pass of the network.

What is guided is eps, that is the score ``-eps / sigma``; x0 follows, so that a prediction stays one of its ``x_t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.checks import check_number, check_pair, is_number
from ldm.diffusion.grid import Step
from ldm.diffusion.prediction import Denoise, Prediction, target, to_prediction
from ldm.errors import LdmError

#: ``denoise_many(x, step, conditions)`` with x (B, C, *S) -> one Prediction a condition, in their order
DenoiseMany = Callable[[Tensor, Step, Sequence[Any]], Sequence[Prediction]]

#: ``log_prob(x, step)`` with x (B, C, *S) -> log p(y | x_t) of each sample's wanted y, (B,)
LogProb = Callable[[Tensor, Step], Tensor]


def classifier_free(
    denoise_many: DenoiseMany, condition: Any, null: Any, scale: float, rescale: float = 0.0
) -> Denoise:
    """Classifier-free guidance: ``eps = eps_null + scale (eps_condition - eps_null)``.

    Ho & Salimans 2022, eq. 6, with scale = 1 + w: 0 ignores the condition, 1 is the conditional model itself
    (the null is then not evaluated), more exaggerates the condition.
    """
    return guided(denoise_many, (condition, null), (scale, 1 - scale), rescale)


def part_by_part(
    denoise_many: DenoiseMany, condition: Any, nulls: Sequence[Any], scales: Sequence[float], rescale: float = 0.0
) -> Denoise:
    """Classifier-free guidance with a scale for each part of a condition, such as one covariate of several.

    ``eps = eps(c) + sum_k (s_k - 1) (eps(c) - eps(c without k))``: the score of ``p(x | c) prod_k p(c_k | x, other
    c)^(s_k - 1)``. With all scales 1 it is the conditional model; with one part it is `classifier_free`. A part of
    scale 1 is not evaluated.

    Args:
        condition: c, all parts.
        nulls: c without part k, for each k.
        scales: s_k.
        rescale: see `guided`.
    """
    extra = [scale - 1 for scale in scales]
    return guided(denoise_many, (condition, *nulls), (1 + sum(extra), *(-one for one in extra)), rescale)


def guided(
    denoise_many: DenoiseMany, conditions: Sequence[Any], weights: Sequence[float], rescale: float = 0.0
) -> Denoise:
    """A ``denoise`` whose eps is the weighted sum of the eps under each condition.

    Weights sum to one. Scales s_k of several conditions (Liu et al. 2022, conjunction) are the weights s_k
    and, for the null, 1 - sum s_k. A condition of weight 0 is not evaluated.

    Args:
        rescale: phi of `with_spread_of`, towards the spread of the first condition; 0 is off.

    Raises:
        LdmError: weights that do not sum to one, or not one for each condition; rescale outside [0, 1].
    """
    if len(weights) != len(conditions) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise LdmError(
            f"Guidance needs one weight a condition, summing to 1; got {list(weights)} for {len(conditions)}."
        )
    check_rescale(rescale)
    kept = [k for k, weight in enumerate(weights) if weight != 0 or (k == 0 and rescale > 0)]
    kept_conditions, kept_weights = [conditions[k] for k in kept], [weights[k] for k in kept]

    def denoise(x: Tensor, step: Step) -> Prediction:
        predictions = denoise_many(x, step, kept_conditions)
        prediction = combine(predictions, kept_weights)
        if rescale > 0 and len(predictions) > 1:
            return with_spread_of(predictions[0], prediction, x, step, rescale)
        return prediction

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


def within(interval: Sequence[float], inside: Denoise, outside: Denoise) -> Denoise:
    """Guide at some noise levels only (Kynkäänniemi et al. 2024): ``inside`` the interval, else ``outside``.

    Args:
        interval: ``(low, high)`` of ``sigma / alpha``, EDM's noise level: guided where low < sigma / alpha <= high.
        inside: the guided denoise.
        outside: the conditional one.

    Raises:
        LdmError: not two numbers, 0 <= low < high.
    """
    check_interval(interval)
    low, high = interval

    def denoise(x: Tensor, step: Step) -> Prediction:
        is_inside = low * step.alpha < step.sigma <= high * step.alpha or (step.alpha == 0 and math.isinf(high))
        return (inside if is_inside else outside)(x, step)

    return denoise


def with_spread_of(plain: Prediction, prediction: Prediction, x: Tensor, step: Step, phi: float) -> Prediction:
    """``prediction`` with its v rescaled to the spread of that of ``plain`` (Lin et al. 2024, eq. 15 and 16).

    ``v_rescaled = v std(v_plain) / std(v)``, then ``phi v_rescaled + (1 - phi) v``; each sample's own standard
    deviation over channels and space. The paper's networks predict v; others are read as v, so that phi (0.7 in the
    paper) means the same for all.
    """
    v, v_plain = (target("v_prediction", p.x0, p.eps, step.alpha, step.sigma) for p in (prediction, plain))
    axes = tuple(range(1, x.ndim))
    ratio = v_plain.std(axes, keepdim=True) / v.std(axes, keepdim=True)  # (B, 1, ..., 1)
    read = to_prediction("v_prediction", (phi * ratio + 1 - phi) * v, x, step.alpha, step.sigma)
    return Prediction(read.x0, read.eps, prediction.variance)


def classifier(denoise: Denoise, log_prob: LogProb, scale: float) -> Denoise:
    """Guidance by a classifier's gradient: ``eps_hat = eps - scale sigma grad_x log p(y | x_t, t)``.

    Dhariwal & Nichol 2021, algorithm 2 (section 4.2), with sigma for sqrt(1 - abar): the score of ``p(x) p(y |
    x)^scale`` on any path. The gradient is that of the sum over the batch, so that each sample gets its own and none
    depends on the batch's size. At alpha = 0 there is nothing of the data in x and nothing is guided; at scale 0 the
    classifier is not evaluated.

    Args:
        denoise: what is guided.
        log_prob: of each sample's wanted class (or the log density of a wanted value), (B,).
        scale: s.

    Raises:
        LdmError: ``log_prob`` does not return one number a sample.
    """

    def guided_denoise(x: Tensor, step: Step) -> Prediction:
        prediction = denoise(x, step)
        if step.alpha == 0 or scale == 0:
            return prediction
        shift = scale * step.sigma * _gradient(log_prob, x, step)  # (B, C, *S)
        x0 = prediction.x0 + step.sigma / step.alpha * shift
        return Prediction(x0, prediction.eps - shift, prediction.variance)

    return guided_denoise


def _gradient(log_prob: LogProb, x: Tensor, step: Step) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = log_prob(leaf, step)  # (B,)
        if values.shape != x.shape[:1]:
            raise LdmError(f"log_prob must give one number a sample, ({len(x)},), got {tuple(values.shape)}.")
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


def check_interval(interval: Sequence[float]) -> None:
    """Raise LdmError unless ``interval`` is two numbers, 0 <= low < high."""
    check_pair("guidance_interval", interval, 0, "two sigma / alpha with 0 <= low < high, or null")


def check_scale(scale: float | Mapping[str, float]) -> None:
    """Raise LdmError unless ``scale`` is a number, or a mapping of names to numbers."""
    for one in scale.values() if isinstance(scale, Mapping) else [scale]:
        if not is_number(one) or math.isinf(one):
            raise LdmError(f"guidance_scale is {scale!r}; legal: a number (1: no guidance), or {{name: number}}.")


def check_rescale(phi: float) -> None:
    """Raise LdmError unless ``phi`` is in [0, 1]."""
    check_number("guidance_rescale", phi, 0, 1, "0 (off) to 1")
