"""Guidance acts on eps, keeps x0 consistent, and evaluates only what counts."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.grid import Step
from ldm.diffusion.guidance import classifier, classifier_free, guided, part_by_part, within
from ldm.diffusion.prediction import Prediction, target, to_prediction
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedule import NoiseSchedule
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


def test_each_part_has_a_scale_and_one_part_alone_is_classifier_free_guidance():
    x, network = noise(), Network()
    whole, without_a, without_b = 2.0, 0.5, -3.0
    prediction = part_by_part(network, whole, (without_a, without_b), (3.0, 1.5))(x, STEP)
    expected = whole + 2.0 * (whole - without_a) + 0.5 * (whole - without_b)
    torch.testing.assert_close(prediction.eps, torch.full_like(x, expected))
    part_by_part(network, whole, (without_a, without_b), (1.0, 2.0))(x, STEP)
    part_by_part(network, whole, (without_a, without_b), (1.0, 1.0))(x, STEP)
    assert network.calls == [[whole, without_a, without_b], [whole, without_b], [whole]]
    one = part_by_part(network, whole, (-1.0,), (3.0,))(x, STEP)
    torch.testing.assert_close(one.eps, classifier_free(network, whole, -1.0, 3.0)(x, STEP).eps)


def test_outside_the_interval_only_the_condition_is_evaluated():
    network = Network()
    denoise = within((0.5, 2.0), classifier_free(network, 2.0, -1.0, 3.0), guided(network, (2.0,), (1.0,)))
    levels = [(1.0, 0.5), (1.0, 0.51), (0.5, 1.0), (0.5, 1.01)]  # sigma / alpha: 0.5, 0.51, 2, 2.02
    for alpha, sigma in levels:
        denoise(noise(), Step(0, 0, alpha, sigma, alpha, sigma))
    assert network.calls == [[2.0], [2.0, -1.0], [2.0, -1.0], [2.0]]
    pure = Network("sample")
    step = Step(0, 0, 0.0, 1.0, 0.5, 0.5)
    for high in (2.0, float("inf")):
        inside, outside = classifier_free(pure, 2.0, -1.0, 3.0), guided(pure, (2.0,), (1.0,))
        within((0.5, high), inside, outside)(noise(), step)
    assert pure.calls == [[2.0], [2.0, -1.0]]
    for interval in [(1.0, 1.0), (-1.0, 2.0), (1.0,)]:
        with pytest.raises(LdmError, match="0 <= low < high"):
            within(interval, denoise, denoise)


@pytest.mark.parametrize("scale", [4.0, 0.0])
def test_rescaling_gives_v_the_spread_of_the_conditional_prediction(scale):
    """Lin et al. 2024, eq. 15 and 16, written for the v that the network puts out."""
    x = noise()
    outputs = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(7))

    def network(x, step, conditions):
        return [to_prediction("v_prediction", outputs[k], x, step.alpha, step.sigma) for k in conditions]

    prediction = classifier_free(network, 0, 1, scale, rescale=0.7)(x, STEP)
    guided_v = outputs[1] + scale * (outputs[0] - outputs[1])
    for b in range(len(x)):
        factor = 0.7 * outputs[0][b].std() / guided_v[b].std() + 0.3
        v = target("v_prediction", prediction.x0, prediction.eps, STEP.alpha, STEP.sigma)[b]
        torch.testing.assert_close(v, factor * guided_v[b], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(STEP.alpha * prediction.x0 + STEP.sigma * prediction.eps, x)
    with pytest.raises(LdmError, match="guidance_rescale is 1.5"):
        classifier_free(network, 0, 1, 3.0, rescale=1.5)


def gaussian(mean, variance):
    def denoise(x, step):
        x0 = mean + step.alpha * variance / (step.alpha**2 * variance + step.sigma**2) * (x - step.alpha * mean)
        return Prediction(x0, (x - step.alpha * x0) / step.sigma)

    return denoise


@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.3, 0.7), (1.0, 5.0)])
def test_a_classifiers_gradient_turns_the_prior_into_the_posterior(alpha, sigma):
    """Data N(0.3, 0.25), observed as y = x0 + N(0, 0.04): the guided prediction is the ideal one given y."""
    mean, variance, noise_variance, y = 0.3, 0.25, 0.04, 1.1
    step = Step(1, 0, alpha, sigma, 1.0, 0.0)
    prior = gaussian(mean, variance)

    def log_prob(x, step):
        left = variance * step.sigma**2 / (step.alpha**2 * variance + step.sigma**2)  # of x0 given x_t
        error = (y - prior(x, step).x0).square() / (2 * (left + noise_variance))
        return -error.flatten(1).sum(1)  # (B,)

    posterior_variance = 1 / (1 / variance + 1 / noise_variance)
    posterior = gaussian(posterior_variance * (mean / variance + y / noise_variance), posterior_variance)
    with torch.no_grad():
        guided_one, ideal = classifier(prior, log_prob, 1.0)(noise(), step), posterior(noise(), step)
        alone = classifier(prior, log_prob, 1.0)(noise()[1:], step)
    torch.testing.assert_close(guided_one.x0, ideal.x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided_one.eps, ideal.eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided_one.eps[1:], alone.eps)  # a sum over the batch, not a mean
    with pytest.raises(LdmError, match="one number a sample"):
        classifier(prior, lambda x, step: log_prob(x, step).sum(), 1.0)(noise(), step)


def test_nothing_is_guided_at_pure_noise_or_at_scale_0():
    step = Step(t=1.0, t_prev=0.5, alpha=0.0, sigma=1.0, alpha_prev=0.5, sigma_prev=0.5)
    plain = gaussian(0.3, 0.25)
    for scale, at in ((5.0, step), (0.0, STEP)):
        prediction = classifier(plain, lambda x, step: 1 / 0, scale)(noise(), at)
        torch.testing.assert_close(prediction.x0, plain(noise(), at).x0)
