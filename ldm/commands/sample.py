"""``ldm sample``: images with asked covariates, label maps, images or texts, in the cohort's space."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import Progress

from ldm.commands.run import check_counts, plain, require_file
from ldm.conditioning.build import SETTINGS
from ldm.data.images import read
from ldm.data.stored import split_reference
from ldm.data.table import Table, expect_no_misspelt_column, read_table
from ldm.errors import LdmError, nearest
from ldm.model.file import read_header
from ldm.model.generative import Generative
from ldm.model.inputs import Inputs
from ldm.model.load import load_generative
from ldm.model.output import write_samples
from ldm.training import figures
from ldm.training.panels import describe

logger = logging.getLogger(__name__)

_COLUMN = re.compile(r"\{(\w+)\}")
SHOWN = 16  # samples in the mosaic
DEFAULT_COUNT = 16  # samples when neither `n` nor a table says how many
OPTIONS = {
    "steps": "num_inference_steps",
    "sampler": "sampler",
    "guidance_scale": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "timestep_spacing": "timestep_spacing",
}
SAMPLING_KEYS = (*OPTIONS, "eta")  # all settings of how images are drawn


def run(config: DictConfig) -> list[Path]:
    """Draw samples and write them with their table, mosaic and provenance; returns the images' paths."""
    check_counts(config, "batch_size", *(["n"] if config.n is not None else []))
    out = Path(config.run_dir)
    model, path = load_model(config)
    table = asked_table(config.covariates)
    given = asked_inputs(config, table)
    rows = asked_rows(config.covariates, table, model, given)
    rows, inputs = model.requests(rows, given, _count(config), config.seed)
    paths = draw(model, path, out, rows, config, inputs)
    mosaic_of(model, paths[:SHOWN], rows, out / "mosaic.png")
    logger.info("%d samples, their table and mosaic.png are in %s", len(paths), out)
    return paths


def load_model(config: DictConfig) -> tuple[Generative, Path]:
    """The model on the fastest device."""
    path = require_file(config.model, "model", "train-ldm")
    return load_generative(path, "cuda" if torch.cuda.is_available() else "cpu"), path


def draw(
    model: Generative,
    path: Path,
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    config: DictConfig,
    inputs: Inputs | None = None,
) -> list[Path]:
    """Write one sample a row and its inputs, with a progress bar."""
    expect_known_options(model, config)
    options = sampling_options(config)
    files = files_sha256(inputs) if inputs else {}
    provenance = provenance_of(model, path, vars(model.settings(options)), config.get("precision", "auto"), files)
    with Progress() as bar:
        task = bar.add_task("sampling", total=len(rows))
        return write_samples(
            model,
            out,
            rows,
            config.seed,
            provenance,
            config.batch_size,
            config.get("precision", "auto"),
            options,
            lambda count: bar.advance(task, count),
            inputs,
        )


def provenance_of(
    model: Generative, path: Path, sampling: Mapping[str, Any], precision: str, files: Mapping[str, str]
) -> dict[str, Any]:
    """What images depend on beside what is asked of each: model, sampling, and the hashes of the files given."""
    return {
        "model_sha256": read_header(path)["tensors_sha256"],
        "simulated_training_data": model.header.get("simulated", False),
        "sampling": dict(sampling),
        "precision": precision,
        **({"files_sha256": dict(files)} if files else {}),
    }


def sampling_options(config: DictConfig) -> dict[str, Any]:
    """What was asked for beside the model's defaults, in the model's words."""
    asked = {name: config.get(key) for key, name in OPTIONS.items()}
    options = {name: plain(v) for name, v in asked.items() if v is not None}
    return options if config.get("eta") is None else options | {"options": {"eta": config.eta}}


def expect_known_options(model: Generative, config: DictConfig) -> None:
    """Refuse what the model has no choice of, by the name that was typed.

    Raises:
        LdmError: such as steps of a GAN.
    """
    known = vars(model.defaults)
    for key, name in {**OPTIONS, "eta": "options"}.items():
        if config.get(key) is not None and name not in known:
            legal = ", ".join(one for one, other in OPTIONS.items() if other in known) or "none"
            raise LdmError(f"{key} is no sampling option of the {model.what}; legal: {legal}.")


def asked_table(covariates: Any, key: str = "covariates") -> Table | None:
    """The table that ``covariates`` names; None where it is a mapping, a list of mappings or nothing.

    Args:
        covariates: what was given.
        key: the setting that it was given as.

    Raises:
        LdmError: there is no such file.
    """
    if covariates is None or isinstance(covariates, DictConfig | ListConfig):
        return None
    if not Path(str(covariates)).is_file():
        remedy = "Give a TSV or CSV file" + (", or {age: 70}." if key == "covariates" else ".")
        raise LdmError(f"{key}={covariates}: there is no such table. {remedy}")
    return read_table(Path(str(covariates)))


def asked_rows(
    covariates: Any, table: Table | None, model: Generative, inputs: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Rows of a table, of one mapping or of a list of mappings; None stays None.

    A table's columns that are no covariates of the model (such as participant_id) are left aside, unless one looks
    like a covariate that the table lacks; "n/a" is null. A table may do without covariates if it fills in ``inputs``.
    """
    if covariates is None:
        return None
    if isinstance(covariates, DictConfig):
        return [plain(covariates)]
    if table is None:
        return [dict(row) for row in plain(covariates)]
    known = [name for name in table.columns if name in model.schema.names]
    if not known and not inputs:
        raise LdmError(f"{covariates} has no column of the model's covariates: {', '.join(model.schema.names)}.")
    expect_no_misspelt_column(Path(str(covariates)), table.columns, model.schema.names)
    return [{name: row[name] for name in known if row[name] is not None} for row in table.rows]


def asked_inputs(config: DictConfig, table: Table | None) -> dict[str, Any]:
    """``mask``, ``image`` and ``text``: one for all samples, a list, or, with {column}, one a row of the table.

    Where the column has no value, nothing is given.

    Raises:
        LdmError: a template without a table, or with a column that the table lacks.
    """
    given = {name: config.get(name) for name in SETTINGS if config.get(name) is not None}
    asked = {name: plain(value) if OmegaConf.is_config(value) else str(value) for name, value in given.items()}
    return {name: filled(name, value, table) for name, value in asked.items()}


def filled(name: str, value: Any, table: Table | None, key: str = "covariates") -> Any:
    """``value`` with the columns of a template filled in, one a row of the table; without a template as it is.

    Args:
        name: the setting that ``value`` was given as.
        value: with {column} in it, or without.
        table: whose rows fill it in.
        key: the setting that names the table.
    """
    columns = _COLUMN.findall(str(value))
    if not columns:
        return value
    if table is None:
        raise LdmError(f"{name}={value}: a template takes its columns from a table; set {key}=TABLE.")
    for column in columns:
        if column not in table.rows[0]:
            raise LdmError(
                f"{name}={value}: the table has no column '{column}'.{nearest(column, table.columns)} "
                f"Columns: {', '.join(table.columns)}."
            )
    return [_fill(value, row) for row in table.rows]


def _fill(value: Any, row: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _fill(one, row) for name, one in value.items()}
    if any(row[column] is None for column in _COLUMN.findall(str(value))):
        return None
    return _COLUMN.sub(lambda match: row[match[1]], str(value))


def files_sha256(inputs: Inputs) -> dict[str, str]:
    """SHA-256 of every file that is given; a sample depends on what is in it."""
    files = [
        file
        for name in ("mask", "image")
        for value in inputs.get(name, ())
        for file in (value.values() if isinstance(value, Mapping) else [value])
    ]
    paths = {str(file): split_reference(file)[0] for file in files if file is not None}
    missing = [file for file, path in paths.items() if not path.is_file()]
    if missing:
        raise LdmError(f"There is no file {missing[0]}.")
    return {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in paths.items()}


def mosaic_of(model: Generative, paths: Sequence[Path], rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """A picture of written samples, as a viewer would show the files."""
    shown = [read(path, spatial_dims=model.preprocessing.spatial_dims).array for path in paths]
    titles, rgb = [describe(row) for row in rows[: len(shown)]], model.preprocessing.is_rgb
    return figures.mosaic(shown, out, titles, (0, 255) if rgb else None, rgb=rgb)


def _count(config: DictConfig) -> int | None:
    """Number of samples; None is one a row."""
    return DEFAULT_COUNT if config.n is None and not asks_for_several(config) else config.n


def asks_for_several(config: DictConfig) -> bool:
    """Whether covariates or inputs are a table or a list, whose length says how many images there are."""
    asked = [config.covariates, *(config.get(name) for name in SETTINGS)]
    return isinstance(config.covariates, str) or any(isinstance(one, ListConfig) for one in asked)
