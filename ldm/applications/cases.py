"""Images to look at, of a cohort or of a folder, with what is known of them: a mask, a class, whose they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldm.applications.slicing import REMEDY
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate
from ldm.data.stacks import is_volume
from ldm.data.stored import NIFTI_SUFFIXES, SUFFIXES
from ldm.data.table import read_table
from ldm.errors import LdmError, nearest

logger = logging.getLogger(__name__)

T = TypeVar("T")
MASK_ENDINGS = ("", "_mask", "_seg", "_lesion", "_dseg")
ID, SUBJECT = "participant_id", "subject"
PATIENT, IMAGE = "patient", "image"  # what intervals and shares are over


@dataclass(frozen=True)
class Case:
    """One image on the model's grid, with what is known of it.

    Attributes:
        record: files, id, subject.
        image: ``(C, *S)`` in the model's range.
        geometry: the way back to its own space.
        mask: ``(*S)``, True where there is a lesion; None where that is not known.
        diseased: None where that is not known.
    """

    record: Record
    image: np.ndarray
    geometry: Geometry
    mask: np.ndarray | None = None
    diseased: bool | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the image's channels, in their order."""
        return tuple(self.record.images)


@dataclass(frozen=True)
class Truth:
    """How a record says what is healthy and where a lesion is.

    Attributes:
        target: the covariate that says healthy or diseased.
        healthy: its level that means healthy.
        lesion: the classes of label maps that are lesions; None counts every label but 0.
    """

    target: Covariate
    healthy: str
    lesion: LabelClasses | None = None

    def diseased(self, record: Record) -> bool | None:
        """Whether a record is diseased; None where it does not say.

        Raises:
            LdmError: an unknown level.
        """
        value = record.covariates.get(self.target.name)
        if value is None:
            return None
        return self.target.levels[self.target.level_index(value)] != self.healthy

    def mask(self, labels: np.ndarray) -> np.ndarray:
        """Stored labels ``(*S)`` -> True where there is a lesion."""
        if self.lesion is None:
            return labels > 0
        return np.isin(labels, [value for values in self.lesion.values.values() for value in values])


def lesion_classes(label_names: Mapping[str, int | Sequence[int]], lesion: Sequence[str] | None) -> LabelClasses | None:
    """Those classes of ``data.label_names`` that are lesions; None, which counts every label, where none are named.

    Raises:
        LdmError: a name that is not there.
    """
    names = list(label_names) if lesion is None else list(lesion)
    for name in names:
        if name not in label_names:
            raise LdmError(
                f"lesion: data.label_names has no class '{name}'.{nearest(name, label_names)} Legal: "
                f"{', '.join(label_names) or 'none; leave it null to count every label'}."
            )
    return LabelClasses.from_config({name: label_names[name] for name in names}) if names else None


def load_case(record: Record, preprocessing: Preprocessing, truth: Truth) -> Case:
    """Read a record's images, and its mask where it has one, onto the model's grid.

    Raises:
        LdmError: naming the file or record: unreadable, channels that are not the model's, a mask of another shape.
    """
    wanted = preprocessing.channels
    if set(wanted) <= set(record.images):  # in the model's order, and without those it is not made of
        record = replace(record, images={name: record.images[name] for name in wanted})
    image, geometry = preprocessing.load(record)
    mask = None if record.labels is None else truth.mask(preprocessing.load_labels(record))
    return Case(record, image, geometry, mask, truth.diseased(record))


def gather(records: Iterable[Record], read: Callable[[Record], T]) -> list[T]:
    """What ``read`` makes of every record, in their order.

    Raises:
        LdmError: the faults of all records at once, by their names.
    """
    found, faults = [], []
    for record in records:
        try:
            found.append(read(record))
        except LdmError as error:
            faults.append(f"'{record.id}': {error}")
    if len(faults) == 1:
        raise LdmError(faults[0])
    if faults:
        raise LdmError(f"{len(faults)} of {len(found) + len(faults)} images cannot be used:\n" + "\n".join(faults))
    return found


def unit_of(patients_known: bool) -> str:
    """What intervals and shares are over: patients or, with a warning, images."""
    if patients_known:
        return PATIENT
    logger.warning(
        "It is not known whose images these are, so each counts as a patient of its own: where several are of one, "
        "intervals are too narrow, and a share of the images puts one patient on both sides. Give a table with a "
        "column '%s' (of a cohort: data.subject, with data.subjects_linked=true).",
        SUBJECT,
    )
    return IMAGE


def folder_records(
    folder: Path,
    preprocessing: Preprocessing,
    target: Covariate,
    healthy: str,
    masks: Path | None = None,
    table: Path | None = None,
    out: Path | None = None,
    volumes: bool = False,
) -> list[Record]:
    """Records of the images in a folder: ``NAME.nii.gz`` of one channel, ``NAME_CHANNEL.nii.gz`` of several.

    Args:
        folder: searched with all folders below it; files of other names are left alone.
        preprocessing: of the model: channels, and 2-D or 3-D.
        target: the covariate that says healthy or diseased.
        healthy: its level that means healthy.
        masks: folder of ``NAME.nii.gz``, perhaps with an ending of `MASK_ENDINGS`.
        table: ``participant_id`` (NAME), perhaps a column of the target's name, perhaps ``subject``. Without it a case
            is diseased if its mask has a lesion, and a subject of its own.
        out: of results; where it lies below one of the folders, what is in it are no images and no masks.
        volumes: whether a model of 2-D images is given volumes, of which slices are cut.

    Raises:
        LdmError: no image, a volume for a model of 2-D images, a case without one of the sequences, a case without
            mask, or one that the table lacks.
    """
    files = _channel_files(folder, preprocessing, out)
    if preprocessing.spatial_dims == 2 and not volumes:
        _expect_no_volumes(folder, [path for channels in files.values() for path in channels.values()])
    names = sorted(files)
    labels = {} if masks is None else _mask_files(masks, names, out)
    rows = {} if table is None else _rows(table, names)
    records = []
    for name in names:
        row = rows.get(name, {})
        value = row.get(target.name)
        images = {channel: str(files[name][channel]) for channel in files[name]}
        mask = str(labels[name]) if name in labels else None
        lesion = mask is not None and bool(preprocessing.read_labels(mask).any())
        if value is None and mask is not None:
            value = _diseased(target, healthy) if lesion else healthy
        if value is not None and target.levels[target.level_index(value)] == healthy and lesion:
            raise LdmError(f"{table}: '{name}' is healthy by its {target.name}, but {mask} has a lesion; mend one.")
        records.append(Record(name, row.get(SUBJECT) or name, images, mask, {target.name: value}, "test", str(folder)))
        if mask is not None:
            preprocessing.load_labels(records[-1])  # refuses one of another shape before anything is computed
    return records


def _expect_no_volumes(folder: Path, files: Sequence[Path]) -> None:
    volumes = [path for path in files if is_volume(str(path))]
    if volumes:
        raise LdmError(
            f"images={folder}: {volumes[0].name} is a volume, as {len(volumes)} of {len(files)} files there are, and "
            f"this model is of 2-D images. {REMEDY}."
        )


def _diseased(target: Covariate, healthy: str) -> str:
    return next(level for level in target.levels if level != healthy)


def _channel_files(folder: Path, preprocessing: Preprocessing, out: Path | None) -> dict[str, dict[str, Path]]:
    """Case name -> channel -> file."""
    one_file = len(preprocessing.channels) == 1 or preprocessing.is_rgb
    found: dict[str, dict[str, Path]] = {}
    for path in _images(folder, preprocessing.spatial_dims, out):
        stem = _stem(path)
        matches = [name for name in preprocessing.channels if stem.casefold().endswith(f"_{name}".casefold())]
        if one_file:
            name, channel = stem, "image" if preprocessing.is_rgb else preprocessing.channels[0]
        elif matches:
            channel = max(matches, key=len)
            name = stem[: -len(channel) - 1]
        else:
            continue
        if channel in found.setdefault(name, {}):
            raise LdmError(f"images={folder}: {found[name][channel]} and {path} are both '{channel}' of '{name}'.")
        found[name][channel] = path
    if not found:
        form = "NAME" if one_file else f"NAME_{{{','.join(preprocessing.channels)}}}"
        raise LdmError(f"images={folder}: no image there is called {form} and a suffix of {', '.join(SUFFIXES)}.")
    if not one_file:
        for name, channels in found.items():
            missing = [channel for channel in preprocessing.channels if channel not in channels]
            if missing:
                raise LdmError(
                    f"images={folder}: '{name}' has no {missing[0]} (no {name}_{missing[0]}.* beside "
                    f"{next(iter(channels.values())).name}); the model needs {', '.join(preprocessing.channels)}."
                )
    return {name: {c: channels[c] for c in _order(preprocessing, channels)} for name, channels in found.items()}


def _order(preprocessing: Preprocessing, channels: Mapping[str, Path]) -> list[str]:
    return sorted(
        channels, key=lambda name: preprocessing.channels.index(name) if name in preprocessing.channels else 0
    )


def _images(folder: Path, spatial_dims: int, out: Path | None) -> list[Path]:
    if not folder.is_dir():
        raise LdmError(f"There is no folder {folder}.")
    legal = NIFTI_SUFFIXES if spatial_dims == 3 else tuple(s for s in SUFFIXES if s != ".npz")
    return [path for path in _files_below(folder, out) if path.name.lower().endswith(legal) and path.name[0] != "."]


def _files_below(folder: Path, out: Path | None) -> list[Path]:
    """Sorted files of a folder and all folders below it, but for ``out``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    results = None if out is None else out.resolve()
    if results is None or folder.resolve() not in results.parents:
        return files
    return [path for path in files if results not in path.resolve().parents]


def _stem(path: Path) -> str:
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem


def _mask_files(folder: Path, names: Sequence[str], out: Path | None) -> dict[str, Path]:
    if not folder.is_dir():
        raise LdmError(f"There is no folder masks={folder}.")
    stems: dict[str, Path] = {}
    for path in _files_below(folder, out):
        if path.name.lower().endswith(SUFFIXES):
            if _stem(path) in stems:
                raise LdmError(f"masks={folder}: {stems[_stem(path)]} and {path} have one name; leave one of them out.")
            stems[_stem(path)] = path
    found = {}
    for name in names:
        mine = [stems[name + ending] for ending in MASK_ENDINGS if name + ending in stems]
        if len(mine) != 1:
            what = f"{len(mine)} masks ({', '.join(str(path) for path in mine)})" if mine else "no mask"
            raise LdmError(
                f"masks={folder}: '{name}' has {what}; every case needs one, empty where it is healthy, called "
                f"{name}.nii.gz or with an ending such as {name}{MASK_ENDINGS[1]}."
            )
        found[name] = mine[0]
    return found


def _rows(table: Path, names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    content = read_table(table)
    if ID not in content.columns:
        raise LdmError(f"{table} has no column '{ID}'.{nearest(ID, content.columns)}")
    rows = {}
    for row in content.rows:
        if row[ID] in rows:
            raise LdmError(f"{table}: '{row[ID]}' has two rows; leave one of them out.")
        rows[row[ID]] = row
    for name in names:
        if name not in rows:
            raise LdmError(f"{table}: has no row for '{name}'.{nearest(name, [row for row in rows if row])}")
    return rows
