"""Inpainting wraps ``denoise``: what is known of x0 is told to the sampler in place of what the network predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.grid import Step
from ldm.diffusion.prediction import Denoise, Prediction


def keep_known(denoise: Denoise, x0: Tensor, known: Tensor) -> Denoise:
    """A ``denoise`` under which every sampler ends at ``x0`` where it is known.

    There ``eps = (x_t - alpha x0) / sigma``, the noise that x_t holds, so that a step of any sampler is one of the
    chain that leads to x0, and the network sees the known region at the right noise level: imputation by replacement
    (Song et al. 2021b, appendix I.2; Lugmayr et al. 2022, eq. 8, without going back in time). Elsewhere nothing
    changes.

    Args:
        x0: known data, (B, C, *S); any finite values elsewhere.
        known: True where they are, (B, 1, *S) or (B, C, *S).
    """

    def kept(x: Tensor, step: Step) -> Prediction:
        prediction = denoise(x, step)
        eps = (x - step.alpha * x0) / step.sigma
        return Prediction(
            torch.where(known, x0, prediction.x0), torch.where(known, eps, prediction.eps), prediction.variance
        )

    return kept


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation of noise, (B, ...) each: ``a`` at t = 0, ``b`` at 1 (Shoemake 1985; as in DDIM, eq. 67).

    Keeps the length of Gaussian noise, which a straight line between two draws would shorten. Vectors that point the
    same way are interpolated linearly.
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b)  # (B,)
    angle = torch.arccos(cosine.clamp(-1, 1))
    straight = angle.sin() < 1e-6
    safe = torch.where(straight, torch.ones_like(angle), angle)
    weight_a = torch.where(straight, 1 - t, ((1 - t) * safe).sin() / safe.sin())  # (B,)
    weight_b = torch.where(straight, t, (t * safe).sin() / safe.sin())
    return (weight_a[:, None] * flat_a + weight_b[:, None] * flat_b).to(a.dtype).view_as(a)
