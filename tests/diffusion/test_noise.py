"""One stream a sample: the same at any batch size and order, unlike every other sample's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.diffusion.noise import draw, generators, step_generator
from ldm.errors import LdmError

SHAPE = (2, 5, 6, 7)


def test_a_sample_gets_the_same_noise_at_any_batch_size_and_order():
    def two_draws(indices):
        streams = generators(11, indices)
        return torch.stack([draw(streams, SHAPE), draw(streams, SHAPE)], dim=1)  # (B, 2, *SHAPE)

    batch = two_draws(range(8))
    assert batch.dtype == torch.float32
    assert torch.equal(two_draws([5])[0], batch[5])
    order = [6, 0, 3, 7, 1, 2, 5, 4]
    assert torch.equal(two_draws(order), batch[order])


def test_streams_are_standard_normal_and_uncorrelated():
    size = 4096
    rows = [draw(generators(seed, range(8)), (size,)) for seed in (0, 1, 2**32, 2**63)]
    keys = ((0, 0), (0, 1), (1, 0), (1, 1))
    rows += [torch.randn(1, size, generator=step_generator(0, *key)) for key in keys]
    rows = torch.cat(rows).double()  # (36, 4096)
    assert rows.mean().abs() < 4 / rows.numel() ** 0.5
    assert (rows.var() - 1).abs() < 4 * (2 / rows.numel()) ** 0.5
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / size**0.5


def test_the_cpu_stream_is_numpys_mt19937_of_the_whole_seed():
    """torch keeps 32 bits of a CPU seed; here all count, as the same stream from numpy shows."""
    ours = torch.randint(0, 2**32, (64,), generator=generators(7, [3])[0])
    raw = np.random.MT19937(np.random.SeedSequence(7, spawn_key=(3,))).random_raw(200).tolist()
    start = next(k for k in range(3) if raw[k] == ours[0])
    assert ours.tolist() in (raw[start : start + 64], raw[start : start + 128 : 2])


def test_training_streams_differ_by_seed_step_and_index():
    keys = [(s, t, i) for s in (0, 1) for t in (0, 1, 2) for i in (0, 1, 2)]
    first = {key: torch.rand((), generator=step_generator(*key)).item() for key in keys}
    assert len(set(first.values())) == len(keys)
    assert torch.rand((), generator=step_generator(1, 2, 0)).item() == first[1, 2, 0]
    assert torch.rand((), generator=generators(1, [0])[0]).item() not in first.values()


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_numbers_out_of_range_are_refused(seed, index):
    with pytest.raises(LdmError, match=r"in 0 \.\. 2"):
        generators(seed, [index])
