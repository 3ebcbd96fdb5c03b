"""``ldm edit``: a scan changed by a strength, scans between two, or a region filled in, in the scan's own space."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress

from ldm.commands.run import plain
from ldm.commands.sample import (
    SHOWN,
    asked_inputs,
    asked_rows,
    asked_table,
    asks_for_several,
    files_sha256,
    load_model,
    provenance_of,
    sampling_options,
)
from ldm.data.stored import split_reference
from ldm.diffusion.checks import check_number
from ldm.errors import LdmError
from ldm.model.edited_image import EditedImage
from ldm.model.editing import Edit, Editing, between
from ldm.model.inputs import as_lists
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.output import image_paths, write_request
from ldm.training import figures
from ldm.training.panels import describe

logger = logging.getLogger(__name__)

#: setting -> the edit that it asks for, and how many images there are when neither `n` nor a table or list says
EDITS = {"strength": ("image-to-image", 4), "to": ("interpolation", 8), "fill": ("inpainting", 4)}
FORMS = "strength=0.5 (image-to-image), to=FILE (interpolation) or fill=FILE (inpainting)"
NOT_BETWEEN = ("sampler", "eta", "guidance_scale", "guidance_interval", "guidance_rescale")
Files = str | dict[str, str]  # of all channels, or one each


def run(config: DictConfig) -> list[Path]:
    """Edit an image and write the results with their table, mosaic and provenance; returns the results' paths."""
    kind = asked_edit(config)
    out = Path(config.run_dir)
    model, path = load_model(config)
    if not isinstance(model, Editing):
        raise LdmError(f"{path} holds {model.what}; only a diffusion model can start from a scan.")
    image, given = split_channels(model, files(config.image))
    asked = OmegaConf.create({"covariates": config.covariates, "mask": config.mask, "text": config.text, **given})
    table = asked_table(asked.covariates)
    inputs = asked_inputs(asked, table)
    rows = asked_rows(asked.covariates, table, model, inputs)
    hashes = edit_hashes(config, image, inputs)
    sources = [EditedImage.read(model.preprocessing, image, None if config.fill is None else str(config.fill))]
    if kind == "to":
        sources.append(EditedImage.read(model.preprocessing, files(config.to)))
    warn_of_cropping(sources)
    n = EDITS[kind][1] if config.n is None and not asks_for_several(asked) else config.n
    edit = prepare(model, kind, sources, config, rows, n, {**inputs, **sampling_options(config)})
    sampling = {"edit": EDITS[kind][0], **vars(edit.request.settings)}
    provenance = provenance_of(model, path, sampling, config.precision, hashes)
    paths = draw(model, out, config, edit, sources[0], provenance, columns(config, kind, edit))
    mosaic_of(model, out, sources, paths, titles(kind, config, edit))
    logger.info("%d images, their table and mosaic.png are in %s", len(paths), out)
    return paths


def asked_edit(config: DictConfig) -> str:
    """``strength``, ``to`` or ``fill``: the one that is given.

    Raises:
        LdmError: no image, none or several of the three, a count below 1, or a setting that the edit has no use for.
    """
    if config.image is None:
        raise LdmError("image is not set: the file to edit, or {channel: file} for a model of several channels.")
    asked = [name for name in EDITS if config[name] is not None]
    if len(asked) != 1:
        found = f"{' and '.join(asked)} are different edits" if asked else "there is nothing to do to the image"
        raise LdmError(f"{found}; give one of {FORMS}.")
    for name in ("n", "batch_size"):
        if config[name] is not None and config[name] < 1:
            raise LdmError(f"{name} is {config[name]}; legal: 1 or more.")
    if asked == ["strength"]:
        check_number("strength", config.strength, 0, 1, "a number above 0, up to 1")
    useless = [name for name in NOT_BETWEEN if config[name] is not None] if asked == ["to"] else []
    if useless:
        raise LdmError(f"{useless[0]} makes no sense with to=...: interpolation goes by DDIM, without guidance.")
    return asked[0]


def files(value: Any) -> Files:
    """A path, or {channel: path}, as it is in the configuration."""
    if not OmegaConf.is_config(value):
        return str(value)
    if not OmegaConf.is_dict(value):
        raise LdmError(f"{plain(value)} is a list; an edit takes one image: a file or {{channel: file}}.")
    return {str(name): str(file) for name, file in plain(value).items()}


def split_channels(model: LatentDiffusionModel, image: Files) -> tuple[Files, dict[str, dict[str, str]]]:
    """The channels that are edited, and those that the model is given beside them (``conditioners.image``)."""
    conditioners = model.network.conditioners
    names = conditioners["image"].images if "image" in conditioners else ()
    if isinstance(image, str) or not any(name in names for name in image):
        return image, {}
    given = {name: file for name, file in image.items() if name in names}
    return {name: file for name, file in image.items() if name not in names}, {"image": given}


def edit_hashes(config: DictConfig, image: Files, inputs: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of every file that the results depend on.

    Raises:
        LdmError: there is no such file.
    """
    lists = as_lists(inputs)
    images = [image, *([] if config.to is None else [files(config.to)]), *lists.get("image", [])]
    masks = [*([] if config.fill is None else [str(config.fill)]), *lists.get("mask", [])]
    return files_sha256({"image": images, "mask": masks})


def warn_of_cropping(sources: Sequence[EditedImage]) -> None:
    """Say that an image is larger than what the model sees."""
    if any(source.geometry.crops for source in sources):
        logger.warning(
            "The image is larger than the model's field of view, %s voxels: what lies outside is %s in the results.",
            "x".join(map(str, sources[0].geometry.shape)),
            "background" if sources[0].region is None else "as it was",
        )


def prepare(
    model: LatentDiffusionModel,
    kind: str,
    sources: Sequence[EditedImage],
    config: DictConfig,
    rows: Sequence[Mapping[str, Any]] | None,
    n: int | None,
    options: Mapping[str, Any],
) -> Edit:
    """The edit that is asked for, ready to be drawn."""
    arrays = [source.array for source in sources]  # (C, *S) each
    options = {**options, "precision": config.precision}
    if kind == "to":
        return model.plan_interpolation(*arrays, n, rows, **options)
    if kind == "fill":
        return model.plan_inpainting(*arrays, sources[0].fill, rows, n, config.seed, **options)
    return model.plan_image_to_image(*arrays, config.strength, rows, n, config.seed, **options)


def columns(config: DictConfig, kind: str, edit: Edit) -> dict[str, list[Any]]:
    """What each image was given beside covariates, for the table: an interpolation's share is 0 at image, 1 at to."""
    n = len(edit.request)
    value = config.strength if kind == "strength" else files(config[kind])
    shares = {"share": between(n, range(n))} if kind == "to" else {}
    inputs = {name: list(values) for name, values in edit.request.inputs.items()}
    return {**inputs, "image": [files(config.image)] * n, kind: [value] * n, **shares}


def draw(
    model: LatentDiffusionModel,
    out: Path,
    config: DictConfig,
    edit: Edit,
    source: EditedImage,
    provenance: Mapping[str, Any],
    given: Mapping[str, list[Any]],
) -> list[Path]:
    """Write the images of an edit in the space of its source, with a progress bar."""
    with Progress() as bar:
        task = bar.add_task("editing", total=len(edit.request))
        return write_request(
            model,
            out,
            edit.request.rows,
            config.seed,
            provenance,
            lambda todo: edit.batches(todo, config.batch_size),
            source.write,
            lambda count: bar.advance(task, count),
            given,
        )


def titles(kind: str, config: DictConfig, edit: Edit) -> list[str]:
    """A title for each picture of the mosaic: the image, the results, and what was interpolated to."""
    n = len(edit.request)
    shares = [{"share": share} for share in between(n, range(n))] if kind == "to" else [{}] * n
    rows = [{**share, **row} for share, row in zip(shares, edit.request.rows, strict=True)]
    ends = [f"{name} {_name(files(config[name]))}" for name in ("image", "to") if config[name] is not None]
    return [ends[0], *(describe(row) if row else EDITS[kind][0] for row in rows), *ends[1:]]


def mosaic_of(
    model: LatentDiffusionModel, out: Path, sources: Sequence[EditedImage], paths: Sequence[Path], names: Sequence[str]
) -> Path:
    """Write the images that were edited as files, in the units of the results, and a picture of all, the image first.

    Pictures are on the model's grid, so that planes and orientation are those of a sample.
    """
    ends = []
    for name, source in zip(("image", "to"), sources, strict=False):
        own = image_paths(model, out, name)
        source.write_own(own)
        ends.append(source.read_back(own[0]))
    results = [sources[0].read_back(path) for path in paths[: SHOWN - len(ends)]]
    shown: list[np.ndarray] = [ends[0], *results, *ends[1:]]
    kept = [names[0], *names[1 : 1 + len(results)], *names[1 + len(paths) :]]
    rgb = model.preprocessing.is_rgb
    return figures.mosaic(shown, out / "mosaic.png", kept, (0, 255) if rgb else None, rgb=rgb)


def _name(image: Files) -> str:
    first = image if isinstance(image, str) else next(iter(image.values()))
    return split_reference(first)[0].name
