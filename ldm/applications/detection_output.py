"""Maps, healthy counterparts and scores as files, in the space of the images they are of."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldm.applications.cases import Case
from ldm.data import images
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.files import write_text

TABLE = "scores.tsv"


def write_case(
    folder: Path,
    case: Case,
    preprocessing: Preprocessing,
    counterpart: np.ndarray,
    anomaly: np.ndarray,
    threshold: float | None = None,
) -> None:
    """Write ``NAME_healthy``, ``NAME_anomaly`` and, with a threshold, ``NAME_lesion``, on the input's own grid.

    Volumes are NIfTI; of pictures the counterpart is PNG, the map ``.npy`` (float32, which PNG cannot hold), the lesion
    PNG with 1 for a lesion. Several channels of a counterpart are files of their own, ``NAME_healthy_CHANNEL``.

    Args:
        folder: where to.
        case: whose.
        preprocessing: of the model.
        counterpart: ``(C, *S)``.
        anomaly: ``(*S)``, in units of the model's intensity range.
        threshold: of the map, above which there is a lesion.
    """
    name, is_volume = case.record.id, preprocessing.spatial_dims == 3
    suffix = ".nii.gz" if is_volume else ".png"
    endings = counterpart_endings(preprocessing)
    for ending, part in zip(endings, np.split(counterpart, len(endings)), strict=True):
        images.write(folder / f"{name}_{ending}{suffix}", preprocessing.restore(part, case.geometry))
    map_path = folder / f"{name}_anomaly{'.nii.gz' if is_volume else '.npy'}"
    images.write(map_path, restore_map(preprocessing, anomaly, case))
    lesion_path = folder / f"{name}_lesion{suffix}"
    if threshold is None:
        lesion_path.unlink(missing_ok=True)  # of a threshold that there was before
    else:
        images.write(lesion_path, restore_lesion(preprocessing, anomaly, case, threshold))


def counterpart_endings(preprocessing: Preprocessing) -> list[str]:
    """What the files of a counterpart end in: one of all channels of a picture, or one a channel."""
    if len(preprocessing.channels) == 1 or preprocessing.is_rgb:
        return ["healthy"]
    return [f"healthy_{channel}" for channel in preprocessing.channels]


def restore_lesion(
    preprocessing: Preprocessing, anomaly: np.ndarray, case: Case, threshold: float
) -> nib.Nifti1Image | np.ndarray:
    """Where a map ``(*S)`` is above the threshold, in the input's space; 2-D: uint8 ``(H, W)``."""
    return preprocessing.restore(anomaly > threshold, case.geometry, labels=True)


def restore_map(preprocessing: Preprocessing, anomaly: np.ndarray, case: Case) -> nib.Nifti1Image | np.ndarray:
    """A map ``(*S)`` in the input's space, in its own units, 0 outside the model's grid; 2-D: float32 ``(H, W)``."""
    anomaly = np.asarray(anomaly, np.float32)[None]  # (1, *S)
    if preprocessing.spatial_dims == 2:
        return case.geometry.undo(anomaly, fill=0.0)[0]
    as_is = replace(preprocessing, intensity=IntensityRecipe())  # a difference has no offset to add
    return as_is.restore(anomaly, case.geometry)


def write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a table, one row an image, atomically; n/a where nothing is known."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    columns = list(rows[0])
    table.writerow(columns)
    for row in rows:
        table.writerow([_cell(row[column]) for column in columns])
    return write_text(path, text.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
