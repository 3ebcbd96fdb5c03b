"""Networks from their description: a fixed table of names, never an import path from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm.errors import LdmError, nearest
from ldm.networks.autoencoder import AutoencoderKL, IdentityAutoencoder

PIXELS = "identity"
FIRST_STAGES = {"autoencoder_kl": AutoencoderKL, PIXELS: IdentityAutoencoder}


def build_first_stage(config: Mapping[str, Any]) -> nn.Module:
    """The first stage that ``config`` describes: ``kind`` and the constructor's arguments.

    Raises:
        LdmError: unknown kind or argument; the message names the nearest.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in FIRST_STAGES:
        raise LdmError(
            f"First stage kind '{kind}' is unknown; legal: {', '.join(FIRST_STAGES)}.{nearest(kind, FIRST_STAGES)}"
        )
    return construct(FIRST_STAGES[kind], settings, "vae.network")


def construct(cls: type, settings: Mapping[str, Any], where: str) -> Any:
    """``cls(**settings)`` with an unknown argument named.

    Raises:
        LdmError: an argument is not one of the constructor's.
    """
    code = cls.__init__.__code__
    legal = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    for name in settings:
        if name not in legal:
            raise LdmError(f"{where}.{name} is not a setting.{nearest(name, legal)} Legal: {', '.join(legal)}.")
    return cls(**settings)
