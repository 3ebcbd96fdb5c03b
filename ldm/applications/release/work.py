"""The work: sample what is missing, seal what is whole, finish what is sealed; the same for one worker or many.

What is known to be done is on disk alone. A micro-batch is done when its receipt is there, which is written after its
volumes; a shard when its ``SHA256SUMS`` is, written after every volume was read again; the release when the root's is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel as nib
import numpy as np
import torch

from ldm import __version__
from ldm.applications.release import documents
from ldm.applications.release.claims import Claims
from ldm.applications.release.files import (
    SUMS,
    as_json,
    file_sha256,
    gzipped,
    read_sums,
    sha256,
    sums,
    write_whole,
)
from ldm.applications.release.plan import (
    Plan,
    check_volume_count,
    environment,
    environment_id,
    planned_count,
    settle,
)
from ldm.applications.release.shards import WORK, Shard, Volume, json_or
from ldm.errors import LdmError
from ldm.model.output import sample_name
from ldm.model.provenance import RELEASE

logger = logging.getLogger(__name__)

SESSIONS = "sessions"
POLL = 1.0  # seconds between looks at what others are still at


@dataclass
class Session:
    """What one worker did, and how long it took.

    Attributes:
        started: date and time, UTC.
        volumes: that this worker sampled.
        seconds: from start to end, without loading the model.
        network_seconds: of them, sampling and decoding.
        writing_seconds: of all writing threads together, beside the sampling.
        environment: name of where it ran, as in ``provenance.json``.
        complete: whether the release was complete at the end.
    """

    started: str
    environment: str
    volumes: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0
    writing_seconds: float = 0.0
    complete: bool = False

    @property
    def volumes_per_hour(self) -> float:
        """Over the whole session."""
        return 3600 * self.volumes / max(self.seconds, 1e-9)

    @property
    def share_outside_network(self) -> float:
        """Of the session's time."""
        return 1 - self.network_seconds / max(self.seconds, 1e-9)


class Release:
    """One worker of a release; run as many as there are devices, with the same arguments.

    Args:
        plan: what is released.
        n: volumes.
        out: folder of the release.
        worker: ``auto`` to claim micro-batches; ``k/count``, k from 0, for every count-th micro-batch; ``slurm`` for
            the latter from the numbers of an array job.
        encoders: threads that compress and write while the network samples.
        stale_after: seconds without a sign of life after which another worker's claim is taken over.
        other_hardware: go on although the release was started on other hardware or packages.
        progress: called with the number of volumes that are found to be done, of ``n`` in all.

    Raises:
        LdmError: ``out`` holds another release; illegal numbers.
    """

    def __init__(
        self,
        plan: Plan,
        n: int,
        out: Path,
        worker: str = "auto",
        encoders: int = 2,
        stale_after: float = 300.0,
        other_hardware: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        for name, value in (("encoders", encoders), ("stale_after", stale_after)):
            if value < 1:
                raise LdmError(f"{name} is {value}; legal: 1 or more.")
        self.plan, self.n, self.out = plan, check_volume_count(n), Path(out)
        self.worker, self.encoders = worker_share(worker), encoders
        self.scratch = self.out / WORK / "tmp"
        self.claims = Claims(self.out / WORK / "claims", stale_after)
        self.other_hardware, self.progress = other_hardware, progress or (lambda count: None)
        self.facts = environment(plan.model.device, plan.precision)
        self.environment = environment_id(self.facts)
        self.session = Session(datetime.now(UTC).isoformat(timespec="seconds"), self.environment)
        starts = range(0, n, plan.shard_size)
        self.shards = [Shard(k, s, min(s + plan.shard_size, n), self.out) for k, s in enumerate(starts)]
        self._counted: set[int] = set()  # numbers of volumes that were reported to progress
        self._sealed: set[int] = set()
        self._writing: deque[Future[tuple[list[int], float]]] = deque()

    def run(self) -> Session:
        """Work until the release is complete, or, with a share of the micro-batches, until these are done."""
        began = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        settle(self.out, self.plan, self.n, self.scratch, self.other_hardware)
        with self.claims, deterministic(), ThreadPoolExecutor(self.encoders) as pool:
            if self.is_complete():
                self._verify()
            if not self.is_complete():
                self._write(self.out / WORK / "environments" / f"{self.environment}.json", as_json(self.facts))
                self._work(pool)
            self.session.seconds = time.perf_counter() - began
            self.session.complete = self._all_sealed()
            if self.session.complete:
                self._finish()
        if self.session.volumes:
            name = f"{self.session.started.replace(':', '-').removesuffix('+00-00')}_{uuid4().hex[:8]}.json"
            write_whole(self.out / SESSIONS / name, as_json(self._report()))
        return self.session

    def is_complete(self) -> bool:
        """Whether everything was written, for this number of volumes."""
        listed = read_sums(self.out / SUMS)
        return listed is not None and listed.get(RELEASE) == file_sha256(self.out / RELEASE)

    # --- sampling ------------------------------------------------------------------------------------

    def _work(self, pool: ThreadPoolExecutor) -> None:
        """Go through the shards until all are sealed; twice with a share of the batches, to seal what others did."""
        for round_ in itertools.count() if self.worker is None else range(2):
            if round_ > 1:
                time.sleep(POLL)  # what is left is claimed by others, who finish it or fall silent
            for shard in self.shards:
                if not self._is_sealed(shard):
                    self._work_on(shard, pool)
            if self._all_sealed():
                return

    def _is_sealed(self, shard: Shard) -> bool:
        if shard.number not in self._sealed:
            if not shard.is_sealed():
                return False
            self._sealed.add(shard.number)
            self._count(range(shard.start, shard.stop))
        return True

    def _all_sealed(self) -> bool:
        return all(self._is_sealed(shard) for shard in self.shards)

    def _work_on(self, shard: Shard, pool: ThreadPoolExecutor) -> None:
        known = shard.known()
        for batch in shard.batches(self.plan.batch_size):
            wanted = [index for index in batch if index < shard.stop]
            if self._all_there(shard, known, wanted):
                self._count(wanted)
            elif self._is_mine(shard, batch) and self.claims.take(shard.claim(batch)):
                known |= {row["file"]: row for row in json_or(shard.receipt(batch), [])}
                if self._all_there(shard, known, wanted) or shard.is_sealed():  # somebody finished it a moment ago
                    self.claims.release(shard.claim(batch))
                    self._count(wanted)
                else:
                    self._sample(shard, batch, pool)
        self._wait(0)
        self._seal(shard)

    def _is_mine(self, shard: Shard, batch: range) -> bool:
        if self.worker is None:
            return True
        k, count = self.worker
        per_shard = -(-self.plan.shard_size // self.plan.batch_size)
        return (shard.number * per_shard + (batch.start - shard.start) // self.plan.batch_size) % count == k

    def _all_there(self, shard: Shard, known: Mapping[str, Volume], wanted: Sequence[int]) -> bool:
        return all(shard.has(known, file) for index in wanted for file in self._files(index))

    def _files(self, index: int) -> list[str]:
        """Names of a volume's files in its shard, one a channel."""
        who = sample_name(index)
        return [f"{who}/anat/{who}_{suffix}.nii.gz" for suffix in self.plan.suffixes.values()]

    def _sample(self, shard: Shard, batch: range, pool: ThreadPoolExecutor) -> None:
        """Sample a whole micro-batch, those beyond the shard's end too, as bits depend on the shape of a batch."""
        self._wait(self.encoders)  # no more images in memory than are being written
        plan, began = self.plan, time.perf_counter()
        rows = [plan.conditions.at(index) for index in batch]
        options = dict(plan.options or {})
        made = next(
            plan.model.sample_batches(rows, batch, plan.seed, plan.batch_size, self.facts["precision"], **options)
        )
        self.session.network_seconds += time.perf_counter() - began
        self._writing.append(pool.submit(self._write_batch, shard, batch, made.images))

    def _wait(self, left: int) -> None:
        """Wait until at most ``left`` micro-batches are being written; an error of theirs is raised here."""
        while len(self._writing) > left:
            indices, seconds = self._writing.popleft().result()
            self.session.writing_seconds += seconds
            self.session.volumes += len(indices)
            self._count(indices)

    def _write_batch(self, shard: Shard, batch: range, images: np.ndarray) -> tuple[list[int], float]:
        """In a thread: write volumes, then their receipt, then give the claim back; returns numbers and seconds."""
        began, volumes = time.perf_counter(), []
        wanted = [index for index in batch if index < shard.stop]
        for index, image in zip(wanted, images, strict=False):
            volumes += self._write_volume(shard, index, image)
        self._write(shard.receipt(batch), as_json(volumes))
        self.claims.release(shard.claim(batch))
        return wanted, time.perf_counter() - began

    def _write_volume(self, shard: Shard, index: int, image: np.ndarray) -> list[Volume]:
        """Write an image ``(C, *S)`` in the cohort's space, a file a channel; returns its rows of provenance."""
        if not np.isfinite(image).all():
            raise LdmError(f"Volume {index} (seed {self.plan.seed}) is not finite: NaN is not released.")
        rows = []
        for file, channel in zip(self._files(index), image, strict=True):
            data = gzipped(as_nifti(self.plan, channel[None]))
            digest = sha256(data)
            self._write(shard.folder / file, data)
            row = (sample_name(index), index, self.plan.seed, file, len(data), digest, self.environment)
            rows.append(dict(zip(documents.COLUMNS, row, strict=True)))
        return rows

    def _write(self, path: Path, data: bytes) -> None:
        if file_sha256(path) != sha256(data):  # what is there and right is left alone
            write_whole(path, data, self.scratch)

    def _count(self, indices: Sequence[int]) -> None:
        new = set(indices) - self._counted
        self._counted |= new
        if new:
            self.progress(len(new))

    # --- sealing -------------------------------------------------------------------------------------

    def _seal(self, shard: Shard) -> None:
        """Read every volume of a shard again and write its tables and checksums, once it is whole."""
        known = shard.known()
        files = [file for index in range(shard.start, shard.stop) for file in self._files(index)]
        claim = f"seal-{shard.name}"
        if not all(shard.has(known, file) for file in files) or not self.claims.take(claim):
            return
        try:
            if not shard.is_sealed() and self._is_sound(shard.folder, {file: known[file]["sha256"] for file in files}):
                self._write_tables(shard, [known[file] for file in files])
        finally:
            self.claims.release(claim)

    def _is_sound(self, folder: Path, digests: Mapping[str, str]) -> bool:
        """Whether files have their checksums; one that has not is removed, which makes it one to be made."""
        damaged = [file for file, digest in digests.items() if file_sha256(folder / file) != digest]
        for file in damaged:
            logger.warning("%s is damaged and is made again.", folder / file)
            (folder / file).unlink(missing_ok=True)
        return not damaged

    def _write_tables(self, shard: Shard, volumes: Sequence[Volume]) -> None:
        (shard.folder / SUMS).unlink(missing_ok=True)
        contents = documents.shard_documents(self.plan, shard.number, volumes)
        for name, content in contents.items():
            self._write(shard.folder / name, content)
        digests = {name: sha256(content) for name, content in contents.items()}
        digests |= {volume["file"]: volume["sha256"] for volume in volumes}
        self._write(shard.folder / SUMS, sums(digests))
        shutil.rmtree(shard.receipts, ignore_errors=True)
        self._sealed.add(shard.number)

    # --- the whole -----------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Check every file of a complete release; what is damaged is removed, and so made again."""
        if not self.claims.take("verify"):
            logger.warning("%s is complete, and another process is verifying it.", self.out)
            return
        root = read_sums(self.out / SUMS) or {}
        root.pop(RELEASE, None)  # it had its checksum a moment ago; who makes the release grow may write it now
        sound = bool(root) and self._is_sound(self.out, root)
        for shard in self.shards:
            digests = read_sums(shard.folder / SUMS) or {}
            if not digests or not self._is_sound(shard.folder, digests):
                self._keep_known(shard, digests)
                (shard.folder / SUMS).unlink(missing_ok=True)
                sound = False
            else:
                self._sealed.add(shard.number)
                self._count(range(shard.start, shard.stop))
        if not sound:
            (self.out / SUMS).unlink(missing_ok=True)
        self.claims.release("verify")

    def _keep_known(self, shard: Shard, digests: Mapping[str, str]) -> None:
        """Leave a receipt of the volumes of a shard whose table is gone, so that these need not be made again.

        Where volumes of several environments are in the release, only the table knew which was made where.
        """
        made = list(self._environments())
        if (shard.folder / documents.VOLUMES).is_file() or len(made) > 1:
            return
        rows = []
        for index in range(shard.start, shard.stop):
            for file in (file for file in self._files(index) if file in digests and (shard.folder / file).is_file()):
                size = (shard.folder / file).stat().st_size
                row = (sample_name(index), index, self.plan.seed, file, size, digests[file], made[0])
                rows.append(dict(zip(documents.COLUMNS, row, strict=True)))
        self._write(shard.receipts / "kept.json", as_json(rows))

    def _finish(self) -> None:
        """Write what describes the whole release, its checksums last, and remove what only the work needed."""
        while not self.is_complete():
            if planned_count(self.out) != self.n:  # it grew meanwhile: whoever made it grow finishes it
                return
            if self.claims.take("finish"):
                self._write_root()
            else:
                time.sleep(POLL)
        shutil.rmtree(self.out / WORK, ignore_errors=True)

    def _write_root(self) -> None:
        shards = [self._manifest(shard) for shard in self.shards]
        contents = documents.root_documents(self.plan, self.n, shards, self._environments())
        for name, content in contents.items():
            self._write(self.out / name, content)
        digests = {name: sha256(content) for name, content in contents.items()}
        digests |= {RELEASE: file_sha256(self.out / RELEASE)}
        digests |= {f"{shard['shard']}/{SUMS}": shard["sha256"] for shard in shards}
        self._write(self.out / SUMS, sums(digests))

    def _manifest(self, shard: Shard) -> dict[str, Any]:
        return {
            "shard": shard.name,
            "first": sample_name(shard.start),
            "last": sample_name(shard.stop - 1),
            "volumes": shard.stop - shard.start,
            "sha256": file_sha256(shard.folder / SUMS),
        }

    def _environments(self) -> dict[str, Any]:
        """Where volumes were made: as workers left it, and, of a release that grew, as it was known before.

        Where that is lost, because ``provenance.json`` was damaged, ``release.json`` still has where it was begun.
        """
        begun = json_or(self.out / RELEASE, {}).get("environment", {})
        before = json_or(self.out / "provenance.json", {}).get("environments", {environment_id(begun): begun})
        folder = self.out / WORK / "environments"
        return before | {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    def _report(self) -> dict[str, Any]:
        rates = {
            "volumes_per_hour": self.session.volumes_per_hour,
            "share_outside_network": self.session.share_outside_network,
        }
        return {**asdict(self.session), **rates, "encoders": self.encoders, "version": __version__}


def as_nifti(plan: Plan, channel: np.ndarray) -> bytes:
    """The bytes of an uncompressed NIfTI file of one channel ``(1, D, H, W)``, in the cohort's space."""
    image: nib.Nifti1Image = plan.model.preprocessing.restore(channel)
    image.header["descrip"] = f"ldm {__version__} synthetic image".encode()
    return image.to_bytes()


def worker_share(worker: str) -> tuple[int, int] | None:
    """``(k, count)`` of ``k/count`` or of a Slurm array's task; None for ``auto``.

    Raises:
        LdmError: it is neither, or not in an array job.
    """
    if worker == "auto":
        return None
    if worker == "slurm":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise LdmError(
                f"worker=slurm, but {missing[0]} is not set: this is no task of an array job (sbatch --array)."
            )
        task, first, count = (int(os.environ[name]) for name in names)
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1))
        return (task - first) // step, count
    k, slash, count = str(worker).partition("/")
    if not (slash and k.isdecimal() and count.isdecimal() and int(k) < int(count)):
        raise LdmError(f"worker is '{worker}'; legal: auto, slurm, or k/count with k from 0 to count - 1, such as 0/4.")
    return int(k), int(count)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within it, cuDNN takes the same algorithm each time."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
