"""``ldm import-weights``: published MONAI weights as one model file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ldm.commands.run import plain
from ldm.commands.stages import grid_multiple
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.build import build_first_stage
from ldm.model.import_weights import import_model, template_grid

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> Path:
    """Check the weights against the configuration and write the model; returns its path.

    Raises:
        LdmError: a model is there already, or the weights do not fit.
    """
    out = Path(config.out)
    if out.exists():
        raise LdmError(f"There is a model at {out} already. Write to another file with out=..., or remove it.")
    data = plain(config.data)
    channels = tuple(data["image"]) if isinstance(data["image"], Mapping) else ("image",)
    origin = None if config.origin_mm is None else list(config.origin_mm)
    preprocessing = template_grid(Preprocessing.from_config(data, grid_multiple(config)), channels, origin)
    header = describe(config, preprocessing, len(channels))
    schema = CovariateSchema.from_config(data["covariates"])
    model = import_model(header, preprocessing, schema, config.autoencoder, config.diffusion)
    model.save(out)
    asked = ", ".join(f"{name}: ..." for name in schema.names)
    logger.info("Model: %s. Draw from it: ldm sample model=%s 'covariates={%s}' n=1", out, out, asked)
    return out


def describe(config: DictConfig, preprocessing: Preprocessing, in_channels: int) -> dict[str, Any]:
    """The header of the model that a configuration describes, without a cohort."""
    ldm = plain(config.ldm)
    first_stage = {**plain(config.vae.network), "in_channels": in_channels}
    with torch.device("meta"):
        network = build_first_stage(first_stage)
    return {
        "cohort": config.data.name,
        "split_sha256": None,
        "first_stage": first_stage,
        "latent_shape": [
            network.latent_channels,
            *(side // network.downsampling_factor for side in preprocessing.shape),
        ],
        "denoiser": ldm["network"],
        "condition": ldm["condition"],
        "conditioners": ldm["conditioners"],
        "schedule": ldm["schedule"],
        "prediction_type": ldm["prediction_type"],
        "sampling": ldm["sampling"],
        "metrics": {},
    }
