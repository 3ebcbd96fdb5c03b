"""Weight gradients of narrow 3-D convolutions in bfloat16 on the CPU, which torch alone gets wrong."""

import copy

import pytest
import torch
from torch import nn

from ldm.training.narrow import guard_narrow_convolutions


def weight_gradient(convolution, x, weights, precision):
    convolution.weight.grad = None
    torch.full((convolution.weight.numel(),), torch.nan)  # leaves something behind for who reads what is not his
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = convolution(x)
    (y.float() * weights).sum().backward()
    return convolution.weight.grad


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 8, 8), (4, 6, 6)])
def test_gradients_in_bfloat16_are_those_in_float32(size, kernel):
    for seed in range(4):
        torch.manual_seed(seed)
        convolution = nn.Conv3d(32, 32, kernel, padding=kernel // 2)
        guard_narrow_convolutions(convolution)
        x, weights = torch.randn(4, 32, *size), torch.randn(4, 32, *size)
        found, expected = (weight_gradient(convolution, x, weights, name).clone() for name in ("bf16", "float32"))
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_guarded_network_can_be_copied():
    network = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1))
    guard_narrow_convolutions(network)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.zero_()
        x = torch.ones(1, 1, 2, 4, 4)
        assert twin(x).abs().max() == 0
        assert network(x).abs().max() > 0


def test_training_is_guarded(ldm, tiny):
    narrow = (*tiny, "data.shape=[16,32,32]", "trainer.precision=bf16-mixed")  # 16 voxels, 4 in the latent, 2 below
    assert ldm("train-vae", *narrow, "trainer.max_steps=1")[0] == 0
    code, text = ldm("train-ldm", *narrow, "ldm.network.channels=[32,64]", "trainer.max_steps=4")
    assert code == 0, text
