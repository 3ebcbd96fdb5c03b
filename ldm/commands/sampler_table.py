"""The sampler table of an evaluation: the same model and requests, drawn with other samplers or fewer calls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.commands.held_out import read_sample
from ldm.commands.run import section
from ldm.commands.sample import SAMPLING_KEYS, draw, expect_known_options, sampling_options
from ldm.errors import LdmError, nearest
from ldm.evaluation.comparison import agreements, file_slug
from ldm.evaluation.distances import OTHER, SAMPLES
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.instruments import Instrument
from ldm.model.generative import Generative
from ldm.model.output import image_paths, sample_name

CONFIGURED = "as configured"


def read_samplers(config: DictConfig, model: Generative, seed: int) -> dict[str, DictConfig]:
    """Name -> the evaluation's settings with those of ``samplers.<name>`` in their places.

    Args:
        config: of the evaluation.
        model: that draws.
        seed: of the noise of all of them.

    Raises:
        LdmError: a setting that is none of sampling, or that the model does not know; a name that is taken.
    """
    found = {}
    for name, given in section(config, "samplers").items():
        where = f"samplers.{name}"
        if not isinstance(given, Mapping):
            raise LdmError(f"{where} is {given!r}; give settings of ldm sample, e.g. {{steps: 10}}.")
        for key in given:
            if key not in SAMPLING_KEYS:
                legal = ", ".join(SAMPLING_KEYS)
                raise LdmError(f"{where}.{key} is not a setting.{nearest(key, SAMPLING_KEYS)} Legal: {legal}.")
        if str(name) == CONFIGURED:
            raise LdmError(f"{where}: the first row is called like this; choose another name.")
        own = {"eta": None} if "sampler" in given else {}  # what belongs to the evaluation's sampler, not to another
        replaced = {**OmegaConf.to_container(config, resolve=True), **own, **given, "seed": seed}
        found[str(name)] = OmegaConf.create(replaced)
        try:
            expect_known_options(model, found[str(name)])
            model.settings(sampling_options(found[str(name)]))
        except LdmError as error:
            raise LdmError(f"{where}: {error}") from error
    return found


def draw_samplers(
    samplers: Mapping[str, DictConfig],
    model: Generative,
    path: Path,
    configured: ImageSet,
    inputs: Mapping[str, Sequence[Any]],
) -> dict[str, ImageSet]:
    """Name -> images of the covariates and noise of ``configured``, through files."""
    found = {}
    for name, config in samplers.items():
        folder = Path(config.run_dir) / "samplers" / file_slug(name)
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
        samplers: name -> settings; :data:`CONFIGURED` -> those of the evaluation.
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
        agreement = {}
        if instrument is not None:
            agreement = agreements(instrument, model.schema, one.rows, one.images, one.subjects)
        table[name] = {
            "sampling": ", ".join(f"{key} {value}" for key, value in settings if value),
            "seconds_a_sample": seconds_a_sample(model, one.rows[:size], given, options),
            "agreement": agreement,
            "distance": rows.get(SAMPLES if name == CONFIGURED else OTHER.format(name)),
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
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}" if model.device.type == "cpu" else "CUDA"
