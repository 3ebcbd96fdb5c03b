"""Which source code runs."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path


@functools.cache
def source_commit() -> str | None:
    """Commit of the working copy that this package runs from, with ``-dirty`` when files differ from it.

    It is asked for once, when a command starts, so that a later commit to the working copy is not taken for it.

    Returns:
        None for an installed package, or without git.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
