"""What measures a covariate in an image: a fixed method, or a trained segmentation network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError, nearest

KINDS = ("ventricles",)
Instrument = Callable[[np.ndarray], dict[str, float]]


def find_instrument(config: Mapping[str, Any] | None, preprocessing: Preprocessing) -> Instrument | None:
    """The instrument that a ``data.instrument`` section describes.

    Args:
        config: ``{kind: ventricles}`` or None.
        preprocessing: gives the affine of the model's grid.

    Returns:
        Function of an image ``(C, *S)`` giving ``{covariate: value in its unit}``; None when there is no instrument.

    Raises:
        LdmError: unknown kind.
    """
    if config is None:
        return None
    kind = config.get("kind")
    if kind not in KINDS:
        raise LdmError(
            f"data.instrument.kind '{kind}' is unknown; legal: {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )
    from ldm.evaluation.ventricles import measure_ventricles

    affine = preprocessing.reference.affine
    return lambda image: {"ventricles_mm3": measure_ventricles(image[0], affine)}
