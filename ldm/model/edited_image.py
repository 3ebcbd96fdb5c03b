"""An image that is edited: on its own grid and on the model's, and the way back for what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ldm.data import images
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError


@dataclass(frozen=True)
class EditedImage:
    """An image and, where only a part of it changes, that region.

    Attributes:
        preprocessing: the model's.
        own: on its own grid and in the model's range, ``(C, *file)``.
        geometry: from there to the model's grid.
        region: True where it changes, ``(*file)``; None for everywhere.
        fill: the same on the model's grid, ``(*S)``.
    """

    preprocessing: Preprocessing
    own: np.ndarray
    geometry: Geometry
    region: np.ndarray | None = None
    fill: np.ndarray | None = None

    @classmethod
    def read(cls, preprocessing: Preprocessing, image: str | Mapping[str, str], fill: str | None = None) -> EditedImage:
        """Read the file of an image, or {channel: file}, and the file of a region, which is where it is not 0.

        Raises:
            LdmError: a file that cannot be read, does not fit the model, or lies on another grid; a region that is
                empty or outside the model's field of view.
        """
        own, geometry = preprocessing.read_image(image)
        if fill is None:
            return cls(preprocessing, own, geometry)
        first = next(iter(image.values())) if isinstance(image, Mapping) else image
        record = Record(f"fill={fill}", "", {"image": str(first)}, fill, {}, "")
        on_model = preprocessing.load_labels(record) != 0  # (*S)
        region = images.read(fill, spatial_dims=preprocessing.spatial_dims).array[0] != 0  # (*file)
        if not on_model.any():
            left = "marks no voxel" if not region.any() else "marks nothing that is left on the model's grid"
            raise LdmError(f"fill={fill}: {left}; what is to be generated anew is not 0.")
        return cls(preprocessing, own, geometry, region, on_model)

    @cached_property
    def array(self) -> np.ndarray:
        """On the model's grid and in its range, ``(C, *S)``."""
        return self.preprocessing.bring(self.own, self.geometry)

    def back(self, image: np.ndarray) -> np.ndarray:
        """``image`` ``(C, *S)`` of the model on this image's own grid: ``(C, *file)``.

        Outside the region the image itself; without a region, background where the model's field of view ends.
        """
        background = self.preprocessing.intensity.background(image)
        found = self.geometry.undo(np.asarray(image, np.float32), fill=background)  # (C, *file)
        return found if self.region is None else np.where(self.region, found, self.own)

    def write(self, image: np.ndarray, paths: Sequence[Path]) -> None:
        """Write ``image`` ``(C, *S)`` of the model in this image's space, its channels shared out to the files."""
        self._write(self.back(image), paths)

    def write_own(self, paths: Sequence[Path]) -> None:
        """Write this image itself, in the units of what becomes of it."""
        self._write(self.own, paths)

    def read_back(self, path: Path) -> np.ndarray:
        """A file that :meth:`write` wrote, on the model's grid: ``(C, *S)``."""
        array = images.read(path, spatial_dims=self.preprocessing.spatial_dims).array  # (C, *file)
        return self.geometry.forward(array, fill=float(array.min()))

    def _write(self, array: np.ndarray, paths: Sequence[Path]) -> None:
        geometry = self.geometry
        unmoved = Geometry.plan(geometry.original_shape, geometry.original_affine, space_code=geometry.space_code)
        for path, channels in zip(paths, np.split(array, len(paths)), strict=True):
            images.write(path, self.preprocessing.restore(channels, unmoved))
