"""A shard of a release: which volumes it has, which of them are made, and where that is written down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.applications.release import documents
from ldm.applications.release.files import SUMS, read_tsv

WORK = ".release"  # claims, receipts and temporary files; not there once the release is complete
Volume = dict[str, Any]  # a row of a shard's provenance.tsv


@dataclass(frozen=True)
class Shard:
    """Volumes ``start`` to ``stop - 1``, a BIDS data set in a folder of its own."""

    number: int
    start: int
    stop: int
    out: Path

    @property
    def name(self) -> str:
        return f"shard-{self.number:04d}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def receipts(self) -> Path:
        return self.out / WORK / "receipts" / self.name

    def receipt(self, batch: range) -> Path:
        """Where the rows of a micro-batch's volumes are written, once all of these are there."""
        return self.receipts / f"{batch.start:06d}.json"

    def claim(self, batch: range) -> str:
        """Name of the claim on a micro-batch."""
        return f"{self.name}-{batch.start:06d}"

    def batches(self, size: int) -> Iterator[range]:
        """Numbers of the volumes of every micro-batch; the last one may lead beyond the shard."""
        return (range(start, start + size) for start in range(self.start, self.stop, size))

    def known(self) -> dict[str, Volume]:
        """File -> row of every volume that was made, by receipts and, of a shard that was sealed before, its table."""
        paths = sorted(self.receipts.glob("*.json"))
        receipts = {row["file"]: row for path in paths for row in json_or(path, [])}
        # The table is read last: who seals the shard meanwhile writes it before the receipts go.
        table = [_typed(row) for row in read_tsv(self.folder / documents.VOLUMES)]
        return {row["file"]: row for row in table if row is not None} | receipts

    def is_sealed(self) -> bool:
        """Whether it is whole, with as many volumes as it is to have."""
        if not (self.folder / SUMS).is_file():
            return False
        table = [_typed(row) for row in read_tsv(self.folder / documents.VOLUMES)]
        return None not in table and len({row["index"] for row in table}) == self.stop - self.start

    def has(self, known: Mapping[str, Volume], file: str) -> bool:
        """Whether a volume is known and lies there with its size; checksums are compared when the shard is sealed."""
        try:
            return file in known and (self.folder / file).stat().st_size == known[file]["bytes"]
        except FileNotFoundError:
            return False


def json_or(path: Path, default: Any) -> Any:
    """What a JSON file holds, or ``default`` where there is none, or one that is damaged or of another kind."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return default
    return content if isinstance(content, type(default)) else default


def _typed(row: Mapping[str, str]) -> Volume | None:
    """A row of a table of volumes; None for one that is damaged."""
    if set(row) != set(documents.COLUMNS) or None in row.values():
        return None
    try:
        return {**row, **{name: int(row[name]) for name in ("index", "seed", "bytes")}}
    except ValueError:
        return None
