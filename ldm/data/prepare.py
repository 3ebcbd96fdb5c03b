"""Fetch a public data set and write the table that its archive lacks.

Used when ``data.download=true`` and the data are not there yet. The downloads are MONAI's, with MONAI's
checksums; the licences are those of the data sets (see the cards in ``data/<name>/README.md``).
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ldm.data import images
from ldm.errors import LdmError, nearest
from ldm.files import write_text

logger = logging.getLogger(__name__)

HIPPOCAMPUS_LABELS = {"anterior_mm3": 1, "posterior_mm3": 2}
MEDNIST_PER_CLASS = 1000
MEDNIST_FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def prepare(name: str, root: Path, table: str | None) -> None:
    """Fetch the data set ``name`` into ``root``, and write its table.

    Args:
        name: the cohort's name, as in ``conf/data/<name>.yaml``.
        root: folder to fill.
        table: file name of the table below ``root``; ``None`` for the set's usual name.

    Raises:
        LdmError: if this set cannot be fetched, or the download fails.
    """
    if name not in PREPARERS:
        raise LdmError(
            f"data.download: '{name}' cannot be fetched.{nearest(name, PREPARERS)} "
            f"Can be fetched: {', '.join(PREPARERS)}; see data/{name}/README.md for where it is to be had"
        )
    action, usual = PREPARERS[name]
    action(root, root / (table or usual))


def hint(name: str | None) -> str:
    """Return what to do when a data set's folder is missing, as the end of a message."""
    if name in PREPARERS:
        return f" Set data.root, or data.download=true to fetch it (data/{name}/README.md has the licence)"
    return " Set data.root to the folder that holds the files"


def hippocampus(root: Path, table: Path) -> None:
    """MSD Task04 Hippocampus: download through MONAI, and write ``table`` by counting label voxels."""
    from monai.apps import DecathlonDataset

    task = "Task04_Hippocampus"
    if not ((root / "imagesTr").is_dir() and (root / "labelsTr").is_dir()):
        _download(DecathlonDataset.resource[task], DecathlonDataset.md5[task], ".tar", task, root)
    hippocampus_table(root, table)


def hippocampus_table(root: Path, table: Path) -> None:
    """Write id, dimensions and label volumes in mm3 of every image in ``imagesTr`` that has labels."""
    rows = []
    for path in sorted((root / "labelsTr").glob("hippocampus_*.nii.gz")):
        labels = images.read(path)
        voxel = abs(np.linalg.det(labels.affine[:3, :3]))
        volumes = [round(float(np.sum(labels.array == value) * voxel), 1) for value in HIPPOCAMPUS_LABELS.values()]
        rows.append((path.name.removesuffix(".nii.gz"), *volumes, *labels.array.shape[1:]))
    if not rows:
        raise LdmError(f"{root / 'labelsTr'}: holds no hippocampus_*.nii.gz; the archive is not MSD Task04")
    write_table(table, ("participant_id", *HIPPOCAMPUS_LABELS, "dim_x", "dim_y", "dim_z"), rows)


def mednist(root: Path, table: Path) -> None:
    """MedNIST: download through MONAI into ``images64/<class>``, and write ``table`` of a split subset."""
    from monai.apps import MedNISTDataset

    folder = root / "images64"
    if not any(folder.glob("*/*.jpeg")):
        _download(MedNISTDataset.resource, MedNISTDataset.md5, ".tar.gz", MedNISTDataset.dataset_folder_name, folder)
    mednist_table(folder, table)


def mednist_table(folder: Path, table: Path, per_class: int = MEDNIST_PER_CLASS, seed: int = 0) -> None:
    """Write file, class, label and split of ``per_class`` images a class, without copies.

    Args:
        folder: holds ``<class>/*.jpeg``.
        table: file to write.
        per_class: images drawn of each class.
        seed: of the draw.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    rows, seen = [], set()
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*.jpeg"))
        random.Random(f"{seed}-{name}").shuffle(files)
        chosen = list(_without_copies(files, seen, per_class))
        valid, test = (round(MEDNIST_FRACTIONS[split] * len(chosen)) for split in ("valid", "test"))
        splits = ["valid"] * valid + ["test"] * test + ["train"] * (len(chosen) - valid - test)
        rows += [(f"{name}/{path.name}", name, label, split) for path, split in zip(chosen, splits, strict=True)]
    if not rows:
        raise LdmError(f"{folder}: holds no <class>/*.jpeg; the archive is not MedNIST")
    write_table(table, ("file", "class", "label", "split"), sorted(rows))


def mednist48(root: Path, table: Path) -> None:
    """The 48 x 48 set in one ``mednist48_lecture.npz``: write its table, one row an array row."""
    archive = root / "mednist48_lecture.npz"
    if not archive.is_file():
        raise LdmError(f"{archive}: no such file; data/mednist48_lecture/README.md says how to get it")
    rows = []
    with np.load(archive, allow_pickle=False) as arrays:
        names = arrays["class_names"]
        for split in ("train", "valid", "test"):
            pairs = zip(arrays[f"{split}_files"], arrays[f"{split}_labels"], strict=True)
            rows += [(index, split, names[label], file) for index, (file, label) in enumerate(pairs)]
    write_table(table, ("index", "split", "class", "file"), rows)


PREPARERS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "msd_hippocampus": (hippocampus, "participants.tsv"),
    "mednist": (mednist, "mednist64_1000pc.csv"),
    "mednist48_lecture": (mednist48, "mednist48_lecture.tsv"),
}


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a ``.tsv`` or ``.csv`` table; the file appears whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _download(url: str, md5: str, suffix: str, member: str, target: Path) -> None:
    """Download an archive and move what its folder ``member`` holds into ``target``, which may exist."""
    from monai.apps import download_url, extractall

    target.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s to %s", url, target)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
        try:
            archive = Path(folder) / f"archive{suffix}"
            # Not MONAI's download_and_extract: without a network it raises a bare Exception.
            download_url(url, archive, hash_val=md5, hash_type="md5")
            extractall(archive, folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise LdmError(
                f"{url}: download failed ({error}). Fetch it by hand on a machine that has access, and "
                f"unpack the archive's folder '{member}' to {target}"
            ) from error
        for entry in (Path(folder) / member).iterdir():
            shutil.move(entry, target / entry.name)


def _without_copies(files: Iterable[Path], seen: set[str], limit: int) -> Iterable[Path]:
    """Yield up to ``limit`` files whose bytes were not seen before."""
    count = 0
    for path in files:
        if count == limit:
            return
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            count += 1
            yield path
