"""What a diffusion model learns to go without, and whether its held-out subjects ask for more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ldm.conditioning.base import COVARIATES
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel


def lacking(model: LatentDiffusionModel, covariates: np.ndarray) -> set[str]:
    """Conditioners that some images have nothing, or not everything, to tell.

    Args:
        model: whose conditioners they are.
        covariates: codes of these images ``(N, K)``, NaN where one is missing.
    """
    conditioners, found = model.network.conditioners, set()
    if COVARIATES in conditioners and np.isnan(covariates).any():
        found.add(COVARIATES)
    caption = conditioners["text"].caption if "text" in conditioners else None
    if caption is not None and any(caption(model.schema.decode(row)) is None for row in covariates):
        found.add("text")
    return found


def learned_nulls(
    condition: Mapping[str, Any], conditioners: Mapping[str, Mapping[str, Any]], lacking: Collection[str]
) -> list[str]:
    """Names of the conditioners that training ever goes without, so that the model knows what to do then.

    Args:
        condition: ``ldm.condition``.
        conditioners: see :func:`ldm.commands.train_ldm.describe_conditioners`.
        lacking: see :func:`lacking`.
    """
    rates = {name: one["drop_rate"] for name, one in conditioners.items()}
    if condition["mode"] != "none":
        rates[COVARIATES] = condition.get("drop_rate", 0)
    everything = condition.get("drop_all_rate", 0)
    return sorted(name for name, rate in rates.items() if rate or everything or name in lacking)


def check_nulls(model: LatentDiffusionModel, held_out: np.ndarray) -> None:
    """Refuse held-out subjects without a covariate, or a caption, where the model does not learn to go without one.

    Args:
        model: to be trained.
        held_out: their codes ``(N, K)``, NaN where one is missing.

    Raises:
        LdmError: naming the covariate, or the caption.
    """
    missing = lacking(model, held_out) - set(model.nulls)
    if COVARIATES in missing:
        name = model.schema.names[int(np.isnan(held_out).any(0).argmax())]
        raise LdmError(
            f"Held-out subjects lack the covariate '{name}', and training never hides one: set ldm.condition.drop_rate "
            "above 0, or data.missing_covariate=drop."
        )
    if "text" in missing:
        raise LdmError(
            "Held-out subjects lack a covariate that the caption cannot do without, and training never goes without a "
            "caption: set ldm.conditioners.text.drop_rate above 0, put what may be missing into [brackets] of the "
            "caption, or data.missing_covariate=drop."
        )
