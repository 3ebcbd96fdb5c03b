"""Exponential moving averages of the weights, with warm-up; one or several decays."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ldm.errors import LdmError


class EMA(nn.Module):
    """Averages of a module's parameters, one a decay.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held back
    by its random start. The update count is a buffer: a resumed run continues the warm-up.

    Args:
        module: what is averaged; its buffers are copied, not averaged, and its frozen parts are shared.
        decays: one average a decay; the first is the one that is sampled from.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float] = (0.999,)) -> None:
        super().__init__()
        if not decays or any(not 0 <= decay < 1 for decay in decays):
            raise LdmError(f"ldm.ema_decays is {list(decays)}; legal: at least one number in [0, 1).")
        self.decays = tuple(decays)
        self.averages = nn.ModuleList(copy.deepcopy(module).requires_grad_(False).eval() for _ in decays)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> EMA:
        """Averages are always in eval mode."""
        return super().train(False)

    @property
    def module(self) -> nn.Module:
        """The first average."""
        return self.averages[0]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards ``module``."""
        count = int(self.updates)
        for decay, average in zip(self.decays, self.averages, strict=True):
            rate = 1 - min(decay, (1 + count) / (10 + count))
            pairs = zip(average.parameters(), module.parameters(), strict=True)
            own, new = zip(*((a.detach(), b.detach()) for a, b in pairs if a is not b), strict=True)
            torch._foreach_lerp_(own, new, rate)
            for buffer, current in zip(average.buffers(), module.buffers(), strict=True):
                buffer.copy_(current)
        self.updates += 1
