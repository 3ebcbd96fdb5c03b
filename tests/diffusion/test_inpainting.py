"""Known data stay what they are under every sampler, and the rest is sampled as if nothing were known of it."""

import math

import pytest
import torch

from ldm.diffusion.inpainting import keep_known, slerp
from ldm.diffusion.noise import draw, generators
from ldm.diffusion.samplers import sampler
from tests.diffusion.test_samplers import CHAINS, MEAN, SCHEDULES, STD, ideal_denoise


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["scaled_linear", "zero_snr", "flow", "edm"])
def test_known_stays_and_unknown_is_sampled(name, chain):
    grid = SCHEDULES[name].grid(100)
    streams = generators(0, range(8))
    x = grid.start_std * draw(streams, (1, 20, 20))
    known = torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    known[..., :10] = True
    x0 = torch.linspace(-2, 2, 20).expand(8, 1, 20, 20)
    method, options = CHAINS[chain]
    found = sampler(method, **options)(keep_known(ideal_denoise(), x0, known), x, grid, streams)
    torch.testing.assert_close(found[..., :10], x0[..., :10], rtol=1e-3, atol=1e-3)
    rest = found[..., 10:]
    assert rest.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert rest.std().item() == pytest.approx(STD, abs=0.06)


def test_the_network_sees_the_known_region_at_its_noise_level():
    grid = SCHEDULES["flow"].grid(20)
    seen = []

    def denoise(x, step):
        seen.append((x[..., 0].std().item(), step.sigma))
        return ideal_denoise()(x, step)

    x0 = torch.zeros(4, 1, 40, 40)
    known = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    sampler("ddim")(keep_known(denoise, x0, known), draw(generators(0, range(4)), (1, 40, 40)), grid, ())
    for spread, sigma in seen:
        assert spread == pytest.approx(sigma, rel=0.15)


def test_the_sphere_keeps_the_length_of_noise():
    a, b = torch.randn(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).norm().item() == pytest.approx(math.sqrt(1000), rel=0.03)
    assert ((a + b) / 2).norm().item() < 0.8 * math.sqrt(1000)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
