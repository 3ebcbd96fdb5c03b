"""A control on a frozen model: what the model is, it says itself; what is trained is only the control."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, open_dict

from ldm.commands.run import plain
from ldm.conditioning.planes import PlaneConditioner
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.latents.cache import PosteriorCache
from ldm.model.first_stage import FirstStage
from ldm.model.latent_diffusion import LatentDiffusionModel

logger = logging.getLogger(__name__)

KINDS = ("mask", "image")
#: sections of ``ldm`` that are the frozen model's, by their names in its header
TAKEN = {
    "network": "denoiser",
    "condition": "condition",
    "schedule": "schedule",
    "prediction_type": "prediction_type",
    "sampling": "sampling",
}


def frozen_model(config: DictConfig) -> LatentDiffusionModel | None:
    """The model of ``ldm.control.model``; None without one.

    What describes the model is put in place of the configuration's, which is written into the run folder.

    Raises:
        LdmError: not exactly one mask or image to control it by, or a model that is given one already.
    """
    path = config.ldm.control.model
    if path is None:
        return None
    _check_request(plain(config.ldm), Path(path), Path(config.run_dir))
    model = LatentDiffusionModel.load(path)
    planes = [name for name, one in model.network.conditioners.items() if isinstance(one, PlaneConditioner)]
    if planes:
        raise LdmError(
            f"ldm.control.model {path} is given a {planes[0]} already; legal: a model of covariates and texts, or of "
            "nothing."
        )
    _take_over(config, model)
    return model


def _check_request(ldm: Mapping[str, Any], path: Path, run_dir: Path) -> None:
    asked = ldm["conditioners"]
    if len(asked) != 1 or next(iter(asked)) not in KINDS:
        raise LdmError(
            f"ldm.control.model is controlled by one of {', '.join(KINDS)}; ldm.conditioners names "
            f"{', '.join(asked) or 'nothing'}. Legal: e.g. ldm.conditioners={{mask: {{}}}}."
        )
    kind, settings = next(iter(asked.items()))
    given = [name for name in ("mode", "drop_rate") if name in (settings or {})]
    if given:
        raise LdmError(
            f"ldm.conditioners.{kind}.{given[0]} has no meaning with ldm.control.model: a control has its own way in, "
            "and without it there is the frozen model. Leave it out."
        )
    if ldm["init_from"]:
        raise LdmError(
            "ldm.init_from and ldm.control.model exclude each other: a control starts from the frozen model."
        )
    if path.resolve().parent == run_dir.resolve():
        raise LdmError(
            f"ldm.control.model {path} lies where this run writes its own: write to another with run_dir=..."
        )


def _take_over(config: DictConfig, model: LatentDiffusionModel) -> None:
    header = model.header
    with open_dict(config):
        config.vae.network = header["first_stage"]
        for section, name in TAKEN.items():
            config.ldm[section] = header[name]
        config.ldm.learned_variance = model.learned_variance
        if model.unlearned:  # it never learned to go without some condition
            config.ldm.condition = {**header["condition"], "drop_rate": 0.0, "drop_all_rate": 0.0}


def first_stage_of(model: LatentDiffusionModel) -> FirstStage:
    """The first stage that a model holds."""
    return FirstStage(model.first_stage, model.header["first_stage"], model.preprocessing)


def control_facts(model: LatentDiffusionModel) -> dict[str, Any]:
    """What the header of a controlled model says beside the rest."""
    facts = {"control": {"model_sha256": model.header["tensors_sha256"], "steps": model.header.get("steps")}}
    return facts | {name: model.header[name] for name in ("learned_null", "learned_nulls") if name in model.header}


def adopt(model: LatentDiffusionModel, caches: Sequence[PosteriorCache], schema: CovariateSchema) -> None:
    """Make a cohort's latents those of the frozen model: of its shape, with covariates as it knows them.

    Args:
        model: the frozen one.
        caches: of the cohort; their covariates are changed.
        schema: of the cohort.

    Raises:
        LdmError: latents of another shape, or see :func:`recode`.
    """
    for cache in caches:
        if tuple(cache.latent_shape) != model.latent_shape:
            ours, theirs = ("x".join(map(str, shape)) for shape in (cache.latent_shape, model.latent_shape))
            shape = list(model.preprocessing.shape)
            raise LdmError(
                f"This cohort's latents are {ours}, those of ldm.control.model {theirs}: set data.shape={shape}."
            )
        cache.covariates = recode(cache.covariates, schema, model.schema)


def recode(codes: np.ndarray, ours: CovariateSchema, theirs: CovariateSchema) -> np.ndarray:
    """Codes ``(N, K)`` of our covariates as ``(N, K')`` of theirs; those that we lack are not given.

    Raises:
        LdmError: a covariate or level that they do not know, or know in another kind or unit.
    """
    for covariate in ours:
        if covariate.name not in theirs.names:
            raise LdmError(
                f"data.covariates.{covariate.name} is unknown to ldm.control.model; leave it out. It knows: "
                f"{', '.join(theirs.names) or 'none'}."
            )
        known = theirs[covariate.name]
        if (covariate.kind, covariate.unit) != (known.kind, known.unit):
            raise LdmError(
                f"data.covariates.{covariate.name} is {_kind(covariate)}, for ldm.control.model it is {_kind(known)}: "
                "give it as the model knows it."
            )
    return codes if ours == theirs else theirs.encode_table([ours.decode(vector) for vector in codes])


def _kind(covariate: Covariate) -> str:
    return f"{covariate.kind} in {covariate.unit}" if covariate.unit else covariate.kind
