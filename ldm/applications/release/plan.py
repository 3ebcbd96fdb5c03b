"""What fixes every byte of a release, and that a folder holds one release only."""

from __future__ import annotations

import json
import os
import platform
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import monai
import nibabel
import numpy
import torch

from ldm import __version__
from ldm.applications.release.conditions import CELL, Conditions, check_text
from ldm.applications.release.files import COMPRESSION, SUMS, as_json, sha256, write_whole
from ldm.errors import LdmError
from ldm.model.generative import Generative
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.provenance import RELEASE
from ldm.precision import resolve

FORMAT_VERSION = 1
MOST = 999_999  # volumes that six digits can number
# https://bids-specification.readthedocs.io, "Anatomy imaging data": suffixes of single images that models may draw
BIDS_SUFFIXES = ("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "angio", "T1map", "T2map")
_ALIASES = {"t1": "T1w", "t2": "T2w", "pd": "PDw", "mra": "angio", "t2star": "T2starw"}
_SUFFIX = re.compile(r"[A-Za-z0-9]{1,20}")


@dataclass(frozen=True)
class Plan:
    """A release but for its size; with ``n`` it is what ``release.json`` holds.

    Attributes:
        model: that is sampled, on its device.
        conditions: of every volume.
        name: of the data set.
        license: its name or identifier, as the user gives it.
        suffixes: channel -> BIDS suffix, see :func:`bids_suffixes`.
        audit: record of :func:`ldm.applications.release.audit.read_audit`.
        evaluation: record of :func:`ldm.applications.release.evaluation.read_evaluation`; None for none.
        seed: with a volume's number it fixes its noise.
        batch_size: volumes sampled together, always as many: a volume's bits depend on it.
        shard_size: volumes of a shard.
        precision: ``auto``, ``bf16`` or ``float32``.
        options: sampling options that differ from the model's defaults.
        license_text: for the files ``LICENSE``; None for none.
        audit_copy: of :func:`ldm.applications.release.audit.audit_copy`, for the file ``audit.json``; None for none.

    Raises:
        LdmError: a number out of range, an illegal option, a text that is refused, or a model that cannot be released.
    """

    model: LatentDiffusionModel
    conditions: Conditions
    name: str
    license: str
    suffixes: Mapping[str, str]
    audit: Mapping[str, Any]
    seed: int = 0
    batch_size: int = 4
    shard_size: int = 1000
    precision: str = "auto"
    options: Mapping[str, Any] | None = None
    license_text: str | None = None
    evaluation: Mapping[str, Any] | None = None
    audit_copy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for key in ("batch_size", "shard_size"):
            if getattr(self, key) < 1:
                raise LdmError(f"{key} is {getattr(self, key)}; legal: 1 or more.")
        check_text(str(self.name), "name")
        check_text(str(self.license), "license")
        check_model(self.model)
        self._try_conditions()  # an illegal option is found before the first volume

    def _try_conditions(self) -> None:
        """Build what samples a row of each set of names that are given; the model refuses what it never learned."""
        settings = self.model.settings(dict(self.options or {}))
        rows = {tuple(row): row for row in self.conditions.rows}
        self.model.guided_denoise(self.model.encode_condition(list(rows.values())), settings)

    def settings(self) -> dict[str, Any]:
        """All sampling options."""
        return dict(vars(self.model.settings(dict(self.options or {}))))

    def to_dict(self, n: int) -> dict[str, Any]:
        """JSON-safe, for a release of ``n`` volumes."""
        plan = {
            "format_version": FORMAT_VERSION,
            "synthetic": True,
            "name": self.name,
            "license": self.license,
            "license_text_sha256": None if self.license_text is None else sha256(self.license_text.encode()),
            "model_sha256": self.model.header["tensors_sha256"],
            "n": n,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "suffixes": dict(self.suffixes),
            "conditions": {"source": self.conditions.source, "sha256": self.conditions.sha256(n)},
            "sampling": self.settings(),
            "audit": dict(self.audit),
            "evaluation": self.evaluation and dict(self.evaluation),
            "compression": COMPRESSION,
            "environment": environment(self.model.device, self.precision),
        }
        return json.loads(json.dumps(plan, allow_nan=False))


def check_volume_count(n: int) -> int:
    """``n`` if it is a number of volumes that a release may have.

    Raises:
        LdmError: it is not.
    """
    if not isinstance(n, int) or not 1 <= n <= MOST:
        raise LdmError(f"n is {n!r}; legal: 1 to {MOST:,}, as a whole number.")
    return n


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """What else a volume's bits may depend on: packages, hardware, number of threads."""
    on_cpu = device.type == "cpu"
    return {
        "device": _processor() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "precision": resolve(precision, device),
        "ldm": __version__,
        "torch": torch.__version__,
        "monai": monai.__version__,
        "numpy": numpy.__version__,
        "nibabel": nibabel.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def environment_id(facts: Mapping[str, Any]) -> str:
    """A short name of an environment."""
    return sha256(json.dumps(dict(facts), sort_keys=True).encode())[:8]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def bids_suffixes(
    channels: tuple[str, ...], given: str | Mapping[str, str] | None, template: str | None = None
) -> dict[str, str]:
    """The BIDS suffix of every channel.

    Args:
        channels: of the model.
        given: one suffix, or {channel: suffix}; None to take the channels' names.
        template: where the cohort's images lie, such as ``{participant_id}_T1w.nii.gz``, for a channel without a name.

    Raises:
        LdmError: a channel whose name is no suffix, an illegal suffix, or one that two channels share.
    """
    given = {channels[0]: given} if isinstance(given, str) and len(channels) == 1 else (given or {})
    if not isinstance(given, Mapping) or set(given) - set(channels):
        raise LdmError(f"suffix is {given}; write one, or {{channel: suffix}} for the channels {', '.join(channels)}.")
    found = {channel: given.get(channel) or _suffix_of(channel, template) for channel in channels}
    for channel, suffix in found.items():
        if suffix is None:
            raise LdmError(
                f"suffix is missing: channel '{channel}' does not say what it shows. Set 'suffix={{{channel}: ...}}', "
                f"such as {', '.join(BIDS_SUFFIXES[:5])}."
            )
        if not _SUFFIX.fullmatch(suffix):
            raise LdmError(f"suffix: '{suffix}' of channel '{channel}' is not legal; write letters and digits only.")
    if len(set(found.values())) < len(found):
        raise LdmError(f"suffix: two channels share one ({', '.join(f'{c}: {s}' for c, s in found.items())}).")
    return found


def _suffix_of(channel: str, template: str | None) -> str | None:
    names = [channel]
    if channel == "image" and template:  # the one channel of a cohort that names none
        names.append(template.split("::")[0].rsplit("_", 1)[-1].split(".")[0])
    by_name = {suffix.casefold(): suffix for suffix in BIDS_SUFFIXES} | _ALIASES
    return next((by_name[name.casefold()] for name in names if name.casefold() in by_name), None)


def check_model(model: Generative) -> None:
    """Refuse what a release cannot be made of.

    Raises:
        LdmError: it is no diffusion model of images, is 2-D, has no hash, or has covariates with names of columns.
    """
    if not isinstance(model, LatentDiffusionModel) or model.classes is not None:
        what = f"is a {model.what}" if model.classes is None else "generates label maps"
        raise LdmError(f"A release is drawn from a diffusion model of images, and this model {what}: use ldm sample.")
    if model.preprocessing.spatial_dims != 3:
        raise LdmError("A release holds NIfTI volumes, and this model draws 2-D images: use ldm sample.")
    if "tensors_sha256" not in model.header:
        raise LdmError("This model was not loaded from a file, so it has no hash: save and load it.")
    for covariate in model.schema:
        if covariate.name in ("participant_id", "synthetic"):
            raise LdmError(f"covariate '{covariate.name}' has the name of a column that every release has.")
        for text in (covariate.name, covariate.unit, *(covariate.levels or ())):
            if text is not None:
                check_text(text, f"the model's covariate '{covariate.name!r:.{CELL}}'")


# one release a folder --------------------------------------------------------------------------------


def settle(out: Path, plan: Plan, n: int, scratch: Path, other_hardware: bool = False) -> None:
    """Write ``release.json`` if ``out`` has none; else see that it is of the same release, which may grow.

    Raises:
        LdmError: it is another release, naming what differs; or it has more volumes than ``n``.
    """
    path = out / RELEASE
    if not path.is_file():
        _expect_empty(out, scratch)
        _write_once(path, as_json(plan.to_dict(n)), scratch)
    stored = _read(path)
    if n < stored["n"]:
        raise LdmError(f"n is {n}, but the release in {out} has {stored['n']}: it can grow, not shrink.")
    expected = plan.to_dict(stored["n"])
    differing = [_difference(key, stored, expected) for key in expected if stored.get(key) != expected[key]]
    differing = [text for text in differing if not (other_hardware and text.startswith("environment."))]
    if differing:
        raise LdmError(
            f"{out} holds another release: {'; '.join(differing)}. Go on with the same settings, or choose another "
            f"out=...{_hardware_hint(differing)}"
        )
    if n > stored["n"]:
        (out / SUMS).unlink(missing_ok=True)  # no longer complete, before it is said to be larger
        kept = {"environment": stored["environment"]}
        write_whole(path, as_json({**plan.to_dict(n), **kept}), scratch)


def _expect_empty(out: Path, scratch: Path) -> None:
    found = sorted(path.name for path in out.iterdir() if path != scratch.parent)
    if found and RELEASE not in found:  # another worker may have begun a moment ago
        raise LdmError(f"{out} holds {found[0]} and no {RELEASE}: it is no release. Choose another out=....")


def planned_count(out: Path) -> int:
    """Number of volumes of the release in ``out``."""
    return _read(out / RELEASE)["n"]


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
        version = stored["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise LdmError(f"{path} is no description of a release ({error}); choose another out=....") from error
    if version != FORMAT_VERSION:
        raise LdmError(f"{path} has format version {version}, this package writes {FORMAT_VERSION}.")
    return stored


def _write_once(path: Path, data: bytes, scratch: Path) -> None:
    """Write a file unless somebody else was faster."""
    draft = scratch / f"{uuid4().hex}-{RELEASE}"
    write_whole(draft, data, scratch)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: the last one wins, and all see what it wrote
        os.replace(draft, path)
    draft.unlink(missing_ok=True)


def _difference(key: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What differs in words, down to one key of a mapping."""
    was, now = stored.get(key), expected[key]
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        inner = next(name for name in sorted({*was, *now}) if was.get(name) != now.get(name))
        return _difference(f"{key}.{inner}", {f"{key}.{inner}": was.get(inner)}, {f"{key}.{inner}": now.get(inner)})
    return f"{key} was {_short(was)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _hardware_hint(differing: list[str]) -> str:
    if not any(text.startswith("environment.") for text in differing):
        return ""
    return (
        " On other hardware or packages volumes may differ in their last bits: other_hardware=true goes on all the "
        "same, and the provenance says which volume was made where."
    )
