"""Files that appear whole or not at all, whenever the process is stopped and whoever else writes them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from ldm.errors import LdmError


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A mapping in a JSON file.

    Args:
        path: the file.
        what: it should be, for the message.

    Raises:
        LdmError: it cannot be read, or holds no mapping.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LdmError(f"{path} cannot be read as {what} ({error}); remove it, or make it again.") from error
    if not isinstance(content, dict):
        raise LdmError(f"{path} holds no {what}; remove it, or make it again.")
    return content


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file and, where it is missing, its folder; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file as UTF-8; returns the path."""
    return write_bytes(path, text.encode())


def write_json(path: Path, content: Any, indent: int | None = 1) -> Path:
    """Write JSON-safe content, readable or, with ``indent`` None, compact; returns the path."""
    return write_text(path, json.dumps(content, indent=indent))


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays, compressed, to an ``.npz`` file; returns the path."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return write_bytes(path, content.getvalue())
