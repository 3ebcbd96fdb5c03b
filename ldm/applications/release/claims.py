"""Who works on what, by files in a shared folder.

A claim is a file that only one process can create. It is abandoned when its process is known to be dead (on the same
machine), or when nobody has touched it for a while: a living worker touches its claims all the time. Two workers that
hold the same claim, because one of them was stopped for long, do work twice and nothing worse.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

BEATS = 5  # how often a claim is touched in the time after which it counts as abandoned


class Claims:
    """Claims of one worker; a context manager, which keeps them alive.

    Args:
        folder: of the claims; made when the first is taken.
        stale_after: seconds without a sign of life after which a claim is abandoned.
    """

    def __init__(self, folder: Path, stale_after: float = 300.0) -> None:
        self.folder, self.stale_after = Path(folder), stale_after
        self._held: set[str] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._clock = self.folder / f".now-{uuid4().hex}"

    def __enter__(self) -> Claims:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        for name in list(self._held):
            self.release(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Whether ``name`` is this worker's now."""
        path = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            _create(path, json.dumps({"machine": machine(), "pid": os.getpid(), "born": born(os.getpid())}))
        except FileExistsError:
            return self._bury(path) and self.take(name)
        except FileNotFoundError:  # another worker, who had completed everything, removed the folder just now
            return self.take(name)
        with self._lock:
            self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give ``name`` back."""
        with self._lock:
            self._held.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    def _bury(self, path: Path) -> bool:
        """Put an abandoned claim away; of several workers who try, one can rename it."""
        if not self._abandoned(path):
            return False
        grave = path.with_name(f".dead-{uuid4().hex}")
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return False
        grave.unlink(missing_ok=True)
        return True

    def _abandoned(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
            owner = _json_of(path)
            if owner.get("machine") == machine() and born(owner["pid"]) != owner["born"]:
                return True
            return self._now() - touched > self.stale_after
        except FileNotFoundError:  # given back, or the whole folder is gone
            return False

    def _now(self) -> float:
        """Time by the clock that stamps the claims, which may be a file server's."""
        self._clock.touch()
        return self._clock.stat().st_mtime

    def _beat(self) -> None:
        while not self._end.wait(self.stale_after / BEATS):
            with self._lock:
                for name in self._held:
                    with contextlib.suppress(OSError):
                        os.utime(self.folder / name)


def _create(path: Path, text: str) -> None:
    """Make a file that is not there, whole from the start where the file system has hard links.

    Raises:
        FileExistsError: it is there.
    """
    draft = path.with_name(f".draft-{uuid4().hex}")
    draft.write_text(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        with open(path, "x") as file:
            file.write(text)
    finally:
        draft.unlink(missing_ok=True)


def _json_of(path: Path) -> dict[str, Any]:
    """What a claim says; nothing for one whose worker has not come to write it, or was killed before."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return {}


@functools.cache
def machine() -> str:
    """What has to agree for a process number to mean the same process: machine, boot, namespace of processes."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def born(pid: int) -> str | None:
    """When a process started, so that its number, given away again, is not taken for it; None for none.

    Without /proc every process is taken to be alive, and claims are abandoned by their age alone.
    """
    if not Path("/proc/self/stat").exists():
        return "unknown"
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state == "Z" else fields[18]  # a zombie is dead; field 22 of proc(5) is the start time
