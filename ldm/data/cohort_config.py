"""The ``data`` configuration: complete, and with nothing in it that does not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.data.slices import checked_slices
from ldm.errors import LdmError, nearest

SPLITS = ("train", "valid", "test")
POLICIES = ("stop", "leave_out")
OTHER_LABELS = ("background", "refuse")
MISSING_POLICIES = ("null", "drop", "error")

DEFAULTS: dict[str, Any] = {
    "name": None,
    "spatial_dims": 3,
    "root": None,
    "table": None,
    "id": "participant_id",
    "subject": "participant_id",
    "subjects_linked": True,
    "image": None,
    "labels": None,
    "label_names": {},
    "other_labels": "background",
    "slices": None,
    "covariates": {},
    "missing_covariate": None,
    "split": {},
    "orientation": "RAS",
    "spacing_mm": None,
    "pixel_size": None,
    "shape": None,
    "intensity": {},
    "faults": "stop",
    "cache": True,
    "cache_dir": None,
    "cache_dtype": "float16",
    "cache_gb": None,
    "num_workers": 0,
    "augment": {},
    "download": False,
    "simulate": None,
    "n": None,
    "seed": 0,
    "instrument": None,
}
"""Every key of ``conf/data/base.yaml``, for configurations that are given as plain mappings."""
SPLIT_DEFAULTS = {"column": None, "carve_out": None, "seed": 0, "fractions": {"train": 0.8, "valid": 0.1, "test": 0.1}}


def complete_config(data_cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return a ``data`` configuration as a plain, complete dict.

    Raises:
        LdmError: for unknown keys (naming the nearest), illegal values, and required keys that are not set.
    """
    given = _plain(data_cfg)
    _known_keys(given, DEFAULTS, "data")
    config = {**DEFAULTS, **given}
    for key in ("label_names", "covariates", "split", "intensity", "augment"):
        config[key] = config[key] or {}
    config["covariates"] = {name: one for name, one in config["covariates"].items() if one is not None}
    _known_keys(config["split"], SPLIT_DEFAULTS, "data.split")
    config["split"] = {**SPLIT_DEFAULTS, **config["split"]}
    config["missing_covariate"] = config["missing_covariate"] or "null"
    _one_of(config["spatial_dims"], (2, 3), "data.spatial_dims")
    _one_of(config["missing_covariate"], MISSING_POLICIES, "data.missing_covariate")
    _one_of(config["faults"], POLICIES, "data.faults")
    _one_of(config["other_labels"], OTHER_LABELS, "data.other_labels")
    _one_of(config["subjects_linked"], (True, False), "data.subjects_linked")
    config["slices"] = checked_slices(config["slices"], config["spatial_dims"])
    _check_fractions(config["split"]["fractions"])
    _check_carve_out(config["split"])
    for key in ("root", "image"):
        if not config[key] or config[key] == MISSING:
            raise LdmError(f"data.{key} is not set; see conf/data/base.yaml for what it means")
    return config


def _plain(data_cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    if not isinstance(data_cfg, DictConfig):
        return dict(data_cfg)
    try:
        return OmegaConf.to_container(data_cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise LdmError(f"data configuration: {str(error).splitlines()[0]}") from error


def _known_keys(given: Mapping[str, Any], legal: Mapping[str, Any], where: str) -> None:
    for key in given:
        if key not in legal:
            raise LdmError(f"{where} has no key '{key}'.{nearest(key, legal)} Legal keys: {', '.join(legal)}")


def _one_of(value: Any, legal: Sequence[Any], where: str) -> None:
    if value not in legal:
        words = ", ".join(str(item) for item in legal)
        raise LdmError(f"{where} is {value!r}.{nearest(str(value), map(str, legal))} Legal: {words}")


def _check_carve_out(split: Mapping[str, Any]) -> None:
    share = split["carve_out"]
    if share is not None and not (split["column"] and isinstance(share, float) and 0 < share < 1):
        raise LdmError(f"data.split.carve_out is {share}; legal: null, or with data.split.column a share such as 0.1.")


def _check_fractions(fractions: Mapping[str, float]) -> None:
    _known_keys(fractions, dict.fromkeys(SPLITS), "data.split.fractions")
    values = list(fractions.values())
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
        raise LdmError(f"data.split.fractions is {dict(fractions)}; fractions lie in 0..1 and sum to 1")
