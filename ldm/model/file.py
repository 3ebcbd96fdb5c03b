"""One model, one file: safetensors with the whole description as one JSON string in the header.

Nothing in a model file is executed when it is loaded: tensors are bytes, the description is data, and the
networks it names come from a fixed table (:mod:`ldm.model.build`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.networks.frozen import frozen_tensors
from ldm.networks.tensors import differences
from ldm.source import source_commit

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
HEADER_KEY = "ldm"


def write_model(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a model file atomically.

    Args:
        path: ``.../model.safetensors``.
        tensors: state dict; copied to the CPU, contiguous.
        header: JSON-safe description; format version, tensor hash and package versions are added.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    description = {
        **header,
        "format_version": FORMAT_VERSION,
        "tensors_sha256": tensors_hash(tensors),
        "versions": package_versions(),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={HEADER_KEY: json.dumps(description)})
    os.replace(temporary, path)


def read_header(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The description of a model file, without its tensors.

    Args:
        path: a model file.
        kind: what it has to be: ``first_stage``, ``latent_diffusion``, ...; None for anything.

    Raises:
        LdmError: missing, not one of our model files, of a newer format, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmError(f"There is no model file {path}.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise LdmError(
            f"{path} is not a readable safetensors file ({error}). Model files are written by `ldm train-vae`, "
            "`ldm train-ldm` and, from MONAI weights, `ldm import-weights`; pickled checkpoints (.ckpt, .pt) are not "
            "loaded."
        ) from error
    try:
        header = json.loads(text) if text else None
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise LdmError(f"{path} is a safetensors file without the description of an ldm model in its header.")
    if header["format_version"] > FORMAT_VERSION:
        raise LdmError(
            f"{path} has format version {header['format_version']}, this package reads up to {FORMAT_VERSION}: "
            "update the package."
        )
    if kind is not None and header.get("kind") != kind:
        raise LdmError(f"{path} holds a model of kind '{header.get('kind')}', expected '{kind}'.")
    return header


def names_the_file(load: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate ``load(cls, path, ...)``: a header that lacks something is an `LdmError` that names file and key."""

    @functools.wraps(load)
    def wrapper(cls: type, path: str | Path, *arguments: Any, **options: Any) -> Any:
        try:
            return load(cls, path, *arguments, **options)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, LdmError) and str(path) in str(error):  # it says what is wrong, of which file
                raise
            raise LdmError(
                f"{path}: its header does not describe a whole model ({type(error).__name__}: {error}). It may come "
                "from another version of this package."
            ) from error

    return wrapper


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a model file, on the CPU."""
    with safe_open(Path(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict that has to fit exactly; the error lists what is missing, unexpected or of another shape."""
    faults = differences(module.state_dict(), tensors)
    if faults:
        shown = "\n  ".join(faults)
        raise LdmError(f"{path} does not fit the network that its header describes:\n  {shown}")
    module.load_state_dict(dict(tensors))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of names; the file around them does not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of everything that a result depends on; ``ldm commit`` where it runs from a working copy."""
    names = ("ldm", "torch", "pytorch-lightning", "monai", "nibabel", "numpy", "safetensors")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    commit = source_commit()
    return versions if commit is None else {**versions, "ldm commit": commit}


def load_matching(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Load every tensor whose name and shape fit, and say what did not; returns the names that did not.

    What is frozen stays as it is.

    Raises:
        LdmError: nothing fits at all.
    """
    frozen = frozen_tensors(module)
    own = {name: value for name, value in module.state_dict().items() if name not in frozen}
    fitting = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise LdmError(f"No tensor of {path} fits this network; init_from needs a model of the same kind.")
    module.load_state_dict(fitting, strict=False)
    left = sorted(own.keys() - fitting.keys())
    if left:
        logger.warning("%d of %d tensors keep their random start: %s ...", len(left), len(own), ", ".join(left[:4]))
    return left
