"""Which random numbers a sample gets: a stream of its own, fixed by numbers that do not depend on the batch.

Sample ``index`` of run ``seed`` draws from the same stream at any batch size, order or number of processes;
so does a training sample at ``(seed, step, index)``.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError

#: Bytes of a CPU generator's state that hold the 624 words of MT19937, each as a 64-bit integer.
_MT19937_WORDS = slice(24, 24 + 624 * 8)


def generators(seed: int, indices: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator for each sample of a run.

    Args:
        seed: of the run, 0 .. 2^64 - 1.
        indices: the samples' numbers in the run, each 0 .. 2^32 - 1.
        device: where the numbers are drawn. On the CPU (the default) they are the same whatever device the
            chain then runs on; each other kind of device has numbers of its own.

    Raises:
        LdmError: a seed or index outside its range.
    """
    return [_generator(seed, (index,), device) for index in indices]


def step_generator(seed: int, step: int, index: int) -> torch.Generator:
    """CPU generator for training sample ``index`` (global, over all ranks) at optimisation step ``step``.

    Raises:
        LdmError: seed outside 0 .. 2^64 - 1, step or index outside 0 .. 2^32 - 1.
    """
    return _generator(seed, (step, index), "cpu")


def draw(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, row b from generator b: shape (C, *S) -> (B, C, *S) float32, on their device."""
    return torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in generators])


def _generator(seed: int, key: tuple[int, ...], device: torch.device | str) -> torch.Generator:
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
        raise LdmError(f"seed must be a whole number in 0 .. 2^64 - 1, got {seed!r}.")
    seed, key = int(seed), tuple(map(operator.index, key))
    if not all(0 <= part < 2**32 for part in key):
        raise LdmError(f"Sample and step numbers must be in 0 .. 2^32 - 1, got {key}.")
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    generator = torch.Generator(device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
    # On the CPU manual_seed keeps 32 bits of its seed, so that two of 100,000 samples would be expected to
    # share all their noise. numpy fills the whole state of the same generator, MT19937, instead.
    state = generator.get_state().numpy()
    words = np.random.MT19937(sequence).state["state"]["key"]
    state[_MT19937_WORDS] = words.astype(np.uint64).view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator
