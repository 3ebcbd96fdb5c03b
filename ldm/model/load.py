"""Any model that draws images, by what its file says it is."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.errors import LdmError
from ldm.model import gan, latent_diffusion
from ldm.model.file import read_header
from ldm.model.gan import GAN
from ldm.model.generative import Generative
from ldm.model.latent_diffusion import LatentDiffusionModel

MODELS: dict[str, type[Generative]] = {latent_diffusion.KIND: LatentDiffusionModel, gan.KIND: GAN}


def load_generative(path: str | Path, device: str | torch.device = "cpu") -> Generative:
    """Read a model file of any kind that draws images; nothing in it is executed.

    Raises:
        LdmError: not a model file, or of a kind that draws no images.
    """
    kind = read_header(Path(path)).get("kind")
    if kind not in MODELS:
        raise LdmError(f"{path} holds a model of kind '{kind}', which draws no images; legal: {', '.join(MODELS)}.")
    return MODELS[kind].load(path, device)
