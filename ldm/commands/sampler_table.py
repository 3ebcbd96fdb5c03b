"""The sampler table of an evaluation: the same model and requests, drawn with other samplers or fewer calls."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.commands.held_out import read_sample
from ldm.commands.run import section
from ldm.commands.sample import OPTIONS, draw, expect_known_options, sampling_options
from ldm.errors import LdmError, nearest
from ldm.evaluation.comparison import agreements
from ldm.evaluation.distances import OTHER, SAMPLES
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.instruments import Instrument
from ldm.model.generative import Generative
from ldm.model.output import image_paths, sample_name

KEYS = (*OPTIONS, "eta")
DEFAULT = "as configured"


def read_samplers(config: DictConfig, model: Generative) -> dict[str, DictConfig]:
    """Name -> the evaluation's settings with those of ``samplers.<name>`` over them; its own come first.

    Empty if no samplers are asked for.

    Raises:
        LdmError: a setting that is none of sampling, or that the model does not know; two names of one folder.
    """
    asked = section(config, "samplers")
    found: dict[str, DictConfig] = {DEFAULT: config} if asked else {}
    for name, given in asked.items():
        if not isinstance(given, Mapping):
            raise LdmError(f"samplers.{name} is {given!r}; give settings of ldm sample, e.g. {{steps: 10}}.")
        for key in given:
            if key not in KEYS:
                raise LdmError(f"samplers.{name}.{key} is not a setting.{nearest(key, KEYS)} Legal: {', '.join(KEYS)}.")
        if slug(name) in map(slug, found):
            raise LdmError(f"samplers.{name}: another row is called like this; choose another name.")
        found[name] = OmegaConf.merge(config, dict(given))
        expect_known_options(model, found[name])
        model.settings(sampling_options(found[name]))
    return found


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def draw_samplers(
    samplers: Mapping[str, DictConfig],
    model: Generative,
    path: Path,
    configured: ImageSet,
    inputs: Mapping[str, Sequence[Any]],
) -> dict[str, ImageSet]:
    """Name -> images of the covariates and noise of ``configured``, which are those of the first; through files."""
    found = {}
    for name, config in samplers.items():
        if name == DEFAULT:
            found[name] = configured
            continue
        folder = Path(config.run_dir) / "samplers" / slug(name)
        draw(model, path, folder, [dict(row) for row in configured.rows], config, inputs)
        images = [read_sample(model, image_paths(model, folder, sample_name(i))) for i in range(len(configured))]
        found[name] = ImageSet(images, configured.rows, configured.subjects)
    return found


def sampler_table(
    samplers: Mapping[str, DictConfig],
    drawn: Mapping[str, ImageSet],
    model: Generative,
    instrument: Instrument | None,
    inputs: Mapping[str, Sequence[Any]],
    rows: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``metrics.json`` holds under ``samplers``.

    Args:
        samplers: name -> settings.
        drawn: name -> what was drawn with these.
        model: that drew.
        instrument: measures covariates; None without one.
        inputs: beside covariates, of every image.
        rows: of the distances, where ``drawn`` are called :data:`ldm.evaluation.distances.OTHER`; or empty.

    Returns:
        ``rows``: name -> ``sampling`` (in words), ``seconds_a_sample``, ``agreement``, ``distance`` (None without a
        feature network); ``timed_on``.
    """
    table = {}
    for name, config in samplers.items():
        one, options = drawn[name], sampling_options(config)
        size = min(config.batch_size, len(one))
        given = {key: values[:size] for key, values in inputs.items()}
        settings = vars(model.settings(options)).items()
        table[name] = {
            "sampling": ", ".join(f"{key} {value}" for key, value in settings if value is not None),
            "seconds_a_sample": seconds_a_sample(model, one.rows[:size], given, options),
            "agreement": {}
            if instrument is None
            else agreements(instrument, model.schema, one.rows, one.images, one.subjects),
            "distance": rows.get(SAMPLES if name == DEFAULT else OTHER.format(name)),
        }
    return {"rows": table, "timed_on": device_in_words(model)}


def seconds_a_sample(
    model: Generative,
    rows: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
) -> float:
    """Time of one batch of all ``rows`` over its size, on this machine; of the second batch, as the first warms up."""
    for _ in range(2):
        start = time.perf_counter()
        for _batch in model.sample_batches(rows, range(len(rows)), 0, len(rows), inputs=inputs, **options):
            pass
        seconds = time.perf_counter() - start
    return seconds / len(rows)


def device_in_words(model: Generative) -> str:
    """What a model computes on, for a time to mean something."""
    return f"CPU, {torch.get_num_threads()} threads" if model.device.type == "cpu" else "CUDA"
