"""From a record's files to the array a model sees, and from a model's array to a file in the cohort's space.

On the way in: read, intensity recipe (on the volume as stored, before any padding), reorient, resample,
centre-crop or pad. `Preprocessing` is fitted once, travels inside the model file, and is all that is needed
to write what the model generates with the right affine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from ldm.data import images
from ldm.data.geometry import (
    Geometry,
    check_shape,
    checked_axcodes,
    checked_spacing,
    per_axis,
    smallest_shape,
)
from ldm.data.intensity import IntensityRecipe
from ldm.data.nifti import channels_last, in_space
from ldm.data.stored import Header, Image
from ldm.errors import LdmError

if TYPE_CHECKING:
    from ldm.data.draft import Record

logger = logging.getLogger(__name__)

RGB = ("red", "green", "blue")

# Two files share a grid when no corner of one is further than this, in voxels, from the other's.
GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class Preprocessing:
    """Recipe from files to model arrays (C, *shape) and back.

    spatial_dims: 2 or 3.
    orientation:  axis codes of the model's grid, e.g. ``RAS``; None keeps each file's. 3-D only.
    spacing:      voxel size in mm along the model's axes, 2-D: in pixels of the files; None keeps each file's.
    shape:        the model's spatial shape; None until `fit`.
    multiple:     what each axis of ``shape`` must be a multiple of, for the networks.
    intensity:    the intensity recipe, applied per channel.
    channels:     channel names, in array order; empty until `fit`.
    reference:    the grid on which generated volumes are written; None until `fit`.
    """

    spatial_dims: int = 3
    orientation: str | None = "RAS"
    spacing: tuple[float, ...] | None = None
    shape: tuple[int, ...] | None = None
    multiple: tuple[int, ...] = (1, 1, 1)
    intensity: IntensityRecipe = field(default_factory=IntensityRecipe)
    channels: tuple[str, ...] = ()
    reference: Geometry | None = None

    @classmethod
    def from_config(cls, data_cfg: Mapping[str, Any], multiple: int | Sequence[int] = 1) -> Preprocessing:
        """Read ``spatial_dims``, ``orientation``, ``spacing_mm``, ``shape``, ``intensity`` of a data block.

        Raises LdmError for illegal values; a shape that is not a multiple gets the nearest legal sizes.
        """
        spatial_dims = data_cfg.get("spatial_dims")
        if spatial_dims not in (2, 3):
            raise LdmError(f"data.spatial_dims: {spatial_dims} is not legal. Write 2 or 3.")
        orientation, spacing = data_cfg.get("orientation"), data_cfg.get("spacing_mm")
        if spatial_dims == 2:
            if spacing is not None:
                raise LdmError("data.spacing_mm: pictures and slices have no mm; set it to null, and data.pixel_size.")
            size = data_cfg.get("pixel_size")
            if size is not None and (isinstance(size, bool) or not isinstance(size, int | float) or not size > 0):
                raise LdmError(
                    f"data.pixel_size: {size!r} is not legal. Write how many stored pixels a side has, or null."
                )
            spacing = size
            orientation = None  # slices are cut along RAS axes already, and pictures have no orientation
        elif data_cfg.get("pixel_size") is not None:
            raise LdmError("data.pixel_size is of 2-D images; for volumes set data.spacing_mm.")
        factors, shape = per_axis(multiple, spatial_dims), data_cfg.get("shape")
        if shape is not None and len(shape) != spatial_dims:
            raise LdmError(f"data.shape: {list(shape)} needs {spatial_dims} sizes, one per axis.")
        return cls(
            spatial_dims=spatial_dims,
            orientation=orientation and checked_axcodes(orientation),
            spacing=None if spacing is None else checked_spacing(_plain(spacing), spatial_dims),
            shape=None if shape is None else check_shape(shape, factors),
            multiple=factors,
            intensity=IntensityRecipe.from_config(data_cfg.get("intensity")),
        )

    def fit(self, records: Sequence[Record]) -> Preprocessing:
        """Fill in ``channels``, ``shape`` and ``reference`` from the headers of ``records``.

        The shape, unless configured, is the smallest legal one that holds every volume. The reference comes
        from the training records: their grid when they share one; otherwise the model's own grid, placed
        where the volume nearest the median lies, so that nothing generated is cut off.
        """
        if not records:
            raise LdmError("there is no image to fit the preprocessing on: the cohort is empty.")
        headers = [self._headers(record) for record in records]
        channels = _channel_names(headers[0])
        for record, own in zip(records, headers, strict=True):
            if _channel_names(own) != channels:
                raise LdmError(
                    f"record '{record.id}': has the channels {', '.join(_channel_names(own))}, but record "
                    f"'{records[0].id}' has {', '.join(channels)}. Every record needs the same channels."
                )
        ways_in = [self._plan(next(iter(own.values()))) for own in headers]
        shape = self.shape or smallest_shape((way.resampled_shape for way in ways_in), self.multiple)
        ways_in = [way.with_shape(shape) for way in ways_in]
        _warn_of_cropping(records, ways_in)
        train = [way for record, way in zip(records, ways_in, strict=True) if record.split == "train"]
        return replace(self, shape=shape, channels=channels, reference=self._reference(train or ways_in))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, *S) of `load`'s arrays; needs `fit`."""
        self._expect_fitted()
        return (len(self.channels), *self.shape)

    @property
    def is_rgb(self) -> bool:
        """Whether the channels are those of one RGB picture, which is what they are written as."""
        prefix = self.channels[0].removesuffix(RGB[0]) if self.channels else ""
        return self.spatial_dims == 2 and self.channels == tuple(prefix + colour for colour in RGB)

    @property
    def voxel_size(self) -> tuple[float, ...] | None:
        """Voxel size of the model's grid in mm along its axes (the reference's); None for 2-D."""
        self._expect_fitted()
        affine = self.reference.affine
        return None if affine is None else tuple(nib.affines.voxel_sizes(affine).tolist())

    @property
    def value_range(self) -> tuple[float, float] | None:
        """(background, maximum) of `load`'s images; None for z-scored images, which have no fixed range."""
        return None if self.intensity.kind == "zscore" else self.intensity.range

    @property
    def shown_range(self) -> tuple[float, float]:
        """(black, white) of `load`'s images; pictures cut off what lies beyond. See `IntensityRecipe.shown_range`."""
        return self.intensity.shown_range

    # in -----------------------------------------------------------------------------------------------

    def load(self, record: Record) -> tuple[np.ndarray, Geometry]:
        """Model array (C, *S), float32, in the model's range, and the geometry that `restore` undoes.

        Raises LdmError naming the file when it cannot be read or does not fit the recipe.
        """
        self._expect_fitted()
        stored = {name: images.read(ref, spatial_dims=self.spatial_dims) for name, ref in record.images.items()}
        _expect_one_grid(record.id, {name: _header(image) for name, image in stored.items()})
        for name, image in stored.items():
            self._expect_axes(record.images[name], image.array.shape)
        channels = [(channel, f"{record.images[name]}") for name, image in stored.items() for channel in image.array]
        if len(channels) != len(self.channels):
            raise LdmError(
                f"record '{record.id}': has {len(channels)} channels, the model has {', '.join(self.channels)}."
            )
        return self._place(channels, stored)

    def load_labels(self, record: Record) -> np.ndarray:
        """Label map (*S), uint8, on the model's grid; padding is 0.

        Raises LdmError unless the labels are whole numbers in 0..255 on the image's grid.
        """
        self._expect_fitted()
        if record.labels is None:
            raise LdmError(f"record '{record.id}': has no label map. Set data.labels.")
        stored = images.read(record.labels, spatial_dims=self.spatial_dims)
        name, first = next(iter(record.images.items()))
        grids = {name: images.read_header(first, spatial_dims=self.spatial_dims), "labels": _header(stored)}
        _expect_one_grid(record.id, grids)
        return self._place_labels(stored, record.labels)

    def read_labels(self, ref: str) -> np.ndarray:
        """Label map (*S), uint8, of a file that stands for itself, on the model's grid; padding is 0.

        Raises LdmError unless the labels are whole numbers in 0..255.
        """
        self._expect_fitted()
        return self._place_labels(images.read(ref, spatial_dims=self.spatial_dims), ref)

    def read_channels(self, refs: Mapping[str, str]) -> np.ndarray:
        """Model array (C, *S), float32, of files with one channel each, whatever channels the model has.

        Raises LdmError naming the file when it cannot be read, has several channels, or lies on another grid.
        """
        self._expect_fitted()
        stored = {name: images.read(ref, spatial_dims=self.spatial_dims) for name, ref in refs.items()}
        for name, image in stored.items():
            if len(image.array) != 1:
                raise LdmError(f"{refs[name]}: has {len(image.array)} channels; '{name}' is one.")
        _expect_one_grid(", ".join(refs.values()), {name: _header(image) for name, image in stored.items()})
        return self._place([(image.array[0], refs[name]) for name, image in stored.items()], stored)[0]

    def read_image(self, image: str | Mapping[str, str]) -> tuple[np.ndarray, Geometry]:
        """An image that stands for itself, on its own grid, (C, *file) float32 in the model's range, and its geometry.

        image: the file of all channels, or {channel: file}. `bring` takes the result to the model's grid.
        Raises LdmError when a channel has no file, or naming the file that cannot be read or does not fit.
        """
        self._expect_fitted()
        if isinstance(image, Mapping) and sorted(image) != sorted(self.channels):
            given = ", ".join(map(str, image))
            raise LdmError(f"Expected a file for each of {', '.join(self.channels)}, got {given}.")
        refs = {name: str(image[name]) for name in self.channels} if isinstance(image, Mapping) else {"": str(image)}
        stored = {name: images.read(ref, spatial_dims=self.spatial_dims) for name, ref in refs.items()}
        for name, one in stored.items():
            self._expect_axes(refs[name], one.array.shape)
        where = ", ".join(refs.values())
        _expect_one_grid(where, {name: _header(one) for name, one in stored.items()})
        channels = [(channel, refs[name]) for name, one in stored.items() for channel in one.array]
        if len(channels) != len(self.channels):
            raise LdmError(f"{where}: {len(channels)} channel(s); the model has {', '.join(self.channels)}.")
        return self._scale(channels), self._plan(_header(next(iter(stored.values()))))

    def bring(self, scaled: np.ndarray, geometry: Geometry) -> np.ndarray:
        """What `read_image` gives, on the model's grid: (C, *S)."""
        placed = [geometry.forward(one[None], fill=self.intensity.background(one))[0] for one in scaled]
        return np.stack(placed)

    def _place(
        self, channels: Sequence[tuple[np.ndarray, str]], stored: Mapping[str, Image]
    ) -> tuple[np.ndarray, Geometry]:
        geometry = self._plan(_header(next(iter(stored.values()))))
        return self.bring(self._scale(channels), geometry), geometry

    def _scale(self, channels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
        return np.stack([self.intensity.apply(channel, name) for channel, name in channels])

    def _place_labels(self, stored: Image, ref: str) -> np.ndarray:
        values = np.rint(stored.array)
        if len(values) != 1 or not (values == stored.array).all() or values.min() < 0 or values.max() > 255:
            raise LdmError(
                f"{ref}: is not a label map; it needs one channel of whole numbers in 0..255, this "
                f"file has {len(values)} channel(s) from {stored.array.min():g} to {stored.array.max():g}."
            )
        if stored.array.ndim != self.spatial_dims + 1:
            raise LdmError(f"{ref}: has {stored.array.ndim - 1} spatial axes, the model has {self.spatial_dims}.")
        return self._plan(_header(stored)).forward(values.astype(np.uint8), labels=True)[0]

    # out ----------------------------------------------------------------------------------------------

    def restore(
        self, array: np.ndarray, geometry: Geometry | None = None, labels: bool = False
    ) -> nib.Nifti1Image | np.ndarray:
        """Bring a model array back to the space it came from, ready for `images.write`.

        array:    (C, *S); for labels also (*S).
        geometry: as returned by `load`; None takes the reference, so that generated volumes land in the
                  cohort's space.

        3-D: a NIfTI image (I, J, K) or (I, J, K, C) with the original shape, affine (sform and qform) and
        orientation, in mm. Images are float32, which holds every model output without a scale factor, in
        stored units for the ``window`` recipe (HU) and in the model's range otherwise; labels are uint8.
        2-D: a picture, uint8 (H, W) or (H, W, C): ``shown_range`` is spread over 0..255, label values stay.
        """
        self._expect_fitted()
        geometry = geometry or self.reference
        array = np.asarray(array)
        if labels:
            array = (array if array.ndim == self.spatial_dims + 1 else array[None]).astype(np.uint8)
            restored = geometry.undo(array, labels=True)
        else:
            array = array.astype(np.float32)
            restored = geometry.undo(array, fill=self.intensity.background(array))
        if self.spatial_dims == 2:
            return channels_last(restored if labels else self._to_bytes(restored))
        voxels = restored if labels else self.intensity.invert(restored)
        return in_space(voxels, geometry.original_affine, geometry.space_code, labels)

    def _to_bytes(self, array: np.ndarray) -> np.ndarray:
        a, b = self.shown_range
        return np.rint(np.clip((array - a) / (b - a), 0.0, 1.0) * 255).astype(np.uint8)

    # record -------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe description; `from_dict` restores it exactly."""
        return {
            "spatial_dims": self.spatial_dims,
            "orientation": self.orientation,
            "spacing": None if self.spacing is None else list(self.spacing),
            "shape": None if self.shape is None else list(self.shape),
            "multiple": list(self.multiple),
            "intensity": self.intensity.to_dict(),
            "channels": list(self.channels),
            "reference": None if self.reference is None else self.reference.to_dict(),
        }

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`."""
        spacing, shape, reference = (description[key] for key in ("spacing", "shape", "reference"))
        return cls(
            spatial_dims=description["spatial_dims"],
            orientation=description["orientation"],
            spacing=None if spacing is None else tuple(spacing),
            shape=None if shape is None else tuple(shape),
            multiple=tuple(description["multiple"]),
            intensity=IntensityRecipe.from_config(description["intensity"]),
            channels=tuple(description["channels"]),
            reference=None if reference is None else Geometry.from_dict(reference),
        )

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of `to_dict`: equal exactly when the recipe is."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    # helpers ------------------------------------------------------------------------------------------

    def _expect_fitted(self) -> None:
        if self.shape is None or self.reference is None:
            raise LdmError("the preprocessing has no shape yet; call fit(records) first.")

    def _headers(self, record: Record) -> dict[str, Header]:
        headers = {name: images.read_header(ref, spatial_dims=self.spatial_dims) for name, ref in record.images.items()}
        _expect_one_grid(record.id, headers)
        for ref, header in zip(record.images.values(), headers.values(), strict=True):
            self._expect_axes(ref, header.shape)
            if header.affine is None and (self.orientation or (self.spacing and self.spatial_dims == 3)):
                raise LdmError(f"{ref}: has no affine; set data.orientation and data.spacing_mm to null or use NIfTI.")
        return headers

    def _expect_axes(self, ref: str, shape: Sequence[int]) -> None:
        """Refuse a volume among pictures, and the reverse; ``shape`` is (C, *S)."""
        if len(shape) != self.spatial_dims + 1:
            raise LdmError(
                f"{ref}: has {len(shape) - 1} spatial axes, but data.spatial_dims is "
                f"{self.spatial_dims}. Select a slice with '::axial[k]' to use a volume as 2-D."
            )

    def _plan(self, header: Header) -> Geometry:
        return Geometry.plan(
            header.shape[1:],
            header.affine,
            self.orientation,
            self.spacing,
            self.shape,
            header.facts.get("sform_code") or header.facts.get("qform_code") or None,
        )

    def _reference(self, ways_in: list[Geometry]) -> Geometry:
        first = ways_in[0]
        if all(_same_grid(first, way) for way in ways_in[1:]):
            return first
        chosen = ways_in[_nearest_to_median(ways_in)]
        spacing = self.spacing if chosen.affine is not None else None  # pixels of the model are what they are
        return Geometry.plan(chosen.shape, chosen.affine, self.orientation, spacing, chosen.shape, chosen.space_code)


def _plain(value: Any) -> Any:
    """A number, or a list of numbers from any sequence (OmegaConf lists included)."""
    return value if isinstance(value, int | float) else list(value)


def _header(image: Image) -> Header:
    return Header(image.array.shape, image.affine, image.facts)


def _channel_names(headers: Mapping[str, Header]) -> tuple[str, ...]:
    """``T1`` for a one-channel file, ``image_0``, ``image_1``, ... for several, ``image_red``, ... for RGB pictures."""
    names: list[str] = []
    for name, header in headers.items():
        count = header.shape[0]
        parts = RGB if header.facts.get("mode") == "RGB" else range(count)
        names += [name] if count == 1 else [f"{name}_{part}" for part in parts]
    return tuple(names)


def _grid_distance(shape: Sequence[int], first: np.ndarray | None, second: np.ndarray | None) -> float:
    """Largest distance between the corners of one grid of ``shape`` under two affines, in smallest voxels."""
    if first is None or second is None:
        return 0.0 if first is second else np.inf
    distance = np.linalg.norm(_corners(shape, first) - _corners(shape, second), axis=1).max()
    return float(distance / nib.affines.voxel_sizes(np.array(first)).min())


def _corners(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """(8, 3) world coordinates in mm of the corner voxels' centres."""
    indices = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1).T
    return nib.affines.apply_affine(np.array(affine), indices)


def _expect_one_grid(record_id: str, headers: Mapping[str, Header]) -> None:
    (first_name, first), *others = headers.items()
    for name, header in others:
        reason = _difference(first, header)
        if reason:
            raise LdmError(
                f"record '{record_id}': '{first_name}' and '{name}' do not lie on one grid ({reason}). "
                "Register and resample them onto one another first."
            )


def _difference(first: Header, second: Header) -> str | None:
    """How two grids differ; slices also by the volumes that they are cut from."""
    pairs = [((first.shape[1:], first.affine), (second.shape[1:], second.affine))]
    if "volume" in first.facts and "volume" in second.facts:
        pairs.append((first.facts["volume"], second.facts["volume"]))
    for (shape, affine), (other_shape, other_affine) in pairs:
        if shape != other_shape:
            return f"shapes are {shape} and {other_shape}"
        distance = _grid_distance(shape, affine, other_affine)
        if np.isinf(distance):
            return "one has an affine and the other has none"
        if distance > GRID_TOLERANCE:
            return f"the affines differ by up to {distance:.3g} voxels"
    return None


def _same_grid(first: Geometry, second: Geometry) -> bool:
    return first.original_shape == second.original_shape and (
        _grid_distance(first.original_shape, first.original_affine, second.original_affine) <= GRID_TOLERANCE
    )


def _nearest_to_median(ways_in: list[Geometry]) -> int:
    """Index of the volume whose model grid lies nearest the median of all (corner distance)."""
    if ways_in[0].affine is None:
        return 0
    corners = np.stack([_corners(way.shape, way.affine) for way in ways_in])
    return int(np.argmin(np.square(corners - np.median(corners, axis=0)).sum(axis=(1, 2))))


def _warn_of_cropping(records: Sequence[Record], ways_in: Sequence[Geometry]) -> None:
    cropped = [record.id for record, way in zip(records, ways_in, strict=True) if way.crops]
    if cropped:
        logger.warning(
            "%d of %d images are larger than the model's shape %s and will be cropped, e.g. '%s'.",
            len(cropped),
            len(records),
            ways_in[0].shape,
            cropped[0],
        )
