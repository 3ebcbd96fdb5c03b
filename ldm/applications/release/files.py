"""Bytes on disk: whole or not there, and the same for the same content."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

SUMS = "SHA256SUMS"
COMPRESSION = "zlib, level 1"
_LEVEL = 1  # float voxels hold noise in their low bits, which no level makes smaller
_CHUNK = 1 << 20
_DIGEST = re.compile("[0-9a-f]{64}")
# RFC 1952, section 2.3: magic, deflate, no flags (so no file name), time 0, no hint, unknown system
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


def gzipped(data: bytes) -> bytes:
    """A gzip member that depends on ``data`` and on the zlib library alone: no time, name or system in it."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = compressor.compress(data) + compressor.flush()
    return _GZIP_HEADER + body + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def as_json(content: Any) -> bytes:
    """JSON as it is written everywhere in a release; NaN is an error."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def as_tsv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A tab-separated table with a header line; None is ``n/a``."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def cell(value: Any) -> str:
    """A value as text that gives the same value again; whole numbers go without a point."""
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def sha256(data: bytes) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str | None:
    """SHA-256 of a file, read piece by piece; None where there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def write_whole(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write a file that, after any crash, is whole or not there: temporary file, fsync, rename.

    Args:
        path: the file; its folder is made.
        data: what it holds.
        scratch: folder of the same file system for the temporary file; None for the file's own.
    """
    scratch = scratch or path.parent
    for folder in (path.parent, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f".{uuid4().hex}.tmp"
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sums(digests: Mapping[str, str]) -> bytes:
    """The content of a ``SHA256SUMS`` file, which ``sha256sum --check`` reads: file -> digest, in order of names."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def read_sums(path: Path) -> dict[str, str] | None:
    """Invert :func:`sums`; None where there is no such file, or one that is damaged."""
    try:
        pairs = [line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    whole = all(_DIGEST.fullmatch(digest) and name for digest, _, name in pairs)
    return {name: digest for digest, _, name in pairs} if whole else None


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a table that :func:`as_tsv` wrote; none where there is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    except FileNotFoundError:
        return []
