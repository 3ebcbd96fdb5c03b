"""The cohort as batches: checked, preprocessed once, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from ldm.data.augmentation import Augmentation
from ldm.data.cache import VolumeCache, build_cache, open_cache
from ldm.data.checks import check_cohort
from ldm.data.cohort import Cohort
from ldm.data.cohort_config import complete_config
from ldm.data.faults import render
from ldm.data.geometry import per_axis
from ldm.data.ordered import OrderedDataModule
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError, nearest

logger = logging.getLogger(__name__)


class CohortDataset(Dataset):
    """One split of a cohort; an item is a dict of

    ``image``       float32 (C, *S), or (C, *patch_size) with random patches
    ``covariates``  float32 (K,), encoded, NaN where missing; corrected for the scale of the augmentation
    ``index``       position of the record in ``cohort.records``
    ``labels``      uint8 like the image without C, when every record of the cohort has a label map

    Random changes depend on (seed, epoch, index) alone, not on the rank, worker or batch that asks.
    """

    def __init__(
        self,
        cohort: Cohort,
        indices: Sequence[int],
        preprocessing: Preprocessing,
        cache: VolumeCache | None = None,
        augmentation: Augmentation | None = None,
        patch_size: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.cohort, self.indices, self.preprocessing = cohort, list(indices), preprocessing
        self.cache, self.augmentation, self.seed = cache, augmentation, seed
        self.patch_size = None if patch_size is None else tuple(patch_size)
        self.has_labels = all(record.labels is not None for record in cohort.records)
        # Shared memory: workers that outlive an epoch see the next one's number.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the random changes of this epoch; `EpochSampler.set_epoch` calls it."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        record, schema = self.cohort.records[index], self.cohort.schema
        image, labels = self._volumes(index)
        covariates = schema.encode(record.covariates)
        generator = torch.Generator().manual_seed(self._item_seed(index))
        if self.augmentation is not None:
            image, labels, s = self.augmentation(
                image, labels, generator, self.preprocessing.voxel_size, self.preprocessing.value_range
            )
            covariates = schema.rescale(covariates, s)
        if self.patch_size is not None:
            image, labels = _random_patch(image, labels, self.patch_size, generator)
        item = {
            "image": image.contiguous(),
            "covariates": torch.from_numpy(np.asarray(covariates, dtype=np.float32)),
            "index": index,
        }
        return item if labels is None else item | {"labels": labels.contiguous()}

    def label_values(self) -> set[int]:
        """Every value that the label maps have."""
        if not self.has_labels:
            return set()
        return {int(value) for index in self.indices for value in np.unique(self._labels(index))}

    def _labels(self, index: int) -> np.ndarray | None:
        if not self.has_labels:
            return None
        if self.cache is not None and index in self.cache:
            return self.cache.labels(index)
        return self.preprocessing.load_labels(self.cohort.records[index])

    def _volumes(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        labels = self._labels(index)
        if self.cache is not None and index in self.cache:
            image = self.cache.image(index)
        else:
            image, _ = self.preprocessing.load(self.cohort.records[index])
        return torch.from_numpy(image), None if labels is None else torch.from_numpy(labels)

    def _item_seed(self, index: int) -> int:
        entropy = (self.seed, int(self._epoch[0]), index)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


class CohortDataModule(OrderedDataModule):
    """Check, preprocess and serve the cohort that a ``data`` configuration describes.

    data_cfg:    the ``data`` block (a mapping or DictConfig; ``conf/data/base.yaml`` explains the keys).
    multiple:    what the model's spatial shape must be a multiple of, one number or one per axis.
    batch_size:  images per process and step.
    num_workers: loader processes; None takes ``data.num_workers``.
    seed:        of the order, the random patches and the augmentation.
    patch_size:  spatial shape of random training patches; None trains on whole images.
    progress:    whether to show progress bars while preparing.

    `prepare_data` (once per node) checks the cohort and builds the cache, `setup` (every process) opens it.
    Every process arrives at the same cohort and preprocessing by itself: both depend on the files alone.
    """

    def __init__(
        self,
        data_cfg: Mapping[str, Any] | DictConfig,
        multiple: int | Sequence[int] = 8,
        batch_size: int = 1,
        num_workers: int | None = None,
        seed: int = 0,
        patch_size: Sequence[int] | None = None,
        progress: bool = True,
    ) -> None:
        self.config = complete_config(data_cfg)
        super().__init__(batch_size, seed, self.config["num_workers"] if num_workers is None else num_workers)
        self.progress = progress
        self.multiple = per_axis(multiple, self.config["spatial_dims"])
        self.patch_size = None if patch_size is None else tuple(int(size) for size in patch_size)
        Augmentation.from_config(self.config["augment"])  # fail early
        self._recipe = Preprocessing.from_config(self.config, self.multiple)
        self._cohort: Cohort | None = None
        self._preprocessing: Preprocessing | None = None
        self._cache: VolumeCache | None = None

    # state, known after prepare_data or setup ---------------------------------------------------------

    @property
    def augmentation(self) -> Augmentation:
        """What training images go through."""
        return Augmentation.from_config(self.config["augment"], self.preprocessing.channels)

    @property
    def cohort(self) -> Cohort:
        """The checked cohort, without the records that ``data.faults=leave_out`` leaves out."""
        self._expect_setup()
        return self._cohort

    @property
    def schema(self) -> CovariateSchema:
        """The covariate schema, fitted on the training split."""
        return self.cohort.schema

    @property
    def preprocessing(self) -> Preprocessing:
        """The fitted preprocessing that belongs into the model file."""
        self._expect_setup()
        return self._preprocessing

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, *S) of whole images."""
        return self.preprocessing.image_shape

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Voxel size of whole images in mm along their axes; None for images without an affine."""
        return self.preprocessing.voxel_size

    @property
    def cache_dir(self) -> Path:
        """Folder of the check's results and of the preprocessed images."""
        return Path(self.config["cache_dir"] or Path(self.config["root"]) / ".ldm-cache").expanduser()

    # Lightning ----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make the simulated cohort if it is the one asked for, check the cohort, and build the image cache.

        Raises LdmError with the check's report when ``data.faults`` does not let it pass, and for ``data.augment`` that
        names an image that is not there.
        """
        if self.config["simulate"]:
            # Imported here: the simulation needs a template that nobody else does. A cohort that is complete
            # stays as it is; one that was made with other settings is an error.
            from ldm.data.simulated import generate

            generate(Path(self.config["root"]).expanduser(), progress=self.progress, **self.config["simulate"])
        self._read_cohort(self.progress)
        _ = self.augmentation  # names its channels, before hours of preparing
        if self.config["cache"]:
            build_cache(*self._cache_arguments(), num_workers=max(1, self.num_workers), progress=self.progress)

    def setup(self, stage: str | None = None) -> None:
        """Open in this process what `prepare_data` prepared."""
        self._read_cohort(progress=False)
        if self.config["cache"] and self._cache is None:
            self._cache = open_cache(*self._cache_arguments())
            if self._cache is None:
                raise LdmError(
                    f"{self.cache_dir}: holds no cache of this cohort; call prepare_data first, on every "
                    "node or in a folder that all nodes see."
                )

    def training_set(self) -> CohortDataset:
        """Augmented training images, or random patches of them."""
        return self.dataset("train", augment=True, patch_size=self.patch_size)

    def validation_set(self) -> CohortDataset:
        """Whole validation images in the table's order."""
        return self.dataset("valid")

    def test_dataloader(self) -> DataLoader:
        """Whole test images in the table's order; LdmError when the cohort has no test split."""
        dataset = self.dataset("test")
        if not len(dataset):
            raise LdmError(f"cohort '{self.cohort.name}' has no test split; see data.split.")
        return self.loader(dataset, shuffle=False)

    def dataset(self, split: str, augment: bool = False, patch_size: Sequence[int] | None = None) -> CohortDataset:
        """Items of ``train``, ``valid``, ``test`` or ``all`` records, whole and unchanged by default."""
        self._expect_setup()
        legal = ("train", "valid", "test", "all")
        if split not in legal:
            raise LdmError(f"there is no split '{split}'.{nearest(split, legal)} Legal: {', '.join(legal)}.")
        _check_patch(patch_size, self.preprocessing.shape, self.multiple)
        records = self.cohort.records
        return CohortDataset(
            self.cohort,
            [index for index, record in enumerate(records) if split in ("all", record.split)],
            self.preprocessing,
            self._cache,
            self.augmentation if augment else None,
            patch_size,
            self.seed,
        )

    # helpers ------------------------------------------------------------------------------------------

    def _expect_setup(self) -> None:
        if self._cohort is None:
            raise LdmError("the data are not set up yet; call prepare_data() and setup() first.")

    def _read_cohort(self, progress: bool) -> None:
        if self._cohort is not None:
            return
        report = check_cohort(self.config, self.cache_dir, progress, self.multiple)
        report.raise_for_policy()
        if report.warnings:
            logger.warning("%s", render(report.warnings, "Warnings"))
        self._preprocessing = self._recipe.fit(report.cohort.records)
        self._cohort = report.cohort

    def _cache_arguments(self) -> tuple[Any, ...]:
        return (
            self.cache_dir,
            self.cohort,
            self.preprocessing,
            self.config["cache_dtype"],
            self.config["cache_gb"],
        )


def _check_patch(patch_size: Sequence[int] | None, shape: Sequence[int], multiple: Sequence[int]) -> None:
    if patch_size is None:
        return
    fits = len(patch_size) == len(shape) and all(
        patch <= size and patch % factor == 0 and patch > 0
        for patch, size, factor in zip(patch_size, shape, multiple, strict=True)
    )
    if not fits:
        raise LdmError(
            f"patch_size {list(patch_size)} is not legal: each of the {len(shape)} axes needs a multiple of "
            f"{list(multiple)} that is at most {list(shape)}."
        )


def _random_patch(
    image: torch.Tensor, labels: torch.Tensor | None, patch_size: Sequence[int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cut the same uniformly placed box out of the image (C, *S) and the labels (*S)."""
    starts = [
        int(torch.randint(size - patch + 1, (1,), generator=generator))
        for size, patch in zip(image.shape[1:], patch_size, strict=True)
    ]
    box = tuple(slice(start, start + patch) for start, patch in zip(starts, patch_size, strict=True))
    return image[(slice(None), *box)], None if labels is None else labels[box]
