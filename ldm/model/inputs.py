"""From what is asked of a model to its condition: covariate rows, label maps, images and texts.

An input is given by the name of its conditioner, one for all samples or one each. A label map or an image is an array
on the model's grid, or the file it is in, which goes through the model's preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.base import COVARIATES, Conditioners
from ldm.conditioning.planes import ImageConditioner, MaskConditioner
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError, nearest

#: one value a sample; None for "not given"
Inputs = Mapping[str, Sequence[Any]]


def input_names(conditioners: Conditioners) -> list[str]:
    """What a model may be given beside covariates."""
    return [name for name in conditioners if name != COVARIATES]


def check_inputs(conditioners: Conditioners, inputs: Mapping[str, Any]) -> None:
    """Refuse an input that the model does not know.

    Raises:
        LdmError: naming what it knows.
    """
    legal = input_names(conditioners)
    for name in inputs:
        if name not in legal:
            raise LdmError(
                f"This model is not conditioned on '{name}'; legal beside covariates: {', '.join(legal) or 'nothing'}."
                f"{nearest(name, legal)}"
            )


def as_lists(inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Inputs as lists: one that is for all samples becomes a list of one.

    Raises:
        LdmError: an empty list.
    """
    lists = {name: list(value) if isinstance(value, list | tuple) else [value] for name, value in inputs.items()}
    empty = [name for name, values in lists.items() if not values]
    if empty:
        raise LdmError(f"{empty[0]} is an empty list; give at least one, or leave it out.")
    return lists


def encode_condition(
    conditioners: Conditioners,
    preprocessing: Preprocessing,
    schema: CovariateSchema,
    size: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    inputs: Inputs | None = None,
) -> dict[str, Tensor]:
    """The condition of ``B`` samples.

    Args:
        conditioners: of the network.
        preprocessing: of the model.
        schema: of the rows.
        size: latent grid.
        rows: covariates in physical units, those that are given.
        inputs: one value a sample and conditioner.

    Returns:
        ``covariates`` ``(B, K)``, whether conditioned on or not, and a tensor ``(B, ...)`` for every other conditioner.

    Raises:
        LdmError: an unknown name, level or label, a shape that does not fit, or a text that is too long.
    """
    inputs = inputs or {}
    check_inputs(conditioners, inputs)
    codes = schema.encode_table(rows)  # (B, K)
    condition = {COVARIATES: torch.from_numpy(codes)}
    known = [schema.decode(vector) for vector in codes]  # with the rounding of training, or a bound may tell them apart
    for name in input_names(conditioners):
        one, values = conditioners[name], inputs.get(name, [None] * len(rows))
        read = [read_file(one, preprocessing, value) for value in values]
        condition[name] = torch.stack([one.encode(v, row, size) for v, row in zip(read, known, strict=True)])
    return condition


def read_file(conditioner: torch.nn.Module, preprocessing: Preprocessing, value: Any) -> Any:
    """The array of a label map's or an image's file; anything else as it is.

    An image of several channels is a mapping {channel: file}.
    """
    if isinstance(conditioner, MaskConditioner) and isinstance(value, str | Path):
        return preprocessing.read_labels(str(value))
    if isinstance(conditioner, ImageConditioner) and isinstance(value, str | Path | Mapping):
        return _read_image(conditioner, preprocessing, value)
    return value


def _read_image(conditioner: ImageConditioner, preprocessing: Preprocessing, value: Any) -> np.ndarray:
    files = value if isinstance(value, Mapping) else {conditioner.images[0]: value}
    if sorted(files) != sorted(conditioner.images):
        raise LdmError(
            f"{conditioner.where}: expected a file for each of the channels {', '.join(conditioner.images)}, got "
            f"{', '.join(map(str, files))}."
        )
    return preprocessing.read_channels({name: str(files[name]) for name in conditioner.images})
