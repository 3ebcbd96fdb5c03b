"""What a folder of results was asked for, so that the same command goes on and another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.files import read_json, write_json
from ldm.model.file import package_versions

PROVENANCE = "provenance.json"
RELEASE = "release.json"  # the same of a folder of `ldm release`
WRITTEN = "written"  # when and by which versions, which may change from one session of a request to the next
REMARKS = "remarks"  # what follows from the request, in words
CHANGEABLE = "changeable"  # what only decides results that every session writes anew


def read_provenance(folder: Path) -> dict[str, Any]:
    """What ``ldm sample`` or ``ldm release`` left beside its images; empty for other folders."""
    known = [folder / name for name in (PROVENANCE, RELEASE) if (folder / name).is_file()]
    return read_json(known[0], "what is known of the images") if known else {}


def drawn_otherwise(measured: Any, asked: Mapping[str, Any]) -> str | None:
    """In words how images that were measured were drawn otherwise than others; None where they were not.

    Args:
        measured: the sampling options that stand beside the measurement; None where none do.
        asked: those of the others.
    """
    if not isinstance(measured, Mapping):
        return "it does not say how they were"
    asked = json.loads(json.dumps(asked))
    names = [name for name in asked if measured.get(name) != asked[name]]
    return "; ".join(f"{name} {measured.get(name)} there, {asked[name]} here" for name in names) or None


def settle_request(
    folder: Path,
    request: Mapping[str, Any],
    results: str | None = None,
    remarks: Mapping[str, Any] | None = None,
    changeable: Mapping[str, Any] | None = None,
) -> None:
    """Write ``provenance.json``, or refuse a folder that holds the results of another request.

    Args:
        folder: made if it is not there.
        request: what the results depend on, JSON-safe.
        results: pattern of the result files; a request that left none binds nobody. None: it always binds.
        remarks: written beside the request, and no part of it.
        changeable: settings of results that are written anew whatever is there; beside the request, no part of it.

    Raises:
        LdmError: naming what differs.
    """
    path = folder / PROVENANCE
    request = json.loads(json.dumps(request, sort_keys=True, default=dict))
    if path.is_file() and (results is None or any(folder.glob(results))):
        stored = json.loads(path.read_text())
        stored = {name: value for name, value in stored.items() if name not in (WRITTEN, REMARKS, CHANGEABLE)}
        differing = [name for name in sorted({*stored, *request}) if stored.get(name) != request.get(name)]
        if differing:
            raise LdmError(
                f"{folder} holds results of another request ({', '.join(differing)} differ). Choose another folder "
                "(out=... or run_dir=...), or remove this one."
            )
    written = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": package_versions()}
    beside = {name: dict(of) for name, of in ((REMARKS, remarks), (CHANGEABLE, changeable)) if of}
    write_json(path, {**request, **beside, WRITTEN: written})
