"""Every prediction type says the same of x0 and eps; each end where it cannot is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.prediction import PREDICTION_TYPES, target, to_prediction
from ldm.errors import LdmError

# (alpha, sigma): variance preserving; flow-like; EDM-like
LEVELS = [(0.6, 0.8), (0.3, 0.7), (1.0, 12.0)]


def x0_and_eps(shape=(3, 2, 4, 5)) -> torch.Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("epsilon", (0, 1)),
        ("sample", (1, 0)),
        ("v_prediction", (-0.8, 0.6)),
        ("flow", (-1, 1)),
        ("edm", (0.8, -0.6)),
    ],
)
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


@pytest.mark.parametrize("sigma", [0.01, 0.7, 80.0])
def test_edm_is_the_preconditioning_of_its_paper(sigma):
    """Karras et al. 2022, eq. 7 with table 1: D(x) = c_skip x + c_out F, sigma_data = 1."""
    x0, eps = x0_and_eps()
    x, output = x0 + sigma * eps, 0.3 * eps.flip(0)
    c_skip, c_out = 1 / (sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
    torch.testing.assert_close(to_prediction("edm", output, x, 1.0, sigma).x0, c_skip * x + c_out * output)
    torch.testing.assert_close(target("edm", x0, eps, 1.0, sigma), (x0 - c_skip * x) / c_out, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(
    alpha=st.floats(0.01, 1),
    sigma=st.floats(0.01, 100),
    scale=st.floats(0.1, 10),
    kind=st.sampled_from(PREDICTION_TYPES),
)
def test_reading_an_output_inverts_the_target_at_any_level(alpha, sigma, scale, kind):
    x0, eps = x0_and_eps((1, 1, 2, 2))
    x_t = alpha * x0 + sigma * eps
    output = target(kind, x0, eps, alpha, sigma)
    read = to_prediction(kind, output, x_t, alpha, sigma)
    torch.testing.assert_close((read.x0, read.eps), (x0, eps), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(alpha * read.x0 + sigma * read.eps, x_t, rtol=1e-9, atol=1e-9)
    if kind == "edm":  # F does not see the unit of x_t
        torch.testing.assert_close(target(kind, x0, eps, scale * alpha, scale * sigma), output, rtol=1e-9, atol=1e-9)


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
    for kind, x0 in (("v_prediction", -output), ("flow", x_t - output), ("edm", output)):  # at pure noise v = -x0
        read = to_prediction(kind, output, x_t, 0.0, 1.0)
        torch.testing.assert_close((read.x0, read.eps), (x0, x_t))


def test_unknown_type_names_the_legal_ones():
    x_t, output = x0_and_eps()
    with pytest.raises(LdmError, match=r"epsilon, sample, v_prediction, flow, edm\. Did you mean 'v_prediction'"):
        to_prediction("velocity_prediction", output, x_t, 0.6, 0.8)
