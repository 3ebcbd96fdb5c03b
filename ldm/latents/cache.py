"""The posterior cache: the whole cohort encoded once, memory-mapped, one draw a training step.

What is stored is the posterior's mean and standard deviation, never a draw. A frozen draw would make the
second stage fit the noise of the first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import LdmError
from ldm.files import write_json
from ldm.latents.space import LatentSpace

CACHE_VERSION = 1
DTYPES = {"float16": np.float16, "float32": np.float32}
PLANES = ("labels", "images")


class StaleCacheError(LdmError):
    """The cache on disk was made by another first stage, transform, split or dtype."""


@dataclass(frozen=True)
class CacheItem:
    """One encoded image.

    Attributes:
        mean, std: ``(C, *S)`` posterior.
        covariates: ``(K,)`` encoded covariates, corrected for the augmentation of this variant.
        row: position of the record in the cohort.
        variant: 0 is the image as it is, higher numbers are augmented.
        planes: ``(P, *S)`` each, conditions on the latent grid: ``labels``, shares of classes, and ``images``.
    """

    mean: Tensor
    std: Tensor
    covariates: np.ndarray
    row: int
    variant: int
    planes: Mapping[str, Tensor] = field(default_factory=dict)


class PosteriorCache(Dataset):
    """Memory-mapped posteriors of one split.

    ``cache[i]`` returns ``mean`` and ``std`` ``(C, *S)``, ``covariates`` ``(K,)``, ``row``, ``variant`` and, when
    they were cached, ``labels`` ``(L, *S)`` and ``images`` ``(C', *S)``.

    Args:
        folder: where the cache lies.
        key: what it has to agree with: hash of the first stage, of the transform, of the split, dtype, ...

    Raises:
        StaleCacheError: it was made from something else; the message names what differs.
        LdmError: there is no complete cache in ``folder``.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        index_file = self.folder / "index.json"
        if not index_file.is_file():
            raise LdmError(f"{self.folder} holds no posterior cache (index.json is missing).")
        index = json.loads(index_file.read_text())
        _compare(index["key"], key, self.folder)
        self.covariates = np.asarray(index["covariates"], dtype=np.float32).reshape(len(index["rows"]), -1)
        self.rows, self.variants = index["rows"], index["variants"]
        self._mean = np.load(self.folder / "mean.npy", mmap_mode="r", allow_pickle=False)
        self._std = np.load(self.folder / "std.npy", mmap_mode="r", allow_pickle=False)
        files = {name: self.folder / f"{name}.npy" for name in PLANES}
        self._planes = {
            name: np.load(file, mmap_mode="r", allow_pickle=False) for name, file in files.items() if file.is_file()
        }

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, *S)`` of one latent."""
        return tuple(self._mean.shape[1:])

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {
            "mean": _tensor(self._mean[i]),
            "std": _tensor(self._std[i]),
            "covariates": torch.from_numpy(self.covariates[i].copy()),
            "row": self.rows[i],
            "variant": self.variants[i],
        }
        return item | {name: _tensor(array[i]) for name, array in self._planes.items()}

    def posteriors(self, batch_size: int = 64) -> Iterable[tuple[Tensor, Tensor]]:
        """All (mean, std) in batches of ``(B, C, *S)``, for the latent statistics."""
        for start in range(0, len(self), batch_size):
            stop = start + batch_size
            yield _tensor(self._mean[start:stop]), _tensor(self._std[start:stop])

    def fit_space(self) -> LatentSpace:
        """Latent statistics over everything that is cached."""
        return LatentSpace.fit(self.posteriors())


def cache_folder(root: Path, key: Mapping[str, Any]) -> Path:
    """Where the cache of this key lies: a folder of its own, so another key never overwrites it."""
    return Path(root) / hashlib.sha256(_canonical(key).encode()).hexdigest()[:12]


def write_cache(
    folder: Path,
    key: Mapping[str, Any],
    items: Callable[[int], Iterable[CacheItem]],
    count: int,
    latent_shape: tuple[int, ...],
    plane_channels: Mapping[str, int] | None = None,
    dtype: str = "float16",
    every: int = 64,
) -> None:
    """Write a cache, resumably: killed and called again, it goes on behind the last stored row.

    Args:
        folder: final place; it appears only when complete.
        key: see :class:`PosteriorCache`.
        items: function of the number of items already stored, giving the rest in order.
        count: number of items in all.
        latent_shape: ``(C, *S)``.
        plane_channels: channels of each of the items' ``planes``.
        dtype: ``float16`` or ``float32``, of the arrays on disk.
        every: rows between two progress marks.

    Raises:
        LdmError: a posterior is not finite in the dtype; the message names the row.
    """
    if dtype not in DTYPES:
        raise LdmError(f"latents.dtype '{dtype}' is unknown; legal: {', '.join(DTYPES)}.")
    folder = Path(folder)
    work = folder.with_name(folder.name + ".building")
    shapes = {"mean": latent_shape, "std": latent_shape}
    shapes |= {name: (channels, *latent_shape[1:]) for name, channels in (plane_channels or {}).items()}
    progress = _resume(work, key)
    work.mkdir(parents=True, exist_ok=True)
    mode = "r+" if progress["covariates"] else "w+"
    arrays = {
        name: np.lib.format.open_memmap(work / f"{name}.npy", mode, DTYPES[dtype], (count, *shape))
        for name, shape in shapes.items()
    }
    for item in items(len(progress["rows"])):
        i = len(progress["rows"])
        tensors = {"mean": item.mean, "std": item.std, **item.planes}
        for name in arrays:
            arrays[name][i] = _finite(tensors[name], DTYPES[dtype], name, item.row)
        progress["rows"].append(int(item.row))
        progress["variants"].append(int(item.variant))
        progress["covariates"].append([float(value) for value in item.covariates])
        if (i + 1) % every == 0:
            _mark(work, arrays, progress)
    if len(progress["rows"]) != count:
        raise LdmError(f"{folder}: expected {count} latents, the encoder gave {len(progress['rows'])}.")
    _mark(work, arrays, progress)
    (work / "progress.json").rename(work / "index.json")
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)


def _resume(work: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    fresh = {"key": json.loads(_canonical(key)), "rows": [], "variants": [], "covariates": []}
    progress_file = work / "progress.json"
    if progress_file.is_file():
        progress = json.loads(progress_file.read_text())
        if progress["key"] == fresh["key"]:
            return progress
    shutil.rmtree(work, ignore_errors=True)
    return fresh


def _mark(work: Path, arrays: Mapping[str, np.memmap], progress: Mapping[str, Any]) -> None:
    for array in arrays.values():
        array.flush()
    write_json(work / "progress.json", progress, indent=None)


def _finite(value: Tensor, dtype: type, name: str, row: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = value.float().cpu().numpy().astype(dtype)
    if not np.isfinite(array).all():
        raise LdmError(
            f"Posterior {name} of record {row} is not finite in {np.dtype(dtype).name}: the first stage diverged, or "
            "its latents are too large; train it again or set ldm.latents.dtype=float32."
        )
    return array


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    wanted = json.loads(_canonical(wanted))
    differing = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
    if differing:
        what = "; ".join(f"{name} is {stored.get(name)}, expected {wanted.get(name)}" for name in differing)
        raise StaleCacheError(f"The posterior cache in {folder} was made from something else: {what}. Remove it.")


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps({**key, "cache_version": CACHE_VERSION}, sort_keys=True)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: the file is read-only
