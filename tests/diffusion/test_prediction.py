"""Every prediction type says the same of x0 and eps; each end where it cannot is refused."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.prediction import PREDICTION_TYPES, target, to_prediction
from ldm.errors import LdmError

# (alpha, sigma): variance preserving; flow-like; EDM-like
LEVELS = [(0.6, 0.8), (0.3, 0.7), (1.0, 12.0)]


def x0_and_eps(shape=(3, 2, 4, 5)) -> torch.Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", (0, 1)), ("sample", (1, 0)), ("v_prediction", (-0.8, 0.6))])
def test_target_is_the_formula_of_its_paper(kind, expected):
    x0, eps = x0_and_eps()
    torch.testing.assert_close(target(kind, x0, eps, 0.6, 0.8), expected[0] * x0 + expected[1] * eps)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("goal", PREDICTION_TYPES)
def test_conversion_between_all_pairs_of_types(source, goal, alpha, sigma):
    x0, eps = x0_and_eps()
    x_t = alpha * x0 + sigma * eps
    read = to_prediction(source, target(source, x0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close((read.x0, read.eps), (x0, eps), rtol=1e-12, atol=1e-12)
    converted = target(goal, read.x0, read.eps, alpha, sigma)
    torch.testing.assert_close(converted, target(goal, x0, eps, alpha, sigma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 1, 3, 4, 5), (3, 2, 3, 3)])
def test_levels_of_shape_b_act_on_their_own_sample(kind, shape):
    x0, eps = x0_and_eps(shape)
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    together = target(kind, x0, eps, alpha, sigma)
    output = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    read = to_prediction(kind, output, x0, alpha, sigma)
    for b in range(3):
        levels = (alpha[b].item(), sigma[b].item())
        torch.testing.assert_close(together[b], target(kind, x0[b : b + 1], eps[b : b + 1], *levels)[0])
        alone = to_prediction(kind, output[b : b + 1], x0[b : b + 1], *levels)
        torch.testing.assert_close((read.x0[b], read.eps[b]), (alone.x0[0], alone.eps[0]))


def test_what_the_network_predicts_passes_through_bit_for_bit():
    x_t, output = x0_and_eps().float()
    assert torch.equal(to_prediction("epsilon", output, x_t, 0.01, 0.99995).eps, output)
    assert torch.equal(to_prediction("sample", output, x_t, 0.01, 0.99995).x0, output)


def test_half_precision_output_is_read_in_float32():
    x_t, output = x0_and_eps()
    read = to_prediction("v_prediction", output.bfloat16(), x_t.float(), 0.6, 0.8)
    assert read.x0.dtype == read.eps.dtype == torch.float32
    expected = 0.6 * x_t.float() - 0.8 * output.bfloat16().float()
    torch.testing.assert_close(read.x0, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_levels_that_leave_the_answer_open_are_refused(as_tensor):
    x_t, output = x0_and_eps()
    zero, one = (torch.tensor([0.0, 0.5, 0.5]), torch.ones(3)) if as_tensor else (0.0, 1.0)
    with pytest.raises(LdmError, match="alpha = 0"):
        to_prediction("epsilon", output, x_t, zero, one)
    with pytest.raises(LdmError, match="sigma = 0"):
        to_prediction("sample", output, x_t, one, zero)
    read = to_prediction("v_prediction", output, x_t, 0.0, 1.0)  # at pure noise v = -x0
    torch.testing.assert_close((read.x0, read.eps), (-output, x_t))


def test_unknown_type_names_the_legal_ones():
    x_t, output = x0_and_eps()
    with pytest.raises(LdmError, match=r"epsilon, sample, v_prediction\. Did you mean 'v_prediction'"):
        to_prediction("velocity_prediction", output, x_t, 0.6, 0.8)
