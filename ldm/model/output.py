"""Samples as files: images in the cohort's space, a participants table, a picture, the provenance."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldm.data import images
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.files import write_json, write_text
from ldm.model.generative import Generative
from ldm.model.inputs import Inputs
from ldm.model.provenance import RELEASE, read_provenance, settle_request

logger = logging.getLogger(__name__)

TABLE = "participants.tsv"
Drawn = Iterator[tuple[np.ndarray, Sequence[int]]]  # images (B, C, *S) and their numbers, a few at a time


def write_samples(
    model: Generative,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    seed: int,
    provenance: Mapping[str, Any],
    batch_size: int = 4,
    precision: str = "auto",
    options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    inputs: Inputs | None = None,
) -> list[Path]:
    """Draw one sample a row and write it; existing files of the same request are kept.

    Writes ``sub-000001.nii.gz`` (2-D: ``.png``; several channels: ``sub-000001_NAME.nii.gz``, but one RGB picture for
    a cohort of RGB pictures), ``participants.tsv`` with what was asked, ``participants.json`` with units, and
    ``provenance.json``. An image is written under a temporary name first, so a file that is there is whole; the same
    call goes on where it was stopped.

    Args:
        model: what samples.
        out: folder; made if it is not there.
        rows: covariates asked for, one row a sample.
        seed, batch_size, precision: see :meth:`Generative.sample_batches`.
        provenance: what the samples depend on; a folder with another provenance is refused.
        options: sampling options that differ from the model's defaults.
        progress: called with the number of finished samples.
        inputs: label maps, images and texts, one a sample.

    Returns:
        Path of the first channel of every sample.

    Raises:
        LdmError: ``out`` holds results of another request.
    """
    inputs = dict(inputs or {})

    def draw(todo: Sequence[int]) -> Drawn:
        asked = {name: [values[index] for index in todo] for name, values in inputs.items()}
        some = [rows[index] for index in todo]
        for batch in model.sample_batches(some, todo, seed, batch_size, precision, asked, **dict(options or {})):
            yield batch.images, batch.indices

    def write(image: np.ndarray, paths: Sequence[Path]) -> None:
        write_image(model, image, paths)

    return write_request(model, out, rows, seed, provenance, draw, write, progress, inputs)


def write_request(
    model: Generative,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    seed: int,
    provenance: Mapping[str, Any],
    draw: Callable[[Sequence[int]], Drawn],
    write: Callable[[np.ndarray, Sequence[Path]], None],
    progress: Callable[[int], None] | None = None,
    inputs: Inputs | None = None,
) -> list[Path]:
    """Write what a folder lacks of a request: images, table and provenance, as :func:`write_samples` says.

    Args:
        model, out, rows, seed, provenance, progress: see :func:`write_samples`.
        draw: the images with these numbers, a few at a time.
        write: an image ``(C, *S)`` to its files.
        inputs: what else an image was given, one value each; columns of the table.

    Returns:
        Path of the first channel of every image.

    Raises:
        LdmError: ``out`` holds results of another request.
    """
    out, inputs = Path(out), dict(inputs or {})
    out.mkdir(parents=True, exist_ok=True)
    names = [sample_name(index) for index in range(len(rows))]
    asked = {"seed": seed, "rows": [dict(row) for row in rows], **({"inputs": inputs} if inputs else {})}
    beyond = {name: model.schema.out_of_range(row) for name, row in zip(names, rows, strict=True)}
    remarks = {"extrapolated": {name: found for name, found in beyond.items() if found}} if any(beyond.values()) else {}
    settle_request(out, {**provenance, **asked}, "sub-*", remarks)
    paths = [image_paths(model, out, name) for name in names]
    todo = [index for index in range(len(rows)) if not all(path.is_file() for path in paths[index])]
    if progress is not None and len(todo) < len(rows):
        progress(len(rows) - len(todo))
    for batch, indices in draw(todo):
        for image, index in zip(batch, indices, strict=True):
            write(image, paths[index])
        if progress is not None:
            progress(len(batch))
    write_table(model, out, names, rows, inputs)
    return [path[0] for path in paths]


def sample_name(index: int) -> str:
    """Name of sample ``index``, counted from 0."""
    return f"sub-{index + 1:06d}"


def image_paths(model: Generative, out: Path, name: str) -> list[Path]:
    """Files of one sample: one a channel, or one RGB picture."""
    return [out / f"{name}{end}" for end in file_ends(model.preprocessing)]


def file_ends(preprocessing: Preprocessing, folder: Path | None = None) -> list[str]:
    """How the names of a sample's files end: one a channel, or one RGB picture.

    Args:
        preprocessing: of the images.
        folder: where they lie; one of ``ldm release`` has its own, BIDS suffixes.

    Raises:
        LdmError: a release of other channels.
    """
    suffix = ".nii.gz" if preprocessing.spatial_dims == 3 else ".png"
    if folder is not None and (folder / RELEASE).is_file():
        bids = read_provenance(folder).get("suffixes", {})
        missing = [channel for channel in preprocessing.channels if channel not in bids]
        if missing:
            raise LdmError(
                f"{folder} is a release of {', '.join(bids) or 'no known channels'}; {', '.join(missing)} is not in it."
            )
        return [f"_{bids[channel]}{suffix}" for channel in preprocessing.channels]
    if len(preprocessing.channels) == 1 or preprocessing.is_rgb:
        return [suffix]
    return [f"_{channel}{suffix}" for channel in preprocessing.channels]


def grouped(files: Iterable[Path], ends: Sequence[str]) -> list[list[Path]]:
    """The files of each image, one for each of ``ends`` and in their order; files that end otherwise are left out.

    Raises:
        LdmError: naming a file that is missing beside the others of its image.
    """
    files, images = set(files), {}
    for file in sorted(files):
        end = max((end for end in ends if file.name.endswith(end)), key=len, default=None)
        if end is not None:
            stem = file.name.removesuffix(end)
            images[file.parent / stem] = [file.with_name(stem + other) for other in ends]
    for group in images.values():
        missing = [file for file in group if file not in files]
        if missing:
            there = next(file for file in group if file in files)
            raise LdmError(f"{missing[0]} is missing beside {there}: an image has a file for each of its channels.")
    return [images[stem] for stem in sorted(images)]


def write_image(model: Generative, image: np.ndarray, paths: Sequence[Path]) -> None:
    """Write an image ``(C, *S)`` in the cohort's space, its channels shared out to the files, each atomically."""
    for path, channels in zip(paths, np.split(image, len(paths)), strict=True):
        images.write(path, model.preprocessing.restore(channels))


def in_model_space(preprocessing: Preprocessing, array: np.ndarray) -> np.ndarray:
    """What the files of a sample hold, on the model's grid and in its range.

    Args:
        preprocessing: the model's.
        array: ``(C, *file)``, all channels together.

    Returns:
        ``(C, *S)``.
    """
    if preprocessing.spatial_dims == 2:
        low, high = preprocessing.shown_range
        array = array / 255 * (high - low) + low
    else:
        array = preprocessing.intensity.again(array)
    return preprocessing.reference.forward(array, fill=preprocessing.intensity.background(array))  # (C, *S)


def as_written(preprocessing: Preprocessing, image: np.ndarray) -> np.ndarray:
    """An image ``(C, *S)`` as it would come back from its files: pictures have 8 bits, and a grid may be resampled."""
    channels = [preprocessing.restore(channel[None]) for channel in image]
    arrays = [np.asarray(one.dataobj if isinstance(one, nib.Nifti1Image) else one, np.float32) for one in channels]
    return in_model_space(preprocessing, np.stack(arrays))


def write_table(
    model: Generative,
    out: Path,
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    inputs: Inputs | None = None,
) -> None:
    """Write ``participants.tsv`` (what was asked; n/a where nothing was) and ``participants.json`` (units)."""
    rows = [{**row, **{name: values[i] for name, values in (inputs or {}).items()}} for i, row in enumerate(rows)]
    columns = [*model.schema.names, *(inputs or {})]
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["participant_id", *columns])
    for name, row in zip(names, rows, strict=True):
        table.writerow([name, *(_cell(row.get(column)) for column in columns)])
    write_text(out / TABLE, text.getvalue())
    about = {covariate.name: _about(covariate) for covariate in model.schema}
    about |= {name: {"Description": f"{name} that the sample was given"} for name in inputs or {}}
    write_json(out / "participants.json", about)


def _about(covariate: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"Description": f"{covariate.name} that the sample was asked to have"}
    if covariate.unit:
        about["Units"] = covariate.unit
    if covariate.levels:
        about["Levels"] = list(covariate.levels)
    return about


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
