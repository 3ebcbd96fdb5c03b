"""What measures a covariate in an image: a fixed method, or a trained segmentation network."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError, nearest
from ldm.evaluation.ventricles import measure_ventricles
from ldm.model.segmenter import Segmenter

logger = logging.getLogger(__name__)

KINDS = ("ventricles", "segmenter")
KEYS = ("kind", "path", "measures")
PER_MM3 = {"mm3": 1.0, "ml": 1e-3, "cm3": 1e-3}
Instrument = Callable[[np.ndarray], dict[str, float]]


def find_instrument(
    config: Mapping[str, Any] | None, preprocessing: Preprocessing, schema: CovariateSchema
) -> Instrument | None:
    """The instrument that a ``data.instrument`` section describes.

    Args:
        config: ``{kind: ventricles}`` (simulated brains), ``{kind: segmenter, path: model.safetensors, measures:
            {covariate: [classes whose volumes add up to it]}}``, or None.
        preprocessing: gives the affine of the model's grid.
        schema: gives the unit of each covariate.

    Returns:
        Function of an image ``(C, *S)`` giving ``{covariate: value in its unit}``, NaN for an image that cannot be
        measured; None when there is no instrument.

    Raises:
        LdmError: an unknown kind or key, or a covariate, class or unit that does not exist.
    """
    if config is None:
        return None
    kind = config.get("kind")
    if kind not in KINDS:
        raise LdmError(f"data.instrument.kind '{kind}' is unknown; legal: {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    for key in config:
        if key not in KEYS:
            raise LdmError(f"data.instrument.{key} is not a setting.{nearest(key, KEYS)} Legal: {', '.join(KEYS)}.")
    return _ventricles(preprocessing) if kind == "ventricles" else _segmenter(config, schema)


def _ventricles(preprocessing: Preprocessing) -> Instrument:
    affine = np.asarray(preprocessing.reference.affine)

    def measure(image: np.ndarray) -> dict[str, float]:
        try:
            return {"ventricles_mm3": measure_ventricles(image[0], affine)}
        except LdmError as error:  # early in training a sample is no brain yet
            logger.debug("%s", error)
            return {"ventricles_mm3": math.nan}

    return measure


def _segmenter(config: Mapping[str, Any], schema: CovariateSchema) -> Instrument | None:
    path = Path(config["path"])
    if not path.is_file():
        logger.warning("There is no segmentation model %s yet (ldm train-segmenter): nothing is measured.", path)
        return None
    segmenter = Segmenter.load(path)
    scale = {}
    for name, classes in config["measures"].items():
        unit = schema[name].unit
        if unit not in PER_MM3:
            raise LdmError(f"data.covariates.{name}.unit is {unit!r}; a measured volume is in {', '.join(PER_MM3)}.")
        for label in classes:
            if label not in segmenter.labels.names:
                known = segmenter.labels.names
                raise LdmError(f"{path} has no class '{label}'.{nearest(label, known)} It has: {', '.join(known)}.")
        scale[name] = PER_MM3[unit]

    def measure(image: np.ndarray) -> dict[str, float]:
        volumes = segmenter.volumes(image)
        return {name: scale[name] * sum(volumes[label] for label in config["measures"][name]) for name in scale}

    return measure
