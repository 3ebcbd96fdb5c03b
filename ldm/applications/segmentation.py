"""Segment subjects with an ensemble and write what it says and how sure it is, in the space of their files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ldm.applications.segmentation_sources import EnsembleSource
from ldm.data import images
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.labels import LabelClasses
from ldm.data.nifti import in_space
from ldm.data.prepare import write_table
from ldm.data.stacks import Cut
from ldm.errors import LdmError, nearest
from ldm.files import write_json, write_npz
from ldm.model.ensemble import Ensemble
from ldm.model.provenance import settle_request
from ldm.training import figures
from ldm.training.segmentation_panels import panel_row

logger = logging.getLogger(__name__)

TABLE, PANEL = "volumes.tsv", "panel.png"
COLUMNS = ("participant_id", "class", "volume", "members_mean", "low", "high", "unit")
INTERVAL = (2.5, 97.5)  # percentiles of the members' volumes
SHOWN = 6  # subjects in the panel


# subjects ---------------------------------------------------------------------------------------------


def in_order(record: Record, source: EnsembleSource) -> Record:
    """The record with the images that the source is given, in its order.

    Raises:
        LdmError: one is missing, or unknown; the message names record and image.
    """
    missing = [name for name in source.channels if not record.images.get(name)]
    if missing:
        raise LdmError(
            f"'{record.id}' lacks {', '.join(missing)}; this model is given {', '.join(source.channels)}, all of them."
        )
    for name in record.images:
        if name not in source.channels:
            raise LdmError(
                f"'{record.id}': '{name}' is no image that this model is given.{nearest(name, source.channels)} "
                f"Legal: {', '.join(source.channels)}."
            )
    chosen = {name: record.images[name] for name in source.channels}
    return Record(record.id, record.subject, chosen, record.labels, record.covariates, record.split, record.place)


def check_labels(record: Record, source: EnsembleSource) -> None:
    """Refuse a label map that cannot be compared with.

    Raises:
        LdmError: there is none, it lies on another grid than the images, or has values that the model does not know.
    """
    values = {int(value) for value in np.unique(source.preprocessing.load_labels(record))}
    strange = [] if source.unnamed is None else sorted(set(source.classes.unknown(values)) - set(source.unnamed))
    if strange:
        legal = ", ".join(f"{v} {name}" for name, entry in source.classes.values.items() for v in entry)
        raise LdmError(
            f"{record.labels}: label value(s) {', '.join(map(str, strange))} are unknown; legal: 0 background, {legal}"
            + (f"; background too: {', '.join(map(str, source.unnamed))}." if source.unnamed else ".")
        )


# results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was written for a subject, in the space of its files.

    Attributes:
        labels: ``(*S)`` class indices of the segmentation.
        members: ``(M, *S)`` class indices.
        mean: ``(K, *S)`` mean probability of each class but background.
        variance: ``(*S)``, see :class:`ldm.model.ensemble.Ensemble`.
        entropy: ``(*S)`` nats.
        spacing: voxel size in mm along the axes, and of a slice of a volume across it too; None where it is not known.
    """

    labels: np.ndarray
    members: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    entropy: np.ndarray
    spacing: tuple[float, ...] | None = None

    @property
    def voxel(self) -> float:
        """Volume of a voxel in mm3; 1 pixel where its size is not known."""
        return 1.0 if self.spacing is None else float(np.prod(self.spacing))


def slice_spacing(record: Record) -> tuple[float, ...] | None:
    """:attr:`Result.spacing` of a record's images that are slices of NIfTI files; None of any others."""
    cut = Cut.of(next(iter(record.images.values())))
    return None if cut is None else cut.spacing


def in_file_space(ensemble: Ensemble, geometry: Geometry, spacing: tuple[float, ...] | None = None) -> Result:
    """Undo crop, resampling and orientation; what the model did not see is background, and sure of it.

    Args:
        ensemble: on the model's grid.
        geometry: the way back.
        spacing: of a slice, whose geometry does not know it.
    """
    mean = geometry.undo(ensemble.mean[1:])  # (K, *file)
    members = geometry.undo(ensemble.member_labels, labels=True)  # (M, *file)
    labels = geometry.undo(ensemble.labels[None], labels=True)[0]  # (*file)
    spread = geometry.undo(np.stack([ensemble.variance, ensemble.entropy]))  # (2, *file)
    if geometry.original_affine is not None:
        spacing = tuple(nib.affines.voxel_sizes(np.array(geometry.original_affine)).tolist())
    return Result(labels, members, mean, spread[0], spread[1], spacing)


def volumes(result: Result, classes: LabelClasses) -> list[dict[str, Any]]:
    """A row a class: volume of the segmentation, and mean and interval of the members'.

    In mm3, or pixels where the pixel size is not known. For the interval see :func:`interval_of`.
    """
    unit, rows = "pixels" if result.spacing is None else "mm3", []
    for index, name in enumerate(classes.names, 1):
        members = [float((one == index).sum()) * result.voxel for one in result.members]
        low, high = interval_of(members)
        volume = float((result.labels == index).sum()) * result.voxel
        rows.append(
            {"class": name, "volume": volume, "members_mean": float(np.mean(members))}
            | {"low": low, "high": high, "unit": unit}
        )
    return rows


def interval_of(members: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """2.5th and 97.5th percentile of members' volumes, with few of them hardly less than their range; None of one."""
    if len(members) < 2:
        return None, None
    low, high = np.percentile(members, INTERVAL)
    return float(low), float(high)


def segment(
    source: EnsembleSource,
    records: Sequence[Record],
    out: Path,
    provenance: Mapping[str, Any],
    together: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Segment subjects and write results; those of the same request that are there are kept.

    3-D: ``ID_dseg.nii.gz`` (stored label values), ``ID_mean.nii.gz`` (probability of each class),
    ``ID_variance.nii.gz``, ``ID_entropy.nii.gz`` and ``ID_members.nii.gz`` (a label map each along the fourth axis).
    2-D: ``ID_dseg.png``, and ``ID.npz`` with ``mean``, ``variance``, ``entropy`` and ``members``. Beside them
    ``volumes.tsv``, ``provenance.json``, and ``panel.png`` of some subjects, see :func:`telling`.

    Args:
        source: what draws.
        records: subjects, of :func:`in_order`.
        out: folder; made if it is not there.
        provenance: what the results depend on beside the source.
        together: subjects computed together.
        progress: called with the number of finished subjects.

    Returns:
        The table.

    Raises:
        LdmError: two subjects of one name; ``out`` holds results of another request; a file that cannot be read.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = [record.id for record in records]
    (name, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise LdmError(f"{count} subjects are called '{name}'; names of results have to differ.")
    asked = {record.id: record.images for record in records}  # which file is which image of whom
    settle_request(out, {**source.facts, **provenance, "images": asked}, "*_volumes.json")
    pending = [record for record in records if not _volumes_file(out, record).is_file()]
    if progress is not None:
        progress(len(records) - len(pending))
    for start in range(0, len(pending), together):
        group = pending[start : start + together]
        loaded = [source.preprocessing.load(record) for record in group]
        for record, (_, geometry) in zip(group, loaded, strict=True):
            if geometry.crops:
                logger.warning(
                    "'%s' is larger than the model's grid: what lies outside is taken as background.", record.id
                )
        ensembles = source.ensembles([array for array, _ in loaded], [record.id for record in group])
        for record, (_, geometry), ensemble in zip(group, loaded, ensembles, strict=True):
            result = in_file_space(ensemble, geometry, slice_spacing(record))
            write_result(out, record, result, source, geometry)
        if progress is not None:
            progress(len(group))
    table = write_volumes(out / TABLE, [row for record in records for row in _read_volumes(out, record)])
    write_panel(out, telling(out, records), source)
    return table


def write_result(out: Path, record: Record, result: Result, source: EnsembleSource, geometry: Geometry) -> None:
    """Write one subject; its volumes last, which say that it is whole."""
    stored = source.classes.values_of(torch.from_numpy(result.labels)).numpy()
    members = source.classes.values_of(torch.from_numpy(result.members)).numpy()
    if source.preprocessing.spatial_dims == 2:
        images.write(out / f"{record.id}_dseg.png", stored)
        arrays = {"mean": result.mean, "variance": result.variance, "entropy": result.entropy, "members": members}
        write_npz(out / f"{record.id}.npz", arrays)
    else:
        space = geometry.original_affine, geometry.space_code
        written = {"mean": result.mean, "variance": result.variance[None], "entropy": result.entropy[None]}
        for name, array in written.items():
            images.write(out / f"{record.id}_{name}.nii.gz", in_space(array.astype(np.float32), *space))
        for name, array in {"members": members, "dseg": stored[None]}.items():
            images.write(out / f"{record.id}_{name}.nii.gz", in_space(array, *space, labels=True))
    write_json(_volumes_file(out, record), volumes(result, source.classes))


def read_result(out: Path, record: Record, source: EnsembleSource) -> Result:
    """What :func:`segment` wrote for a subject.

    Raises:
        LdmError: a file is missing or damaged.
    """
    classes = source.classes.classes
    if source.preprocessing.spatial_dims == 2:
        stored = images.read(out / f"{record.id}_dseg.png", spatial_dims=2).array[0]
        with np.load(out / f"{record.id}.npz", allow_pickle=False) as file:
            arrays, spacing = dict(file), slice_spacing(record)
    else:
        dseg = images.read(out / f"{record.id}_dseg.nii.gz")
        names = ("mean", "variance", "entropy", "members")
        arrays = {name: images.read(out / f"{record.id}_{name}.nii.gz").array for name in names}
        arrays |= {name: arrays[name][0] for name in ("variance", "entropy")}
        stored, spacing = dseg.array[0], tuple(nib.affines.voxel_sizes(dseg.affine).tolist())
    labels, members = (classes(torch.from_numpy(np.asarray(a, np.uint8))).numpy() for a in (stored, arrays["members"]))
    return Result(labels, members, arrays["mean"], arrays["variance"], arrays["entropy"], spacing)


def read_truth(record: Record, source: EnsembleSource) -> np.ndarray:
    """Class indices ``(*S)`` of a subject's label map, in the space of its file."""
    stored = images.read(record.labels, spatial_dims=source.preprocessing.spatial_dims).array[0]
    return source.classes.classes(torch.from_numpy(stored.astype(np.uint8))).numpy()


def telling(out: Path, records: Sequence[Record]) -> list[Record]:
    """Subjects to look at, evenly over the volumes that were found, largest first; those without any only behind them.

    The first rows of a table of slices are often all healthy. Classes are added up: a large organ outweighs a lesion.
    """
    found = [sum(row["members_mean"] for row in _read_volumes(out, one)) for one in records]
    order = sorted(range(len(records)), key=lambda index: -found[index])
    some = [index for index in order if found[index] > 0]
    count = min(SHOWN, len(some))
    chosen = [some[k * len(some) // count] for k in range(count)]
    return [records[index] for index in [*chosen, *order[len(some) :]][:SHOWN]]


def write_panel(out: Path, records: Sequence[Record], source: EnsembleSource) -> Path:
    """Images, truth where there is one, segmentation, mean and variance of some subjects."""
    rows = []
    for record in records:
        result = read_result(out, record, source)
        dims = source.preprocessing.spatial_dims
        given = {name: images.read(ref, spatial_dims=dims).array[0] for name, ref in record.images.items()}
        truth = None if record.labels is None else read_truth(record, source)
        rows.append(panel_row(given, truth, result.labels, result.mean.sum(0), result.variance))
    return figures.segmentation_panel(rows, [record.id for record in records], out / PANEL)


def _volumes_file(out: Path, record: Record) -> Path:
    return out / f"{record.id}_volumes.json"


def _read_volumes(out: Path, record: Record) -> list[dict[str, Any]]:
    rows = json.loads(_volumes_file(out, record).read_text())
    return [{"participant_id": record.id, **row} for row in rows]


def write_volumes(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of :func:`volumes`, with ``participant_id``, as a table; n/a where there is no interval."""

    def cell(value: str | float | None) -> str:
        return "n/a" if value is None else f"{value:.6g}" if isinstance(value, float) else value

    write_table(path, COLUMNS, [[cell(row[column]) for column in COLUMNS] for row in rows])
    return path
