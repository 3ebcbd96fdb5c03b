"""Detections of slices as volumes: maps, healthy counterparts and lesions, put back onto the grid of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.applications.anomaly import DetectionOptions, image_scores
from ldm.applications.cases import Truth
from ldm.applications.detection import STORED, Found, look_again, map_of
from ldm.applications.detection_output import TABLE, counterpart_endings, restore_lesion, restore_map, write_scores
from ldm.applications.slicing import FOLDER, named_stacks
from ldm.data import images
from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.data.stacks import Cut, put_back
from ldm.data.stored import split_reference
from ldm.files import write_json

ABOUT = "scores.json"  # what the columns of the table are


def stack_detections(
    out: Path,
    records: Sequence[Record],
    preprocessing: Preprocessing,
    truth: Truth,
    options: DetectionOptions,
    threshold: float | None = None,
) -> Path:
    """Write what was found in slices as NIfTI files beside them, one set for every volume that they were cut from.

    ``stacked/NAME_anomaly.nii.gz``, ``NAME_healthy.nii.gz`` (of several channels ``NAME_healthy_CHANNEL``) and, with a
    threshold, ``NAME_lesion.nii.gz``, in the space of the volume. In slices that were not looked at, map and lesion are
    0 and the counterpart is the image. It is in the image's own units: the model's range is percentiles, or a mean and
    deviation, of each slice, so that it differs from one slice to the next. In a slice that was looked at, what the
    model's grid does not hold is background, as of images.

    ``stacked/scores.tsv`` has a row a volume, ``scores.json`` says what its columns are. The score is that of an image,
    `ldm.applications.anomaly.image_scores`: mean, 99th percentile or maximum of the map on the model's grid, over all
    slices that were looked at together.

    Args:
        out: what :func:`ldm.applications.detection.look_at` was told to write below.
        records: slices of NIfTI files, each looked at.
        preprocessing: of the model.
        truth: how the records say what is healthy.
        options: of maps and scores.
        threshold: of the map, above which there is a lesion.

    Returns:
        The table.
    """
    rows = []
    for name, (cut, stack) in named_stacks(records).items():
        parts, maps = {}, {}
        for index, record in stack.items():
            found = look_again(record, preprocessing, truth, out / STORED)
            maps[index] = map_of(found, options)  # (H, W) on the model's grid
            parts[index] = _in_file_space(found, maps[index], preprocessing, threshold)
        _write_stack(out / FOLDER, name, cut, next(iter(stack.values())), parts, preprocessing)
        if threshold is None:
            (out / FOLDER / f"{name}_lesion.nii.gz").unlink(missing_ok=True)  # of a threshold that there was before
        rows.append(_row(name, next(iter(stack.values())), maps, options, truth, threshold))
    write_json(out / FOLDER / ABOUT, about(options, truth))
    return write_scores(out / FOLDER / TABLE, rows)


def _in_file_space(
    found: Found, anomaly: np.ndarray, preprocessing: Preprocessing, threshold: float | None
) -> dict[str, np.ndarray]:
    """Ending of a file's name -> ``(C, H, W)`` of a slice, at full resolution."""
    case = found.case
    parts = {"anomaly": restore_map(preprocessing, anomaly, case)[None]}
    if threshold is not None:
        parts["lesion"] = restore_lesion(preprocessing, anomaly, case, threshold)[None]
    endings = counterpart_endings(preprocessing)
    recipe = preprocessing.intensity
    of_files = np.split(found.healthy, len(endings))  # (C, *S) each
    for ending, ref, healthy in zip(endings, case.record.images.values(), of_files, strict=True):
        restored = case.geometry.undo(healthy, fill=recipe.background(healthy))  # (C, H, W)
        stored = images.read(ref, spatial_dims=2).array
        parts[ending] = np.stack([recipe.undo(*pair, ref) for pair in zip(restored, stored, strict=True)])
    return parts


def _write_stack(
    folder: Path,
    name: str,
    cut: Cut,
    record: Record,
    parts: Mapping[int, Mapping[str, np.ndarray]],
    preprocessing: Preprocessing,
) -> None:
    """Write a volume's files: counterparts on the grid of the file that they are of, the others on that of the first.

    Args:
        folder, name: where to.
        cut: of one of the slices.
        record: of one of the slices.
        parts: number of the slice -> what :func:`_in_file_space` gives.
        preprocessing: of the model.
    """
    paths = [split_reference(ref)[0] for ref in record.images.values()]
    counterparts = dict(zip(counterpart_endings(preprocessing), paths, strict=True))
    for part in next(iter(parts.values())):
        slices = {index: of_slice[part] for index, of_slice in parts.items()}
        path = counterparts.get(part, cut.path)
        fill = images.read(path).array if part in counterparts else 0
        volume = put_back(path, cut.plane, slices, fill, labels=part == "lesion")
        images.write(folder / f"{name}_{part}.nii.gz", volume)


def _row(
    name: str,
    record: Record,
    maps: Mapping[int, np.ndarray],
    options: DetectionOptions,
    truth: Truth,
    threshold: float | None,
) -> dict[str, Any]:
    """A row of the table, of maps ``(H, W)`` by number of the slice."""
    together = np.stack(list(maps.values()))  # (N, H, W)
    scores = image_scores(together, options)  # (N,)
    row = {
        "participant_id": name,
        "subject": record.subject,
        "score": float(image_scores(together[None], options)[0]),
        "highest_slice": list(maps)[int(scores.argmax())],
        "highest_score": float(scores.max()),
        "slices": len(maps),
        truth.target.name: record.covariates.get(truth.target.name),
    }
    return row if threshold is None else row | {"lesion_voxels": int((together > threshold).sum())}


def about(options: DetectionOptions, truth: Truth) -> dict[str, dict[str, str]]:
    """What the columns of the table of volumes are."""
    score = {"mean": "Mean", "p99": "99th percentile", "max": "Maximum"}[options.score]
    columns = {
        "participant_id": "Name of the volume",
        "subject": "Whose volume it is",
        "score": f"{score} of the anomaly map, on the model's grid, over all slices that were looked at together; "
        "larger is less healthy",
        "highest_slice": "Number of the slice with the highest score, counted from 0 as FILE::axial[NUMBER] does: from "
        "left, posterior, inferior",
        "highest_score": f"Score of that slice: {score.lower()} of its map",
        "slices": "How many slices were looked at",
        truth.target.name: "What the table that was given says",
        "lesion_voxels": "Voxels of these slices above the threshold, on the model's grid; only with a threshold",
    }
    return {name: {"Description": text} for name, text in columns.items()}
