"""Grid traces: planted ones are found with the right size, images without a grid have none."""

import pytest
import torch
from torch.nn import functional as F

from ldm.metrics.grid import blockiness, pattern_share


@pytest.mark.parametrize("size", [(40, 48), (24, 28, 26)])
def test_a_planted_checkerboard_is_found_and_noise_is_not(size):
    torch.manual_seed(0)
    noise = torch.randn(1, *size)
    board = sum(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")) % 2 * 2.0 - 1
    assert pattern_share(noise + 5, 4) < 3 * 4 ** len(size) / noise.numel()  # the offset is no pattern
    assert pattern_share(noise + board, 4) == pytest.approx(0.5, abs=0.03)  # equal energies
    assert pattern_share(board[None], 2) == pytest.approx(1.0)
    assert pattern_share(torch.zeros(1, *size), 4) == 0


@pytest.mark.parametrize("size", [(40, 48), (24, 28, 26)])
def test_blocks_are_found_and_smooth_images_have_none(size):
    torch.manual_seed(0)
    coarse = torch.randn(1, 1, *(side // 2 for side in size))
    blocks = F.interpolate(coarse, scale_factor=2, mode="nearest")[0]
    kernel = torch.ones(1, 1, *(3,) * len(size)) / 3 ** len(size)
    smooth = (F.conv2d if len(size) == 2 else F.conv3d)(torch.randn(1, 1, *size), kernel, padding=1)[0]
    assert blockiness(smooth) == pytest.approx(1.0, abs=0.2)
    assert blockiness(smooth + 0.2 * blocks) > 1.4
    assert blockiness(torch.zeros(1, *size)) == 1
