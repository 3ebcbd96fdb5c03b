"""Batches of cached posteriors for the second stage."""

from __future__ import annotations

from ldm.data.cohort import Cohort
from ldm.data.ordered import OrderedDataModule
from ldm.latents.cache import PosteriorCache


class LatentDataModule(OrderedDataModule):
    """Posteriors of the training and validation split; memory-mapped reads are too cheap for worker processes.

    Args:
        train, valid: posterior caches.
        cohort: for the names of records in messages.
        batch_size, seed: see :class:`OrderedDataModule`.
    """

    def __init__(
        self, train: PosteriorCache, valid: PosteriorCache, cohort: Cohort, batch_size: int, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        self.train, self.valid, self.cohort = train, valid, cohort

    def training_set(self) -> PosteriorCache:
        """See :class:`OrderedDataModule`."""
        return self.train

    def validation_set(self) -> PosteriorCache:
        """See :class:`OrderedDataModule`."""
        return self.valid
