"""The order in which an epoch visits the data: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class EpochSampler(DistributedSampler):
    """Rank r of W visits items r, r + W, r + 2W, ... of a permutation drawn from (seed, epoch).

    One process with batch size W * b therefore sees the same global batches as W processes with batch size b,
    and a resumed run the same order as one that was never stopped: the epoch and the number of items visited in
    it are all the state there is, see `start_at`.
    Every rank visits equally many items: the last round is filled up from the start of the permutation, or
    left out with ``drop_last``.

    It derives from torch's sampler so that Lightning recognises it and does not put its own in its place. A
    dataset with ``set_epoch`` is told the epoch too.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self._visited = (0, 0)  # an epoch, and the items of each rank that were visited in it

    def start_at(self, batches: int, batch_size: int) -> None:
        """Go on behind ``batches`` batches of ``batch_size`` items a rank, counted over all epochs.

        The rest of the epoch in which they end comes next, however often its iterator is made anew; later epochs
        are whole. ``len`` stays that of a whole epoch.
        """
        epoch, batches = divmod(batches, max(1, -(-len(self) // batch_size)))
        self._visited = (epoch, batches * batch_size)
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        # A sequence as seed is hashed, so that (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(count) if self.shuffle else np.arange(count)
        own = np.resize(order, self.total_size)[self.rank :: self.num_replicas]
        epoch, visited = self._visited
        yield from own[visited if self.epoch == epoch else 0 :].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before each epoch."""
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
