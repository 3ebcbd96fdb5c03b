"""Moving averages of the weights: exponential ones with warm-up, and power-function ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.training.power_profile import exponent_of


class Averages(nn.Module, ABC):
    """Averages of a module's parameters, each of a rate of its own.

    The update count is a buffer: a resumed run goes on with the rates where it was.

    Args:
        module: what is averaged; its buffers are copied, not averaged, and its frozen parts are shared.
        count: number of averages.
    """

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.averages = nn.ModuleList(copy.deepcopy(module).requires_grad_(False).eval() for _ in range(count))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> Averages:
        """Averages are always in eval mode."""
        return super().train(False)

    @abstractmethod
    def rates(self, count: int) -> list[float]:
        """How far each average goes towards the module, after ``count`` updates."""

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards ``module``."""
        for rate, average in zip(self.rates(int(self.updates)), self.averages, strict=True):
            own, new = _moving(average, module)
            torch._foreach_lerp_(own, new, rate)
            for buffer, current in zip(average.buffers(), module.buffers(), strict=True):
                buffer.copy_(current)
        self.updates += 1


class EMA(Averages):
    """Exponential averages, one a decay.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not held back
    by its random start.

    Args:
        module: what is averaged.
        decays: one average a decay; the first is the one that is sampled from.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float] = (0.999,)) -> None:
        if not decays or any(not 0 <= decay < 1 for decay in decays):
            raise LdmError(f"ldm.ema_decays is {list(decays)}; legal: at least one number in [0, 1).")
        super().__init__(module, len(decays))
        self.decays = tuple(decays)

    @property
    def module(self) -> nn.Module:
        """The first average."""
        return self.averages[0]

    def rates(self, count: int) -> list[float]:
        """One minus the decay, warmed up."""
        return [1 - min(decay, (1 + count) / (10 + count)) for decay in self.decays]


class PowerEMA(Averages):
    """Power-function averages, one a relative width (Karras et al. 2023, section 3.1).

    After n updates step k counts as ``(k / n)^(gamma + 1) - ((k - 1) / n)^(gamma + 1)``, which is the profile of
    `ldm.training.power_profile` integrated over that step. The random start, before the first step, counts nothing.

    Args:
        module: what is averaged.
        sigma_rels: standard deviation of each average's profile as a share of training so far.
    """

    def __init__(self, module: nn.Module, sigma_rels: Sequence[float]) -> None:
        super().__init__(module, len(sigma_rels))
        self.sigma_rels = tuple(sigma_rels)
        self.gammas = [exponent_of(sigma_rel) for sigma_rel in sigma_rels]

    def rates(self, count: int) -> list[float]:
        """``1 - beta`` of update t = n + 1, with ``beta = (1 - 1 / t)^(gamma + 1)``."""
        return [1 - (1 - 1 / (count + 1)) ** (gamma + 1) for gamma in self.gammas]


def _moving(average: nn.Module, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both that are not shared."""
    both = zip(average.parameters(), module.parameters(), strict=True)
    pairs = [(own.detach(), new.detach()) for own, new in both if own is not new]
    return [own for own, _ in pairs], [new for _, new in pairs]
