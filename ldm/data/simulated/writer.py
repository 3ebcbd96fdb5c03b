"""Write the simulated cohort to disk in the manner of BIDS; atomic, resumable, deterministic by seed."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np

from ldm.data.simulated import slices as slicing
from ldm.data.simulated.anatomy import Grid
from ldm.data.simulated.render import FIELD_OF_VIEW_MM, LABELS, LESION_LABELS, Atlas, Rendered, output_grid, render
from ldm.data.simulated.sequences import SEQUENCES
from ldm.errors import LdmError, nearest
from ldm.files import write_bytes

VERSION = 1  # of the simulation: raised whenever the same parameters would give other images
EXTRAS_VERSION = 2  # the same for what only cohorts with lesions, further sequences or slices have
MANIFEST = "simulated.json"
COLUMNS = {
    "age": {"Description": "Simulated age", "Units": "years"},
    "sex": {"Description": "Simulated sex", "Levels": {"F": "female", "M": "male"}},
    "ventricles_mm3": {
        "Description": "True volume of the lateral and third ventricles of this simulated brain, "
        "integrated over its warped tissue map",
        "Units": "mm3",
    },
    "brain_mm3": {
        "Description": "True volume of grey and white matter of this simulated brain, integrated over "
        "its warped tissue maps",
        "Units": "mm3",
    },
}
LESION_COLUMNS = {
    "diseased": {
        "Description": "Whether the subject has a tumour",
        "Levels": {"healthy": "no tumour", "diseased": "a tumour"},
    },
    "lesion_mm3": {
        "Description": "True volume of the whole tumour: necrotic core, enhancing rim, oedema",
        "Units": "mm3",
    },
    **{
        f"{part}_mm3": {
            "Description": f"True volume of this part of the tumour: {part.replace('_', ' ')}",
            "Units": "mm3",
        }
        for part in LESION_LABELS
    },
}
SLICE_COLUMNS = {
    "axial": {"Description": "Number of the axial slice, counted from below from 0"},
    "z_mm": {"Description": "Height of the slice in the image's world space", "Units": "mm"},
}
SLICE_LESION_COLUMNS = {
    "diseased": {
        "Description": "Whether the labels of this slice hold a tumour",
        "Levels": {"healthy": "no tumour in the slice", "diseased": "a tumour in the slice"},
    },
    "lesion_mm2": {"Description": "Area that the labels of this slice give to the tumour", "Units": "mm2"},
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parameters:
    """Everything that determines the files of a cohort."""

    n: int
    spacing_mm: float
    seed: int
    shape: tuple[int, int, int]
    sequences: tuple[str, ...] = ("T1",)
    lesions: float | None = None
    slices: int = 0
    version: int = VERSION

    def to_dict(self) -> dict:
        """What the manifest holds; a plain cohort's says nothing of extras."""
        plain = Parameters(self.n, self.spacing_mm, self.seed, self.shape)
        entries = asdict(self) | {"shape": list(self.shape), "sequences": list(self.sequences)}
        if self == plain:
            return {key: value for key, value in entries.items() if key not in ("sequences", "lesions", "slices")}
        return entries | {"extras_version": EXTRAS_VERSION}

    @property
    def columns(self) -> dict[str, dict]:
        """Columns of participants.tsv with their descriptions."""
        return COLUMNS | (LESION_COLUMNS if self.lesions is not None else {})

    @property
    def slice_columns(self) -> dict[str, dict]:
        """Columns of slices.tsv with their descriptions; a slice's own `diseased` takes the place of its subject's."""
        return self.columns | SLICE_COLUMNS | (SLICE_LESION_COLUMNS if self.lesions is not None else {})

    @property
    def grid(self) -> Grid:
        return output_grid(self.spacing_mm, self.shape)


def generate(
    root: Path,
    n: int = 400,
    spacing_mm: float = 4.0,
    seed: int = 0,
    shape: tuple[int, int, int] | None = None,
    workers: int = 2,
    progress: bool = True,
    sequences: Sequence[str] = ("T1",),
    lesions: float | None = None,
    slices: int = 0,
) -> Path:
    """Write a simulated cohort of `n` brains, `spacing_mm` apart, into the folder `root` and return it.

    Subject k of a seed is the same brain whatever `n`, and has the same true covariates whatever the spacing. A
    killed call is completed by the next one with the same parameters; a complete cohort is left as it is.
    `shape` defaults to the smallest multiples of 8 that hold every brain; `workers` are processes (1: this one).

    `sequences` are names in `sequences.SEQUENCES`, T1 among them. `lesions` is the probability (0 to 1) of a subject to
    have a tumour; None: nobody has, and the tables do not speak of it. `slices` is a number of axial slices a subject,
    through the tumour or, in healthy subjects, where one could have been: they are listed in slices.tsv, one a row.
    None of this changes the anatomy of healthy subjects, their labels or their T1 images.

    Raises LdmError for impossible parameters, for a folder that holds a cohort made with other parameters, and for
    a folder that holds something else.
    """
    root = Path(root)
    parameters = _checked(n, spacing_mm, seed, shape, workers, sequences, lesions, slices)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        if _is_complete(root, parameters):
            log.debug("The simulated cohort in %s is complete", root)
            return root
        _write_description(root, parameters)
        missing = [k for k in range(n) if not _sidecar(root, k).exists()]
        _make(root, parameters, missing, workers, progress)
        _write_tables(root, parameters)
        _write_json(root / MANIFEST, parameters.to_dict() | {"complete": True})
    return root


def _checked(
    n: int,
    spacing_mm: float,
    seed: int,
    shape: tuple[int, int, int] | None,
    workers: int,
    sequences: Sequence[str],
    lesions: float | None,
    slices: int,
) -> Parameters:
    if not 1 <= n <= 9999:
        raise LdmError(f"simulated cohort: n = {n}, but it must be between 1 and 9999 subjects.")
    if not 0.5 <= spacing_mm <= 8:
        raise LdmError(f"simulated cohort: spacing_mm = {spacing_mm}, but it must be between 0.5 and 8 mm.")
    if seed < 0 or workers < 1:
        raise LdmError(
            f"simulated cohort: seed = {seed} and workers = {workers}, but seed must be at least 0 and "
            "workers at least 1."
        )
    least = tuple(int(np.ceil(f / spacing_mm - 1e-9)) for f in FIELD_OF_VIEW_MM)
    if shape is not None and (len(shape) != 3 or any(s < m for s, m in zip(shape, least, strict=True))):
        raise LdmError(
            f"simulated cohort: shape = {tuple(shape)} would cut brains at {spacing_mm} mm; it needs at "
            f"least {least} voxels. Leave shape out to get the smallest multiples of 8 that fit."
        )
    _check_extras(sequences, lesions, slices)
    grid = output_grid(float(spacing_mm), None if shape is None else tuple(int(s) for s in shape))
    share = None if lesions is None else float(lesions)
    return Parameters(int(n), float(spacing_mm), int(seed), grid.shape, tuple(sequences), share, int(slices))


def _check_extras(sequences: Sequence[str], lesions: float | None, slices: int) -> None:
    for name in sequences:
        if name not in SEQUENCES:
            raise LdmError(
                f"simulated cohort: there is no sequence '{name}'.{nearest(name, SEQUENCES)} "
                f"Legal: {', '.join(SEQUENCES)}."
            )
    if "T1" not in sequences or len(set(sequences)) < len(sequences):
        raise LdmError(f"simulated cohort: sequences = {list(sequences)}, but it must name T1, and none twice.")
    if lesions is not None and not 0 <= lesions <= 1:
        raise LdmError(
            f"simulated cohort: lesions = {lesions}, but it is the share of diseased subjects, 0 to 1, or null."
        )
    if not 0 <= slices <= slicing.MOST:
        raise LdmError(f"simulated cohort: slices = {slices}, but it must be between 0 and {slicing.MOST} a subject.")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time write into `root`; the lock goes with the process, however it ends."""
    path = root / ".lock"
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_complete(root: Path, parameters: Parameters) -> bool:
    """Whether `root` holds this very cohort complete; raises LdmError if it holds anything else."""
    manifest = root / MANIFEST
    if not manifest.exists():
        if others := sorted(p.name for p in root.iterdir() if not p.name.startswith(".")):
            raise LdmError(
                f"{root} is not a simulated cohort but holds other files ({', '.join(others[:3])}); "
                "choose an empty folder."
            )
        _write_json(manifest, parameters.to_dict() | {"complete": False})
        return False
    try:
        stored = json.loads(manifest.read_text())
        complete = stored.pop("complete")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise LdmError(
            f"{manifest} is not a manifest of a simulated cohort ({error!r}); delete the folder and generate it again."
        ) from error
    wanted = parameters.to_dict()
    if stored != wanted:
        changed = ", ".join(
            f"{key} = {stored.get(key)!r} (asked for {wanted.get(key)!r})"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key)
        )
        raise LdmError(f"{root} holds a simulated cohort made with {changed}; choose another folder or delete it.")
    return bool(complete)


def _make(root: Path, parameters: Parameters, indices: list[int], workers: int, progress: bool) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not indices:
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("Preparing the template", total=None)
        atlas = Atlas.build(parameters.spacing_mm)
        bar.update(task, description="Simulating brains", total=len(indices))
        for _ in _render_all(atlas, root, parameters, indices, workers):
            bar.advance(task)


def _render_all(atlas: Atlas, root: Path, parameters: Parameters, indices: list[int], workers: int) -> Iterator[None]:
    workers = min(workers, len(indices))
    if workers == 1:
        for index in indices:
            yield _write_subject(atlas, root, parameters, index)
        return
    # Fresh processes: forking one that has started threads (PyTorch, OpenMP, the progress bar) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (atlas, root, parameters)) as pool:
        futures = [pool.submit(_work, index) for index in indices]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: tuple[Atlas, Path, Parameters] | None = None  # what a worker process was started with


def _start_worker(*arguments) -> None:
    global _worker
    _worker = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool, and idle workers would wait for it for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(index: int) -> None:
    _write_subject(*_worker, index)


def _name(index: int) -> str:
    return f"sub-{index + 1:04d}"


def _sidecar(root: Path, index: int) -> Path:
    return root / _name(index) / "anat" / f"{_name(index)}_T1w.json"


def _write_subject(atlas: Atlas, root: Path, parameters: Parameters, index: int) -> None:
    """Write one subject; its sidecar comes last and so says that the rest is there."""
    # Slices lie where a tumour is or could be, which is drawn together with tumours.
    share = 0.0 if parameters.lesions is None and parameters.slices else parameters.lesions
    subject = render(atlas, parameters.grid, parameters.seed, index, parameters.sequences, share)
    sidecar = _sidecar(root, index)
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    affine = parameters.grid.affine
    _write_nifti(sidecar.with_name(f"{_name(index)}_dseg.nii.gz"), subject.labels, affine, "simulated labels")
    for name, image in subject.images.items():
        suffix = SEQUENCES[name].suffix
        path = sidecar.with_name(f"{_name(index)}_{suffix}.nii.gz")
        _write_nifti(path, image, affine, f"simulated {suffix} brain")
    _write_json(sidecar, _facts(parameters, index, subject))


def _facts(parameters: Parameters, index: int, subject: Rendered) -> dict:
    """What the sidecar of a subject holds: its row of participants.tsv, and its rows of slices.tsv."""
    facts = {
        "Simulated": True,
        "SkullStripped": True,
        "age": subject.age,
        "sex": subject.sex,
        "ventricles_mm3": round(subject.ventricles_mm3, 1),
        "brain_mm3": round(subject.brain_mm3, 1),
    }
    if parameters.lesions is not None:
        facts["diseased"] = "diseased" if subject.diseased else "healthy"
        facts["lesion_mm3"] = round(sum(subject.lesion_mm3.values()), 1)
        facts |= {f"{part}_mm3": round(volume, 1) for part, volume in subject.lesion_mm3.items()}
    if parameters.slices:
        facts["slices"] = slicing.rows(subject, parameters.grid, parameters.seed, index, parameters.slices)
    return facts


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, description: str) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, code="mni")
    image.set_sform(affine, code="mni")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))  # no time stamp: same bytes every time


def _write_description(root: Path, parameters: Parameters) -> None:
    from ldm import __version__

    _write_json(
        root / "dataset_description.json",
        {
            "Name": "Simulated brains (not real subjects)",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [
                {
                    "Name": "ldm.data.simulated",
                    "Version": __version__,
                    "Description": "Random smooth deformations of the ICBM 152 (2009a) average brain",
                }
            ],
            "Simulation": parameters.to_dict(),
        },
    )
    _write_json(root / "participants.json", parameters.columns)
    if parameters.slices:
        _write_json(root / "slices.json", parameters.slice_columns)
    labels = LABELS if parameters.lesions is None else LABELS + LESION_LABELS
    names = "".join(f"{index}\t{name}\n" for index, name in enumerate(labels))
    write_bytes(root / "dseg.tsv", f"index\tname\n{names}".encode())


def _write_tables(root: Path, parameters: Parameters) -> None:
    facts = {_name(k): json.loads(_sidecar(root, k).read_text()) for k in range(parameters.n)}
    _write_table(root / "participants.tsv", parameters.columns, facts.items())
    if parameters.slices:
        rows = [(name, entry | one) for name, entry in facts.items() for one in entry["slices"]]
        _write_table(root / "slices.tsv", parameters.slice_columns, rows)


def _write_table(path: Path, columns: Iterable[str], rows: Iterable[tuple[str, dict]]) -> None:
    """Write rows of (participant, facts), these `columns` of the facts."""
    columns = tuple(columns)
    lines = ["\t".join(["participant_id", *columns])]
    lines += ["\t".join([name, *(str(facts[column]) for column in columns)]) for name, facts in rows]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _write_json(path: Path, content: dict) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
