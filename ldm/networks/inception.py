"""Inception-v3 (Szegedy et al. 2016) as the Fréchet inception distance is measured with it: 2048 pooled features.

The network is that of the TensorFlow graph of 2015-12-05 (Heusel et al. 2017), which pools otherwise than later ones at
borders and in the last block. Names of tensors are those of the PyTorch file that it was converted into,
``pt_inception-2015-12-05-6726825d.pth``. The packages that read this file, ``torch-fidelity`` and ``pytorch-fid``,
load it as a pickle and need torchvision; so the network is written here. Its features are those of ``torch-fidelity``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 2048
SIDE = 299  # pixels, what the network was trained on

Step = Mapping[str, tuple[Any, ...]] | Callable[[Tensor], Tensor]

_mean = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


class Inception(nn.Module):
    """Features of 8-bit RGB pictures of any size.

    A picture is stretched to 299 x 299 as the published distances do it: bilinear, without smoothing, pixel 0 on
    pixel 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        width = 192
        for name, branches in _blocks().items():
            block = _Block(width, *branches)
            self.add_module(name, block)
            width = block.width

    def forward(self, pictures: Tensor) -> Tensor:
        """``(B, 3, H, W)`` uint8 -> ``(B, 2048)`` float32."""
        x = (stretch(pictures.float(), SIDE) - 128) / 128  # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # (B, 192, 71, 71)
        x = _halve(x)  # (B, 192, 35, 35)
        for name in _blocks():
            x = self.get_submodule(name)(x)  # ... (B, 2048, 8, 8)
        return x.mean((2, 3))


def stretch(x: Tensor, side: int) -> Tensor:
    """``(B, C, H, W)`` -> ``(B, C, side, side)``, bilinear as TensorFlow 1 does it: output i lies at ``i H / side``."""
    for axis in (3, 2):
        size = x.shape[axis]
        at = torch.arange(side, dtype=x.dtype, device=x.device) * (size / side)  # (side,)
        low = at.long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        below, above = (x.index_select(axis, i) for i in (low, (low + 1).clamp(max=size - 1)))
        x = below + (above - below) * weight
    return x


class _Conv(nn.Module):
    def __init__(
        self, width: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        height_width = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = [side // 2 if padded and stride == 1 else 0 for side in height_width]  # what halves has no border
        self.conv = nn.Conv2d(width, out, height_width, stride, tuple(around), bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side, each a chain of steps: pooling, or convolutions whose results stand side by side."""

    def __init__(self, width: int, *branches: list[Step]) -> None:
        super().__init__()
        self.branches, self.width = branches, 0
        for branch in branches:
            inner = width
            for step in branch:
                if not callable(step):
                    for name, (out, *shape) in step.items():
                        self.add_module(name, _Conv(inner, out, *shape))
                    inner = sum(out for out, *_ in step.values())
            self.width += inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(branch, x) for branch in self.branches], 1)

    def _along(self, branch: list[Step], x: Tensor) -> Tensor:
        for step in branch:
            x = step(x) if callable(step) else torch.cat([self.get_submodule(name)(x) for name in step], 1)
        return x


def _chain(name: str, *convs: tuple[Any, ...]) -> list[Step]:
    """Convolutions (channels, kernel, stride) one after the other, numbered from 1."""
    return [{f"{name}_{number}": conv} for number, conv in enumerate(convs, 1)]


def _blocks() -> dict[str, tuple[list[Step], ...]]:
    """Name -> branches, in order."""
    return {
        "Mixed_5b": _mixed_35(32),
        "Mixed_5c": _mixed_35(64),
        "Mixed_5d": _mixed_35(64),
        "Mixed_6a": (
            [{"branch3x3": (384, 3, 2)}],
            _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
            [_halve],
        ),
        "Mixed_6b": _mixed_17(128),
        "Mixed_6c": _mixed_17(160),
        "Mixed_6d": _mixed_17(160),
        "Mixed_6e": _mixed_17(192),
        "Mixed_7a": (
            _chain("branch3x3", (192, 1), (320, 3, 2)),
            _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
            [_halve],
        ),
        "Mixed_7b": _mixed_8(_mean),
        "Mixed_7c": _mixed_8(_max),  # of the graph, not of the paper
    }


def _mixed_35(pooled: int) -> tuple[list[Step], ...]:
    return (
        [{"branch1x1": (64, 1)}],
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        [_mean, {"branch_pool": (pooled, 1)}],
    )


def _mixed_17(inner: int) -> tuple[list[Step], ...]:
    down, across = (inner, (7, 1)), (inner, (1, 7))
    return (
        [{"branch1x1": (192, 1)}],
        _chain("branch7x7", (inner, 1), across, (192, (7, 1))),
        _chain("branch7x7dbl", (inner, 1), down, across, down, (192, (1, 7))),
        [_mean, {"branch_pool": (192, 1)}],
    )


def _mixed_8(pool: Callable[[Tensor], Tensor]) -> tuple[list[Step], ...]:
    def fork(name: str) -> Step:
        return {f"{name}a": (384, (1, 3)), f"{name}b": (384, (3, 1))}

    return (
        [{"branch1x1": (320, 1)}],
        [{"branch3x3_1": (384, 1)}, fork("branch3x3_2")],
        [{"branch3x3dbl_1": (448, 1)}, {"branch3x3dbl_2": (384, 3)}, fork("branch3x3dbl_3")],
        [pool, {"branch_pool": (192, 1)}],
    )
