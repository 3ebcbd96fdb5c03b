"""The audit of the model, without which nothing is released unless somebody says in words why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.applications.release.conditions import check_text
from ldm.applications.release.files import sha256
from ldm.errors import LdmError
from ldm.model.provenance import drawn_otherwise

LIMIT = 64 << 20  # bytes of such a file
WORDS = 4000  # characters of its statement


def read_audit(
    path: Path | None, model_sha256: str, reason: str | None = None, sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a release says about the audit of its model.

    Args:
        path: what ``ldm audit`` wrote: JSON with ``passed``, ``model_sha256`` and ``statement``; None for none.
        model_sha256: hash of the model's tensors, from its header.
        reason: why a release goes out without a passed audit; None if it does not.
        sampling: all options that the release is drawn with; None where that does not matter.

    Returns:
        ``passed`` (None without an audit), ``statement``, ``sha256`` of the file, ``released_without_audit``.

    Raises:
        LdmError: no audit, a failed one, or one of another model, of images that nobody knows the model of, or of
            images that were drawn otherwise; a reason where none is needed.
    """
    if reason is not None:
        reason = check_text(str(reason), "release_without_audit", WORDS)
        if len(reason.split()) < 3:
            raise LdmError(f"release_without_audit is '{reason}': say in words why, it stands in the model card.")
    if path is None:
        if reason is None:
            raise LdmError(
                "audit=PATH is missing: a release needs the audit.json that `ldm audit` wrote for the same model. "
                "To release without one, give the reason: 'release_without_audit=\"...\"'."
            )
        return {"passed": None, "statement": None, "sha256": None, "released_without_audit": reason}
    record, drawn = _read(Path(path), model_sha256)
    differing = None if sampling is None else drawn_otherwise(drawn, sampling)
    if differing and reason is None:
        raise LdmError(
            f"audit={path} is of images that were, or may have been, drawn otherwise than this release will be "
            f"({differing}). Run `ldm audit` with the same sampling settings, or give the reason: "
            "'release_without_audit=\"...\"'."
        )
    if not record["passed"] and reason is None:
        raise LdmError(f"audit={path}: the audit of this model failed: {record['statement']}")
    if record["passed"] and not differing and reason is not None:
        raise LdmError("release_without_audit is set, but the audit passed: leave the reason out.")
    return {**record, "drawn_otherwise": differing, "released_without_audit": reason}


def _read(path: Path, model_sha256: str) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """What is said of an audit, and the sampling options of its images."""
    content, digest = read_record(path, "audit", "ldm audit", model_sha256)
    for key, kind in {"passed": bool, "statement": str}.items():
        if not isinstance(content.get(key), kind):
            raise LdmError(f"audit={path}: '{key}' is missing or no {kind.__name__}; it is no audit.json.")
    statement = check_text(" ".join(content["statement"].split()), f"audit={path}: statement", WORDS)
    drawn = content.get("protocol", {}).get("sampling")
    return {"passed": content["passed"], "statement": statement, "sha256": digest}, drawn


def read_record(path: Path, key: str, verb: str, model_sha256: str) -> tuple[dict[str, Any], str]:
    """A mapping about the model in a JSON file, and the file's hash.

    Args:
        path: of the file.
        key: the setting that names it, for messages.
        verb: that wrote it.
        model_sha256: hash of the model's tensors, from its header.

    Raises:
        LdmError: no such file, not what the verb writes, or not of this model.
    """
    if not path.is_file():
        raise LdmError(f"{key}={path}: there is no such file; `{verb}` writes it.")
    if path.stat().st_size > LIMIT:
        raise LdmError(f"{key}={path} is larger than {LIMIT >> 20} MiB: `{verb}` did not write it.")
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise LdmError(f"{key}={path} is not JSON ({error}).") from error
    found = content.get("model_sha256", "") if isinstance(content, dict) else ""
    if found is None:
        raise LdmError(
            f"{key}={path} does not say which model drew its images: their folder had no provenance.json, so they may "
            f"be of any. Run `{verb}` for this model, or on a folder that `ldm sample` wrote with it."
        )
    if not isinstance(found, str) or not found:
        raise LdmError(f"{key}={path}: 'model_sha256' is missing; `{verb}` did not write it.")
    if found != model_sha256:
        raise LdmError(
            f"{key}={path} is of another model (model_sha256 {found[:16]}, this one is {model_sha256[:16]}). Run "
            f"`{verb}` for this model."
        )
    return content, sha256(data)
