"""``ldm sample``: images with asked covariates, in the cohort's space."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.progress import Progress

from ldm.commands.run import plain, require_file
from ldm.data.images import read
from ldm.data.table import read_table
from ldm.errors import LdmError
from ldm.model.file import read_header
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.output import write_samples
from ldm.training import figures
from ldm.training.panels import describe

logger = logging.getLogger(__name__)

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


def run(config: DictConfig) -> list[Path]:
    """Draw samples and write them with their table, mosaic and provenance; returns the images' paths."""
    for name in ("n", "batch_size"):
        if config[name] is not None and config[name] < 1:
            raise LdmError(f"{name} is {config[name]}; legal: 1 or more.")
    out = Path(config.run_dir)
    model, path = load_model(config)
    rows = model.covariate_rows(asked_rows(config.covariates, model), _count(config), config.seed)
    paths = draw(model, path, out, rows, config)
    mosaic_of(model, paths[:SHOWN], rows, out / "mosaic.png")
    logger.info("%d samples, their table and mosaic.png are in %s", len(paths), out)
    return paths


def load_model(config: DictConfig) -> tuple[LatentDiffusionModel, Path]:
    """The model on the fastest device."""
    path = require_file(config.model, "diffusion model", "train-ldm")
    return LatentDiffusionModel.load(path, "cuda" if torch.cuda.is_available() else "cpu"), path


def draw(
    model: LatentDiffusionModel, path: Path, out: Path, rows: Sequence[Mapping[str, Any]], config: DictConfig
) -> list[Path]:
    """Write one sample a row, with a progress bar."""
    options = sampling_options(config)
    provenance = {
        "model_sha256": read_header(path)["tensors_sha256"],
        "sampling": {**vars(model.defaults), **options},
        "precision": config.get("precision", "auto"),
    }
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
        )


def sampling_options(config: DictConfig) -> dict[str, Any]:
    """What was asked for beside the model's defaults, in the model's words."""
    asked = {name: config.get(key) for key, name in OPTIONS.items()}
    options = {name: plain(v) if OmegaConf.is_config(v) else v for name, v in asked.items() if v is not None}
    return options if config.get("eta") is None else options | {"options": {"eta": config.eta}}


def asked_rows(covariates: Any, model: LatentDiffusionModel) -> list[dict[str, Any]] | None:
    """Rows of a table, of one mapping or of a list of mappings; None stays None.

    A table's columns that are no covariates of the model (such as participant_id) are left aside, unless one looks
    like a covariate that the table lacks; "n/a" is null.
    """
    if covariates is None:
        return None
    if isinstance(covariates, DictConfig):
        return [plain(covariates)]
    if isinstance(covariates, ListConfig):
        return [dict(row) for row in plain(covariates)]
    path = Path(str(covariates))
    if not path.is_file():
        raise LdmError(f"covariates={covariates}: there is no such table. Give a TSV or CSV file, or {{age: 70}}.")
    table = read_table(path)
    known = [name for name in table.columns if name in model.schema.names]
    if not known:
        raise LdmError(f"{path} has no column of the model's covariates: {', '.join(model.schema.names)}.")
    _expect_no_misspelt_column(path, table.columns, model.schema.names)
    return [{name: row[name] for name in known if row[name] is not None} for row in table.rows]


def _expect_no_misspelt_column(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    absent = {name.casefold(): name for name in names if name not in columns}
    for column in columns:
        # Closer than for other hints: a table may well have a column 'site' that is not meant to be 'sex'.
        match = [] if column in names else difflib.get_close_matches(column.casefold(), absent, n=1, cutoff=0.8)
        if match:
            raise LdmError(
                f"{path}: column '{column}' is no covariate of the model. Did you mean '{absent[match[0]]}'? "
                "Rename or remove it."
            )


def mosaic_of(model: LatentDiffusionModel, paths: Sequence[Path], rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """A picture of written samples, as a viewer would show the files."""
    shown = [read(path, spatial_dims=model.preprocessing.spatial_dims).array for path in paths]
    titles, rgb = [describe(row) for row in rows[: len(shown)]], model.preprocessing.is_rgb
    return figures.mosaic(shown, out, titles, (0, 255) if rgb else None, rgb=rgb)


def _count(config: DictConfig) -> int | None:
    """Number of samples; None is one a row."""
    table = isinstance(config.covariates, str | ListConfig)
    return DEFAULT_COUNT if config.n is None and not table else config.n
