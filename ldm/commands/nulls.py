"""What a model learns to go without, and whether its held-out subjects ask for more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ldm.conditioning.base import COVARIATES
from ldm.errors import LdmError
from ldm.model.generative import Generative


def lacking(model: Generative, covariates: np.ndarray) -> set[str]:
    """Covariates, by name, that some images lack, and ``text`` where a caption cannot do without one of them.

    Args:
        model: whose conditioners they are.
        covariates: codes of these images ``(N, K)``, NaN where one is missing.
    """
    conditioners, found = model.network.conditioners, set()
    if COVARIATES in conditioners:
        found = {name for name, column in zip(model.schema.names, covariates.T, strict=True) if np.isnan(column).any()}
    caption = conditioners["text"].caption if "text" in conditioners else None
    if caption is not None and any(caption(model.schema.decode(row)) is None for row in covariates):
        found.add("text")
    return found


def learned_nulls(
    condition: Mapping[str, Any], conditioners: Mapping[str, Mapping[str, Any]], lacking: Collection[str]
) -> list[str]:
    """Names of what training ever goes without, conditioners and covariates: the model knows what to do then.

    Args:
        condition: the section of that name.
        conditioners: of a diffusion model, see :func:`ldm.commands.train_ldm.describe_conditioners`.
        lacking: see :func:`lacking`.
    """
    rates = {name: one["drop_rate"] for name, one in conditioners.items()}
    if condition["mode"] != "none":
        rates[COVARIATES] = condition.get("drop_rate", 0)
    everything = condition.get("drop_all_rate", 0)
    return sorted({*lacking, *(name for name, rate in rates.items() if rate or everything)})


def check_nulls(model: Generative, held_out: np.ndarray) -> None:
    """Refuse held-out subjects without a covariate, or a caption, where the model does not learn to go without one.

    Args:
        model: to be trained.
        held_out: their codes ``(N, K)``, NaN where one is missing.

    Raises:
        LdmError: naming the covariate, or the caption.
    """
    missing = lacking(model, held_out) - set(model.nulls)
    unknown = [name for name in model.schema.names if name in missing and COVARIATES not in model.nulls]
    if unknown:
        raise LdmError(
            f"Held-out subjects lack the covariate '{unknown[0]}', which training never hides: set "
            f"{model.drop_key} above 0, or data.missing_covariate=drop."
        )
    if "text" in missing:
        raise LdmError(
            "Held-out subjects lack a covariate that the caption cannot do without, and training never goes without a "
            "caption: set ldm.conditioners.text.drop_rate above 0, put what may be missing into [brackets] of the "
            "caption, or data.missing_covariate=drop."
        )
