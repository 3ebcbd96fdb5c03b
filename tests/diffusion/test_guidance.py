"""Classifier-free guidance acts on eps, keeps x0 consistent, and evaluates only the conditions that count."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.guidance import classifier_free, guided
from ldm.diffusion.prediction import to_prediction
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule, Step
from ldm.errors import LdmError

STEP = Step(t=500, t_prev=400, alpha=0.6, sigma=0.8, alpha_prev=0.8, sigma_prev=0.6)


class Network:
    """Predicts eps as its condition, a number; counts calls and remembers the conditions of each."""

    def __init__(self, prediction_type: str = "epsilon"):
        self.prediction_type, self.calls = prediction_type, []

    def __call__(self, x, step, conditions):
        self.calls.append(list(conditions))
        outputs = [torch.full_like(x, condition) for condition in conditions]
        return [to_prediction(self.prediction_type, out, x, step.alpha, step.sigma) for out in outputs]


def noise() -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_eps_follows_the_formula_and_x0_stays_consistent(scale):
    x, network = noise(), Network()
    prediction = classifier_free(network, condition=2.0, null=-1.0, scale=scale)(x, STEP)
    torch.testing.assert_close(prediction.eps, torch.full_like(x, -1.0 + scale * 3.0))
    torch.testing.assert_close(STEP.alpha * prediction.x0 + STEP.sigma * prediction.eps, x)
    assert network.calls == [{0.0: [-1.0], 1.0: [2.0]}.get(scale, [2.0, -1.0])]  # one call, of what counts


def test_several_conditions_each_with_its_scale():
    x = noise()
    null, first, second = 0.5, 2.0, -3.0
    denoise = guided(Network(), (first, second, null), (2.0, 0.5, 1 - 2.5))
    expected = null + 2.0 * (first - null) + 0.5 * (second - null)
    torch.testing.assert_close(denoise(x, STEP).eps, torch.full_like(x, expected))


def test_guidance_at_pure_noise_needs_no_division_by_alpha():
    step = Step(t=1.0, t_prev=0.5, alpha=0.0, sigma=1.0, alpha_prev=0.5, sigma_prev=0.5)
    prediction = classifier_free(Network("sample"), 2.0, -1.0, 3.0)(noise(), step)
    torch.testing.assert_close(prediction.x0, torch.full_like(prediction.x0, 8.0))
    torch.testing.assert_close(prediction.eps, noise())


def test_a_guided_denoise_is_a_denoise():
    grid, network = NoiseSchedule().grid(5), Network()
    x = ddim(classifier_free(network, 0.2, 0.1, 2.0), noise(), grid)
    plain = ddim(lambda x, step: network(x, step, [0.3])[0], noise(), grid)
    torch.testing.assert_close(x, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0,), (float("nan"), 1.0)])
def test_weights_that_do_not_sum_to_one_are_refused(weights):
    with pytest.raises(LdmError, match="summing to 1"):
        guided(Network(), (1.0, 2.0), weights)
