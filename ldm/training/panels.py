"""Figures of every validation, on disk and in loggers that take images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.data.schema import Covariate
from ldm.training import figures

logger = logging.getLogger(__name__)


class FigureCallback(Callback):
    """Writes figures into ``figures/`` of the run and hands them to every logger that takes pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / "figures"

    def publish(self, trainer: Trainer, name: str, path: Path, step: int) -> None:
        """Hand a picture to the loggers, at the step of its metrics."""
        for one in trainer.loggers:
            if hasattr(one, "log_image"):
                one.log_image(key=name, images=[str(path)], step=step)
            elif isinstance(one, TensorBoardLogger):
                one.experiment.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def curves(self, folder: Path, names: Sequence[str]) -> None:
        """Draw ``metrics.jsonl``."""
        from ldm.training.logging import read_metrics

        metrics_file = folder.parent / "metrics.jsonl"
        if metrics_file.is_file():
            figures.curves(read_metrics(metrics_file), names, folder / "curves.png")


class ReconstructionPanels(FigureCallback):
    """Fixed held-out cases with their reconstruction and the difference, every validation.

    Args:
        folder: run folder.
        rgb: the images are RGB pictures.
        group: of the panels.
        drawn: metrics whose curves are drawn; none leaves them to another callback.
    """

    def __init__(
        self,
        folder: Path,
        rgb: bool = False,
        group: str = "vae",
        drawn: Sequence[str] = ("vae/train/loss", "vae/val/psnr", "vae/val/ssim", "vae/val/kl"),
    ) -> None:
        super().__init__(folder)
        self.rgb, self.group, self.drawn = rgb, group, tuple(drawn)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the cases that the module kept."""
        if not trainer.is_global_zero or not module.validation.get("panels"):
            return
        pairs = [(x.float().numpy(), y.float().numpy()) for x, y in module.validation["panels"]]
        path = figures.reconstruction_panel(
            pairs, self.folder / f"reconstruction_{module.step:07d}.png", module.image_range, self.rgb
        )
        self.publish(trainer, f"{self.group}/reconstruction", path, module.step)
        if self.drawn:
            self.curves(self.folder, self.drawn)


class SamplePanels(FigureCallback):
    """Fixed-seed samples and the conditioning test, every validation of a model that draws images.

    The conditioning test asks for the low and the high end of one covariate with the noise fixed. It logs the
    response, the root-mean-square change of the image over that between two noise seeds, and, for covariates
    that an instrument measures, the measured change over the asked change, or the share of images that show the
    level that was asked for (1 is obedience).

    Args:
        folder: run folder.
        rows: covariate rows of the fixed samples, from held-out subjects.
        steps: network calls a sample; None for a model that has no choice.
        measure: function of an image ``(C, *S)`` giving ``{covariate: value or level}``, or None.
        inputs: label maps and images of the same subjects, where the model is conditioned on them.
        group: of the panels and metrics.
        drawn: metrics whose curves are drawn.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        steps: int | None,
        measure: Callable[[np.ndarray], Mapping[str, float | str]] | None = None,
        inputs: Mapping[str, Sequence[Any]] | None = None,
        group: str = "ldm",
        drawn: Sequence[str] = ("ldm/train/loss", "ldm/val/loss"),
    ) -> None:
        super().__init__(folder)
        self.rows, self.steps, self.measure = list(rows), steps, measure
        self.inputs, self.group, self.drawn = dict(inputs or {}), group, tuple(drawn)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Sample, draw, measure."""
        if not trainer.is_global_zero or not self.rows:
            return
        model = module.model.eval()
        samples = model.sample(self.rows, seed=0, **_steps(self.steps), **self.inputs)
        path = figures.mosaic(
            samples.images,
            self.folder / f"samples_{module.step:07d}.png",
            [describe(row) for row in samples.covariates],
            model.preprocessing.value_range,
            rgb=model.preprocessing.is_rgb,
        )
        self.publish(trainer, f"{self.group}/samples", path, module.step)
        metrics = conditioning_test(model, self.rows, self.steps, self.measure, self.inputs)
        module.record({f"{self.group}/val/{name}": value for name, value in metrics.items()})
        self.curves(self.folder, self.drawn)


def conditioning_test(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    steps: int | None,
    measure: Callable[[np.ndarray], Mapping[str, float | str]] | None = None,
    inputs: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, float]:
    """Vary one covariate at a time with the noise fixed; see :class:`SamplePanels`.

    Args:
        model: a :class:`ldm.model.generative.Generative`.
        rows: one a noise seed; their other covariates are asked for by a model that never learned to go without.
        steps: network calls a sample; None for a model that has no choice.
        measure, inputs: see :class:`SamplePanels`.
    """
    results: dict[str, float] = {}
    others = [{}] * len(rows) if model.header.get("learned_null", True) else rows
    for covariate in model.schema:
        if covariate.kind == "continuous":
            low, high = covariate.range
            ends = (low + 0.2 * (high - low), low + 0.8 * (high - low))
        else:
            ends = (covariate.levels[0], covariate.levels[-1])
        asked = ([{**row, covariate.name: end} for row in others] for end in ends)
        first, last = (model.sample(one, seed=0, **_steps(steps), **(inputs or {})).images for one in asked)
        change = float(np.sqrt(np.mean((last - first) ** 2)))
        between = float(np.sqrt(np.mean((first - np.roll(first, 1, axis=0)) ** 2)))
        if between:
            results[f"response/{covariate.name}"] = change / between
        if measure is not None:
            measured = [[measure(image).get(covariate.name) for image in images] for images in (first, last)]
            results |= _obedience(covariate, ends, measured)
    return results


def _steps(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"num_inference_steps": steps}


def _obedience(
    covariate: Covariate, ends: tuple[Any, Any], measured: Sequence[Sequence[float | str | None]]
) -> dict[str, float]:
    """``slope/NAME`` of values or ``level/NAME`` of levels; empty unless every image could be measured."""
    if any(value is None for values in measured for value in values):
        return {}
    if covariate.kind == "categorical":
        right = [value == end for end, values in zip(ends, measured, strict=True) for value in values]
        return {f"level/{covariate.name}": float(np.mean(right))}
    slope = float(np.mean(measured[1]) - np.mean(measured[0])) / (ends[1] - ends[0])
    return {f"slope/{covariate.name}": slope} if np.isfinite(slope) else {}


def describe(row: Mapping[str, Any]) -> str:
    """A covariate row as a short title."""
    return ", ".join(f"{name} {_short(value)}" for name, value in row.items()) or "unconditional"


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
