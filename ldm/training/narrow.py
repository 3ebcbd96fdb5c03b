"""A way round wrong weight gradients of narrow 3-D convolutions on the CPU.

In torch 2.13, under autocast to bfloat16, the weight gradient of a 3-D convolution on the CPU is wrong where the first
axis is shorter than the kernel: it reads, and writes, memory that is not its own. A U-Net that halves a latent of 8
voxels twice is there. Outputs and the gradients of inputs are right.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def guard_narrow_convolutions(module: nn.Module) -> None:
    """Let every 3-D convolution of ``module`` compute in float32 where its gradient would be wrong."""
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv3d):
            convolution._conv_forward = functools.partial(_convolve, convolution)


def _convolve(convolution: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    narrow = x.device.type == "cpu" and x.shape[2] < convolution.kernel_size[0]  # x (B, C, D, H, W)
    if not (narrow and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return nn.Conv3d._conv_forward(convolution, x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return nn.Conv3d._conv_forward(convolution, x.float(), weight.float(), bias)
