"""The audit of the model, without which nothing is released unless somebody says in words why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.applications.release.conditions import Conditions, asked_otherwise, check_text
from ldm.applications.release.files import sha256
from ldm.errors import LdmError
from ldm.evaluation.audit import AuditSettings
from ldm.evaluation.audit_words import NOT_LINKED
from ldm.metrics.copies import CONFIDENCE
from ldm.model.provenance import drawn_otherwise

LIMIT = 64 << 20  # bytes of such a file
WORDS = 4000  # characters of its statement
GIVE_REASON = "give the reason: 'release_without_audit=\"...\"'"
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
PUBLIC = (  # what does not point to a training scan
    "passed",
    "verdict",
    "statement",
    "lines",
    "model_sha256",
    "n",
    "subjects_linked",
    "differential_privacy",
    "control",
    "any_space",
    "spaces",
    "protocol",
)


def read_audit(
    path: Path | None,
    model_sha256: str,
    reason: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Any]:
    """What a release says about the audit of its model.

    Args:
        path: what ``ldm audit`` wrote; None for none.
        model_sha256: hash of the model's tensors, from its header.
        reason: why a release goes out without a passed audit; None if it does not.
        sampling: all options that the release is drawn with; None where that does not matter.
        conditions: what the release asks for; None where that does not matter.

    Returns:
        ``passed`` (None without an audit), ``statement``, ``sha256`` of the file, ``released_without_audit``; with an
        audit also ``lines`` (all its sentences), ``facts`` (name -> words), ``weak`` (see :func:`weakness`) and
        ``drawn_otherwise`` (in words, or None).

    Raises:
        LdmError: no audit, a failed one, one that is too weak, or one of another model, of images that nobody knows the
            model of, or of images that were drawn or asked otherwise; a reason where none is needed.
    """
    if reason is not None:
        reason = check_text(str(reason), "release_without_audit", WORDS)
        if len(reason.split()) < 3:
            raise LdmError(f"release_without_audit is '{reason}': say in words why, it stands in the model card.")
    if path is None:
        if reason is None:
            raise LdmError(
                "audit=PATH is missing: a release needs the audit.json that `ldm audit` wrote for the same model. "
                f"To release without one, {GIVE_REASON}."
            )
        return {"passed": None, "statement": None, "sha256": None, "released_without_audit": reason}
    content, digest = _read(Path(path), model_sha256)
    differing = _differing(content["protocol"], sampling, conditions)
    record = _record(content, Path(path)) | {"sha256": digest, "drawn_otherwise": differing}
    if reason is None:
        _expect_proof(record, Path(path))
    elif record["passed"] and not differing and not record["weak"]:
        raise LdmError("release_without_audit is set, but the audit passed: leave the reason out.")
    return {**record, "released_without_audit": reason}


def _expect_proof(record: Mapping[str, Any], path: Path) -> None:
    """Refuse an audit that says nothing for this release."""
    if record["drawn_otherwise"]:
        raise LdmError(
            f"audit={path} is of images that were, or may have been, drawn otherwise than this release will be "
            f"({record['drawn_otherwise']}). Run `ldm audit` with the same covariates and sampling settings, or "
            f"{GIVE_REASON}."
        )
    if not record["passed"]:
        raise LdmError(f"audit={path}: the audit of this model failed: {record['statement']}")
    if record["weak"]:
        raise LdmError(
            f"audit={path} passed, but is too weak to release by: {record['weak']}. Run `ldm audit` with its default "
            f"settings, or {GIVE_REASON}."
        )


def _differing(
    protocol: Mapping[str, Any], sampling: Mapping[str, Any] | None, conditions: Conditions | None
) -> str | None:
    """In words how the images of an audit were drawn, or asked for other things, than those of a release."""
    drawn = None if sampling is None else drawn_otherwise(protocol.get("sampling"), sampling)
    asked = None if conditions is None else asked_otherwise(protocol.get("conditions"), conditions)
    return "; ".join(text for text in (drawn, asked) if text) or None


def audit_copy(path: Path | None, model_sha256: str) -> dict[str, Any] | None:
    """What of an ``audit.json`` may be published: no pair of a synthetic image and a training scan, and no path.

    Args:
        path: of the file; None for none.
        model_sha256: hash of the model's tensors, from its header.
    """
    if path is None:
        return None
    content, _ = _read(Path(path), model_sha256)
    public = {name: content[name] for name in PUBLIC if name in content}
    public["protocol"] = {name: value for name, value in public["protocol"].items() if name != "synthetic"}
    return json.loads(json.dumps(public), parse_constant=lambda _: None)  # what is not finite is no JSON for others


def weakness(content: Mapping[str, Any]) -> str | None:
    """In words what an audit lacks of the settings that it has by default; None where it lacks nothing.

    Args:
        content: of ``audit.json``.
    """
    protocol, control, least = content["protocol"], content["control"], AuditSettings()
    rate = max(protocol["rate"], *(space["rate"] for space in content["spaces"].values()))
    planted = min(row["n"] for row in control["kinds"].values())
    alpha, recall = protocol["alpha"], protocol["recall"]
    found = [
        (
            rate > least.rate + 1e-9,
            f"{rate:.1%} of unrelated scans may lie below a threshold, legal: up to {least.rate:.0%}",
        ),
        (alpha < least.alpha, f"alpha is {alpha:g}, legal: {least.alpha:g} or more"),
        (recall < least.recall, f"recall is {recall:g}, legal: {least.recall:g} or more"),
        (planted < least.planted, f"{planted} copies of a kind were planted, legal: {least.planted} or more"),
        (control.get("untold") != [], "it does not say that all planted copies can be told from unrelated scans"),
    ]
    return "; ".join(text for lacks, text in found if lacks) or None


def _record(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a release says of an audit that was read."""
    try:
        record = {
            "passed": content["passed"],
            "statement": " ".join(content["statement"].split()),
            "lines": [" ".join(line.split()) for line in content["lines"]],
            "facts": _facts(content),
            "weak": weakness(content),
        }
    except MALFORMED as error:
        raise LdmError(f"audit={path} is not as `ldm audit` writes it ({error!r}).") from error
    for text in (record["statement"], *record["lines"], *record["facts"].values()):
        check_text(text, f"audit={path}: statement", WORDS)
    return record


def _facts(content: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of an audit for a reader: how many images, which copies it finds, how many may have been missed."""
    n, kinds = content["n"], content["control"]["kinds"]
    found = [f"{kind} {row['recall']:.0%} of {row['n']}" for kind, row in kinds.items()]
    told = [f"{kind} {row['strict_recall']:.0%}" for kind, row in kinds.items() if "strict_recall" in row]
    return {
        "images": f"{n['synthetic']} synthetic; training: {_scans(n['train'])}; held out: {_scans(n['held_out'])}",
        "planted copies that were found": ", ".join(found),
        "planted copies that were told as outright ones": ", ".join(told) or "not known",
        "outright copies": _outright(content["spaces"]),
        "subjects": "scans of one person are known as such" if content["subjects_linked"] else NOT_LINKED,
    }


def _outright(spaces: Mapping[str, Mapping[str, Any]]) -> str:
    """How many synthetic images are outright copies, and how many of many more may be."""
    copies = {name: space["copies"] for name, space in spaces.items() if space["copies"]["usable"]}
    each = [
        f"{one['count']} by {name}, of many images at most {one['share_at_most']:.2%}" for name, one in copies.items()
    ]
    return f"{'; '.join(each)} ({CONFIDENCE:.0%} confidence, rule of three)" if each else "cannot be told in any way"


def _scans(one: Mapping[str, int]) -> str:
    return f"{one['scans']} scans of {one['subjects']} subjects"


def _read(path: Path, model_sha256: str) -> tuple[dict[str, Any], str]:
    """What an audit file holds, and its hash."""
    content, digest = read_record(path, "audit", "ldm audit", model_sha256)
    for key, kind in {"passed": bool, "statement": str, "lines": list, "protocol": dict}.items():
        if not isinstance(content.get(key), kind):
            raise LdmError(f"audit={path}: '{key}' is missing or no {kind.__name__}; it is no audit.json.")
    return content, digest


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
