"""Start a diffusion model from another one, mapping the covariates by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.file import load_matching
from ldm.model.latent_diffusion import LatentDiffusionModel

logger = logging.getLogger(__name__)

CONV_IN = "denoiser.unet.conv_in.conv.weight"


def start_from(model: LatentDiffusionModel, path: str | Path) -> None:
    """Copy the network of the model at ``path`` into ``model``, covariate by covariate.

    Covariates that both know keep what was learned for them, at their new position; a new covariate starts
    without influence. Everything else is copied where names and shapes agree.

    Raises:
        LdmError: the other model conditions in another way, or diffuses another number of channels.
    """
    other = LatentDiffusionModel.load(path)
    ours, theirs = model.header["condition"]["mode"], other.header["condition"]["mode"]
    if ours != theirs:
        raise LdmError(f"ldm.init_from {path} conditions by '{theirs}', this model by '{ours}': set them alike.")
    if model.latent_shape[0] != other.latent_shape[0]:
        raise LdmError(
            f"ldm.init_from {path} diffuses {other.latent_shape[0]} latent channels, "
            f"this model {model.latent_shape[0]}."
        )
    if model.header["first_stage_sha256"] != other.header["first_stage_sha256"]:
        logger.warning(
            "%s was trained on latents of another first stage; the start is better when the first stages agree "
            "(vae.init_from, few steps).",
            path,
        )
    positions = shared_positions(model.schema, other.schema)
    tensors = map_covariates(model, other, positions)
    load_matching(model.network, tensors, path)
    logger.info(
        "Starting from %s; covariates in common: %s.",
        path,
        ", ".join(model.schema.names[i] for i, _ in positions),
    )


def shared_positions(schema: CovariateSchema, other: CovariateSchema) -> list[tuple[int, int]]:
    """(position here, position there) of covariates with the same name, kind and levels."""
    pairs = []
    for here, covariate in enumerate(schema):
        if covariate.name not in other.names:
            continue
        match = other[covariate.name]
        if match.kind == covariate.kind and match.levels == covariate.levels:
            pairs.append((here, other.names.index(covariate.name)))
    return pairs


def map_covariates(
    model: LatentDiffusionModel, other: LatentDiffusionModel, positions: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """State dict of ``other``'s network with every covariate at its position in ``model``."""
    own, tensors = model.network.state_dict(), dict(other.network.state_dict())
    mapped = {name: value for name, value in tensors.items() if not name.startswith("conditioner.tokens.")}
    for here, there in positions:
        prefix = f"conditioner.tokens.{there}."
        for name, value in tensors.items():
            if name.startswith(prefix):
                mapped[f"conditioner.tokens.{here}.{name.removeprefix(prefix)}"] = value
        _keep_physical_scale(
            mapped, model.schema[model.schema.names[here]], other.schema[other.schema.names[there]], here
        )
    mode = model.header["condition"]["mode"]
    if mode == "adaptive_norm":
        width = own["conditioner.merge.0.weight"].shape[0]
        blocks = [(slice(h * width, (h + 1) * width), slice(t * width, (t + 1) * width)) for h, t in positions]
        _columns(mapped, own, "conditioner.merge.0.weight", blocks)
    if mode in ("concat", "hybrid"):
        planes = _plane_blocks(model.schema, other.schema, positions)
        before = own[CONV_IN].shape[1] - len(own["conditioner.null"])  # latent and position channels stand first
        _columns(mapped, own, "conditioner.null", planes, axis=0)
        shifted = [(_shift(h, before), _shift(t, before)) for h, t in planes]
        _columns(mapped, own, CONV_IN, [(slice(0, before), slice(0, before)), *shifted])
        if mode == "hybrid":
            for name in own:
                if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                    _columns(mapped, own, name, planes)
    return mapped


def _keep_physical_scale(mapped: dict[str, Tensor], ours: Covariate, theirs: Covariate, here: int) -> None:
    """Codes are relative to the range; where the ranges differ, the same value in its unit keeps its z-score."""
    name = f"conditioner.tokens.{here}."
    if f"{name}centre" not in mapped:
        return
    (low, high), (their_low, their_high) = ours.range, theirs.range
    ratio = (their_high - their_low) / (high - low)
    mapped[f"{name}centre"] = mapped[f"{name}centre"] * ratio + (their_low - low) / (high - low)
    mapped[f"{name}spread"] = mapped[f"{name}spread"] * ratio


def _columns(
    mapped: dict[str, Tensor],
    own: Mapping[str, Tensor],
    name: str,
    blocks: Sequence[tuple[slice, slice]],
    axis: int = 1,
) -> None:
    """Assemble ``mapped[name]`` from blocks of columns; columns without a source are zero."""
    source = mapped[name]
    result = torch.zeros_like(own[name])
    for here, there in blocks:
        if axis == 0:
            result[here] = source[there]
        else:
            result[:, here] = source[:, there]
    mapped[name] = result


def _plane_blocks(schema, other, positions) -> list[tuple[slice, slice]]:
    here, there = _plane_slices(schema), _plane_slices(other)
    return [(here[h], there[t]) for h, t in positions]


def _plane_slices(schema: CovariateSchema) -> list[slice]:
    slices, start = [], 0
    for covariate in schema:
        levels = len(covariate.levels or ())
        width = levels if levels > 2 else 1
        slices.append(slice(start, start + width))
        start += width
    return slices


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
