"""Start a diffusion model from another one, mapping covariates, planes and words by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.conditioning.base import COVARIATES, Conditioner, Conditioners
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.file import load_matching
from ldm.model.latent_diffusion import LatentDiffusionModel

logger = logging.getLogger(__name__)

CONV_IN, SPADE_IN = "denoiser.unet.conv_in.conv.weight", ".mlp_shared.conv.weight"
TOKENS, MERGE = "conditioners.covariates.tokens.", "conditioners.covariates.merge.0.weight"
WORDS = "conditioners.text.encoder.embed.weight"


def start_from(model: LatentDiffusionModel, path: str | Path) -> None:
    """Copy the network of the model at ``path`` into ``model``, covariate by covariate.

    Covariates that both know keep what was learned for them, at their new position; a new covariate starts
    without influence, except with ``cross_attention``, whose every token is attended to. So do planes of labels and
    images, and words of the vocabulary keep their embedding. Everything else is copied where names and shapes agree.

    A value in its unit keeps its meaning where ranges differ, but not as a plane (``concat``, ``hybrid``), which is
    relative to the range: there is a warning, as there is where the models predict different things.

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
    patch, theirs = model.network.denoiser.patch_factor, other.network.denoiser.patch_factor
    if patch != theirs:
        raise LdmError(
            f"ldm.init_from {path} sees {theirs} latent voxels as one, this model {patch}: "
            "set ldm.network.patch_size alike."
        )
    for name in ("norm_num_groups", "num_head_channels"):  # which no shape of a tensor tells
        setting, theirs = (one.network.denoiser.encoder_arguments[name] for one in (model, other))
        if setting != theirs:
            raise LdmError(
                f"ldm.init_from {path} has ldm.network.{name}={theirs}, this model {setting}: set them alike."
            )
    if model.header["first_stage_sha256"] != other.header["first_stage_sha256"]:
        logger.warning(
            "%s was trained on latents of another first stage; the start is better when the first stages agree "
            "(vae.init_from, few steps).",
            path,
        )
    predicted, theirs = (one.header["prediction_type"] for one in (model, other))
    if predicted != theirs:
        logger.warning(
            "%s predicts '%s', this model '%s': its output is learned anew; ldm.prediction_type sets them alike.",
            path,
            theirs,
            predicted,
        )
    positions = shared_positions(model.schema, other.schema)
    if ours in ("concat", "hybrid"):
        warn_of_ranges(model.schema, other.schema, positions, path)
    tensors = map_covariates(model, other, positions)
    map_planes(tensors, model, other, positions)
    map_words(tensors, model, other)
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


def warn_of_ranges(
    schema: CovariateSchema, other: CovariateSchema, positions: Sequence[tuple[int, int]], path: str | Path
) -> None:
    """Say which covariates mean something else as planes, since their ranges differ."""
    for here, there in positions:
        covariate, match = schema[schema.names[here]], other[other.names[there]]
        if covariate.range != match.range:
            logger.warning(
                "%s ranges over %s here and over %s in %s: the same plane stands for other values until training has "
                "moved it. Set data.covariates.%s.range alike in both to avoid that.",
                covariate.name,
                covariate.range,
                match.range,
                path,
                covariate.name,
            )


def map_covariates(
    model: LatentDiffusionModel, other: LatentDiffusionModel, positions: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """State dict of ``other``'s network with every covariate at its position in ``model``."""
    own, tensors = model.network.state_dict(), dict(other.network.state_dict())
    mapped = {name: value for name, value in tensors.items() if not name.startswith(TOKENS)}
    for here, there in positions:
        prefix = f"{TOKENS}{there}."
        for name, value in tensors.items():
            if name.startswith(prefix):
                mapped[f"{TOKENS}{here}.{name.removeprefix(prefix)}"] = value
        _keep_physical_scale(
            mapped, model.schema[model.schema.names[here]], other.schema[other.schema.names[there]], here
        )
    if MERGE in own and MERGE in tensors:
        width = own[MERGE].shape[0]
        blocks = [(slice(h * width, (h + 1) * width), slice(t * width, (t + 1) * width)) for h, t in positions]
        _columns(mapped, own, MERGE, blocks)
    return mapped


def map_planes(
    mapped: dict[str, Tensor],
    model: LatentDiffusionModel,
    other: LatentDiffusionModel,
    positions: Sequence[tuple[int, int]],
) -> None:
    """Put the columns of every plane, and its null, at the place that it has in ``model``; new planes have zeros."""
    own, ours, theirs = model.network.state_dict(), model.network.conditioners, other.network.conditioners
    patch = model.network.denoiser.patch_factor  # channels of the input that stand for one of a plane
    before, their_before = (
        one.network.state_dict()[CONV_IN].shape[1] - patch * one.network.conditioners.plane_channels
        for one in (model, other)
    )  # latent and position channels stand first
    columns = _latent_and_position_blocks(model, other, before, their_before)
    starts, their_starts = (_plane_starts(one, start, patch) for one, start in ((ours, before), (theirs, their_before)))
    for name in ours:
        way = _way_of_planes(ours[name])
        if name not in theirs or way is None:
            continue
        if way != _way_of_planes(theirs[name]):
            mapped.pop(f"conditioners.{name}.null", None)
            continue
        if name == COVARIATES:
            blocks = _plane_blocks(model.schema, other.schema, positions)
        else:
            found = {channel: index for index, channel in enumerate(theirs[name].channels)}
            pairs = [(h, found[channel]) for h, channel in enumerate(ours[name].channels) if channel in found]
            blocks = [(slice(h, h + 1), slice(t, t + 1)) for h, t in pairs]
        _columns(mapped, own, f"conditioners.{name}.null", blocks, axis=0)
        if way == "spade":
            for key in own:
                if key.endswith(SPADE_IN):
                    _columns(mapped, own, key, blocks)
            continue
        columns += [(_inputs(h, starts[name], patch), _inputs(t, their_starts[name], patch)) for h, t in blocks]
        if name == COVARIATES and model.header["condition"]["mode"] == "hybrid":
            for key in own:
                if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
                    _columns(mapped, own, key, blocks)
    _columns(mapped, own, CONV_IN, columns)


def map_words(mapped: dict[str, Tensor], model: LatentDiffusionModel, other: LatentDiffusionModel) -> None:
    """Put the embedding of every word that both vocabularies have at its number in ``model``; others start anew."""
    if WORDS not in model.network.state_dict() or WORDS not in mapped:
        return
    numbers = {word: number for number, word in enumerate(other.header["conditioners"]["text"]["vocabulary"])}
    table, theirs = model.network.state_dict()[WORDS].clone(), mapped[WORDS]
    if table.shape[1] == theirs.shape[1]:
        for number, word in enumerate(model.header["conditioners"]["text"]["vocabulary"]):
            if word in numbers:
                table[number] = theirs[numbers[word]]
    mapped[WORDS] = table


def _way_of_planes(conditioner: Conditioner) -> str | None:
    """Where the planes of a conditioner enter the denoiser; None for one without planes of its own."""
    if conditioner.plane_channels:
        return "input"
    return "spade" if conditioner.spade_channels else None


def _latent_and_position_blocks(
    model: LatentDiffusionModel, other: LatentDiffusionModel, before: int, their_before: int
) -> list[tuple[slice, slice]]:
    """Latent channels, and behind them those of each axis: its coordinate, then a pair for each of the frequencies."""
    axes = model.network.denoiser.spatial_dims
    ours, theirs = (one.network.denoiser.position_frequencies for one in (model, other))
    width, their_width = (1 + 2 * frequencies if frequencies else 0 for frequencies in (ours, theirs))
    latents, their_latents = before - axes * width, their_before - axes * their_width
    blocks = [(slice(0, latents), slice(0, their_latents))]
    shared = min(width, their_width)
    for axis in range(axes):
        here, there = latents + axis * width, their_latents + axis * their_width
        blocks.append((slice(here, here + shared), slice(there, there + shared)))
    return blocks


def _plane_starts(conditioners: Conditioners, start: int, patch: int) -> dict[str, int]:
    """First input channel of every conditioner's planes, each of which takes ``patch`` channels."""
    starts = {}
    for name, one in conditioners.items():
        starts[name] = start
        start += patch * one.plane_channels
    return starts


def _keep_physical_scale(mapped: dict[str, Tensor], ours: Covariate, theirs: Covariate, here: int) -> None:
    """Codes are relative to the range; where the ranges differ, the same value in its unit keeps its z-score."""
    name = f"{TOKENS}{here}."
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


def _inputs(planes: slice, start: int, patch: int) -> slice:
    """Input channels of some planes of a conditioner whose channels begin at ``start``."""
    return slice(start + patch * planes.start, start + patch * planes.stop)
