"""Loss weights against their definition in SNR, and at both ends of it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm.diffusion.prediction import PREDICTION_TYPES, target, to_prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.weighting import loss_weight
from ldm.errors import LdmError

DIVISOR = {
    "epsilon": lambda snr: snr,
    "sample": lambda snr: 1,
    "v_prediction": lambda snr: snr + 1,
    "flow": lambda snr: (snr.sqrt() + 1) ** 2,
    "edm": lambda snr: snr + 1,
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_the_definition_with_the_snr_of_diffusers(prediction_type):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(1000), t)
    weight = loss_weight("min_snr", prediction_type, NoiseSchedule().log_snr(t), gamma=5.0)
    torch.testing.assert_close(weight, snr.clamp(max=5) / DIVISOR[prediction_type](snr), rtol=3e-4, atol=0)


@pytest.mark.parametrize("path", ["variance preserving", "flow", "edm"])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_min_snr_weighs_the_error_of_x0_alike_for_every_type(alpha, path):
    """weight(type) * (error of the output)^2 = min(SNR, gamma) * (error of x0 it causes)^2"""
    sigma = math.sqrt(1 - alpha**2) if path == "variance preserving" else 1 - alpha
    alpha, sigma = (1.0, sigma / alpha) if path == "edm" else (alpha, sigma)
    log_snr = torch.tensor([2 * math.log(alpha / sigma)], dtype=torch.float64)
    x0, eps, error = torch.randn(3, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for prediction_type in PREDICTION_TYPES:
        if prediction_type == "v_prediction" and path != "variance preserving":
            continue  # never trained with it
        truth = target(prediction_type, x0, eps, alpha, sigma)
        read = to_prediction(prediction_type, truth + error, alpha * x0 + sigma * eps, alpha, sigma)
        weighted = loss_weight("min_snr", prediction_type, log_snr) * error**2
        torch.testing.assert_close(weighted, min((alpha / sigma) ** 2, 5.0) * (read.x0 - x0) ** 2)


@pytest.mark.parametrize(
    ("prediction_type", "at_zero_snr", "at_infinite_snr"),
    [("epsilon", 1.0, 0.0), ("sample", 0.0, 5.0), ("v_prediction", 0.0, 0.0), ("flow", 0.0, 0.0), ("edm", 0.0, 0.0)],
)
def test_min_snr_at_pure_noise_and_pure_data(prediction_type, at_zero_snr, at_infinite_snr):
    ends = torch.tensor([-math.inf, -1e4, 1e4, math.inf])
    weight = loss_weight("min_snr", prediction_type, ends)
    assert weight.tolist() == [at_zero_snr, at_zero_snr, at_infinite_snr, at_infinite_snr]


def test_uniform_and_what_is_refused():
    log_snr = torch.tensor([-3.0, 7.0])
    assert loss_weight("uniform", "epsilon", log_snr).tolist() == [1.0, 1.0]
    with pytest.raises(LdmError, match="Did you mean 'min_snr'"):
        loss_weight("minsnr", "epsilon", log_snr)
    with pytest.raises(LdmError, match="prediction_type"):
        loss_weight("uniform", "eps", log_snr)
    with pytest.raises(LdmError, match="gamma > 0"):
        loss_weight("min_snr", "epsilon", log_snr, gamma=0)
