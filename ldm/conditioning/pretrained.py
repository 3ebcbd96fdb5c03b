"""A text encoder that somebody else has trained: a folder with a BERT in the layout of Hugging Face.

``config.json``, ``vocab.txt``, ``model.safetensors`` and, where there is one, ``tokenizer_config.json``. Nothing is
downloaded and nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.conditioning.text import read_vocabulary
from ldm.errors import LdmError
from ldm.networks.tensors import differences
from ldm.networks.text import Bert

CONFIG, VOCABULARY, WEIGHTS, TOKENIZER = "config.json", "vocab.txt", "model.safetensors", "tokenizer_config.json"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
#: what Bert computes; where ``config.json`` does not say, it means this
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
#: what a file may have beside the encoder: heads of the task it was trained for, and the numbers 0, 1, 2, ...
UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


def describe_encoder(folder: str | Path, where: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments of :class:`Bert` with ``lowercase`` and ``sha256`` (of the weights' file); and the vocabulary.

    Raises:
        LdmError: a file is missing, it is no BERT, or vocabulary and encoder do not fit each other.
    """
    folder = Path(folder)
    require_files(folder, where)
    config = _read_config(folder / CONFIG, where)
    vocabulary = read_vocabulary(folder / VOCABULARY)
    if len(vocabulary) != config["vocab_size"]:
        raise LdmError(
            f"{where}: {folder / VOCABULARY} has {len(vocabulary)} tokens, the encoder knows {config['vocab_size']} "
            f"(vocab_size in {CONFIG}): they do not belong together."
        )
    tokenizer = _read_json(folder / TOKENIZER, where) if (folder / TOKENIZER).is_file() else {}
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    sizes = {name: config[name] for name in SIZES} | {"layer_norm_eps": config.get("layer_norm_eps", 1e-12)}
    return {**sizes, "lowercase": bool(tokenizer.get("do_lower_case", True)), "sha256": digest}, vocabulary


def require_files(folder: str | Path, where: str) -> None:
    """Raise LdmError unless ``folder`` has all files of an encoder."""
    missing = [name for name in (CONFIG, VOCABULARY, WEIGHTS) if not (Path(folder) / name).is_file()]
    if missing:
        raise LdmError(
            f"{where}: there is no {Path(folder) / missing[0]}; legal: a folder with {CONFIG}, {VOCABULARY} and "
            f"{WEIGHTS} of a BERT, as Hugging Face lays it out."
        )


def load_encoder(encoder: Bert, folder: str | Path, where: str) -> None:
    """Put the weights of ``folder`` into ``encoder``, as float32.

    Raises:
        LdmError: a tensor is missing, or has another shape; the message names it.
    """
    path = Path(folder) / WEIGHTS
    tensors, own = _read_weights(path, where), encoder.state_dict()
    faults = differences(own, tensors)
    if faults:
        shown = "\n  ".join(faults)
        raise LdmError(f"{where}: {path} does not fit the BERT that its {CONFIG} describes:\n  {shown}")
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def _read_weights(path: Path, where: str) -> dict[str, Tensor]:
    """Tensors of the encoder by today's names: without the prefix of a BERT that is part of a larger model."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise LdmError(f"{where}: {path} is not a readable safetensors file ({error}).") from error
    plain = {_todays_name(name): tensor for name, tensor in stored.items()}
    return {name: tensor for name, tensor in plain.items() if not name.startswith(UNUSED)}


def _todays_name(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LdmError(f"{where}: {path} is not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise LdmError(f"{where}: {path} holds no mapping of names to values.")
    return content


def _read_config(path: Path, where: str) -> dict[str, Any]:
    config = _read_json(path, where)
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise LdmError(f"{where}: {path} has {name} {config[name]!r}; legal: {value!r}.")
    absent = [name for name in SIZES if not isinstance(config.get(name), int) or config[name] < 1]
    if absent:
        raise LdmError(f"{where}: {path} lacks {', '.join(absent)}; a BERT has all of {', '.join(SIZES)}.")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise LdmError(
            f"{where}: {path} has hidden_size {config['hidden_size']} in {config['num_attention_heads']} "
            "num_attention_heads, which is no whole number each."
        )
    return config
