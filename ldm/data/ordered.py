"""Data modules whose order only (seed, epoch) decides, and which go on where a training stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytorch_lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.sampler import EpochSampler


class OrderedDataModule(L.LightningDataModule, ABC):
    """Loaders of a training and a validation set.

    Args:
        batch_size: of each process.
        seed: of the order.
        num_workers: processes that read; 0 for sets whose items are too cheap for them.
    """

    def __init__(self, batch_size: int, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._consumed = 0  # training batches

    @abstractmethod
    def training_set(self) -> Dataset:
        """What training visits, shuffled."""

    @abstractmethod
    def validation_set(self) -> Dataset:
        """What validation visits, in order."""

    def start_at(self, batches: int) -> None:
        """Let training go on behind so many batches of each process, see :meth:`EpochSampler.start_at`."""
        self._consumed = batches

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        loader = self.loader(self.training_set(), shuffle=True)
        loader.sampler.start_at(self._consumed, self.batch_size)
        return loader

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self.loader(self.validation_set(), shuffle=False)

    def loader(self, dataset: Dataset, shuffle: bool) -> DataLoader:
        """Batches of this process's share of a set."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, ranks, rank, self.seed, shuffle),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
