"""Batches of cached posteriors for the second stage."""

from __future__ import annotations

import pytorch_lightning as L
from torch.utils.data import DataLoader

from ldm.data.cohort import Cohort
from ldm.data.sampler import EpochSampler
from ldm.latents.cache import PosteriorCache


class LatentDataModule(L.LightningDataModule):
    """Posteriors of the training and validation split, in an order that only (seed, epoch) decides.

    Args:
        train, valid: posterior caches.
        cohort: for the names of records in messages.
        batch_size: of each process.
        seed: of the order.
    """

    def __init__(
        self, train: PosteriorCache, valid: PosteriorCache, cohort: Cohort, batch_size: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.train, self.valid, self.cohort = train, valid, cohort
        self.batch_size, self.seed = batch_size, seed
        self._consumed = 0  # training batches

    def start_at(self, batches: int) -> None:
        """Let training go on behind so many batches of each process, see :meth:`EpochSampler.start_at`."""
        self._consumed = batches

    def train_dataloader(self) -> DataLoader:
        """Shuffled; memory-mapped reads are too cheap for worker processes."""
        loader = self._loader(self.train, shuffle=True)
        loader.sampler.start_at(self._consumed, self.batch_size)
        return loader

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader(self.valid, shuffle=False)

    def _loader(self, cache: PosteriorCache, shuffle: bool) -> DataLoader:
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(cache, self.batch_size, sampler=EpochSampler(cache, ranks, rank, self.seed, shuffle))
