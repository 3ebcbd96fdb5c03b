"""Validation of a model that generates label maps: few-step ensembles on held-out images, and their Dice."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pytorch_lightning import LightningModule, Trainer

from ldm.errors import LdmError
from ldm.metrics.segmentation import dice
from ldm.model.ensemble import draw_ensembles
from ldm.model.file import read_header
from ldm.training import figures
from ldm.training.logging import read_metrics
from ldm.training.panels import FigureCallback

logger = logging.getLogger(__name__)

METRIC = "ldm/val/dice"
SHOWN = 4


@dataclass(frozen=True)
class LabelledImage:
    """A held-out image with its label map.

    Attributes:
        id: of its record.
        subject: whose it is.
        image: ``(C, *S)``, what the model is given.
        truth: ``(*S)`` class indices.
    """

    id: str
    subject: str
    image: np.ndarray
    truth: np.ndarray


class SegmentationPanels(FigureCallback):
    """Logs ``ldm/val/dice`` and draws image, truth, mean and variance of some ensembles, every validation.

    The loss falls for long after the masks are good, or bad; what a segmentation is worth is its Dice.

    Args:
        folder: run folder.
        cases: held-out images.
        members: label maps an image.
        steps: network calls each.
        keep_best: also keep the model of the best Dice so far, as ``model-best.safetensors``.
        patience: validations in a row without a better Dice, after which training stops; None for never.

    Raises:
        LdmError: one of these two where no case has a class, so that there is no Dice.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[LabelledImage],
        members: int,
        steps: int,
        keep_best: bool = False,
        patience: int | None = None,
    ) -> None:
        super().__init__(folder)
        measurable = any(case.truth.any() for case in cases)
        if not measurable and (keep_best or patience is not None):
            raise LdmError(
                f"ldm.keep_best and ldm.patience go by {METRIC}, and none of the {len(cases)} held-out images has a "
                "class: raise ldm.val_samples, give the validation split images with one, or leave the two out."
            )
        if cases and not measurable:
            logger.warning("None of the %d held-out images has a class: there is no %s.", len(cases), METRIC)
            cases = ()
        self.cases, self.members, self.steps = list(cases), members, steps
        self.best = Path(folder) / "model-best.safetensors" if keep_best else None
        self.patience, self.scores = patience, []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Count validations of earlier sessions too; a run that has stopped by itself does not go on.

        A run that starts anew in a folder that was used before knows nothing of what was there; its best model is moved
        aside.
        """
        path = self.folder.parent / "metrics.jsonl"
        goes_on = module.step > 0 and path.is_file()
        logged = read_metrics(path).get(METRIC, []) if goes_on else []
        self.scores = [value for step, value in logged if step <= module.step]  # later ones will be taken anew
        if trainer.is_global_zero and not goes_on and self.best is not None and self.best.is_file():
            os.replace(self.best, self.best.with_name("model-best-before.safetensors"))
        self._stop_when_stale(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Segment, compare, draw; stop where that was long in vain."""
        if trainer.is_global_zero and self.cases:
            self._validate(trainer, module)
        self._stop_when_stale(trainer)

    def _stop_when_stale(self, trainer: Trainer) -> None:
        """All ranks stop together; only the first one knows the scores."""
        if self.patience is None:
            return
        since = len(self.scores) - 1 - int(np.argmax(self.scores)) if self.scores else 0
        if trainer.strategy.broadcast(since >= self.patience):
            logger.info("No better %s in %d validations: training stops.", METRIC, since)
            trainer.should_stop = True

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        model, names = module.model.eval(), [case.id for case in self.cases]
        ensembles = draw_ensembles(
            [model], [case.image for case in self.cases], names, self.members, num_inference_steps=self.steps
        )
        found = [ensemble.labels for ensemble in ensembles]
        scores = class_dice(found, self.cases, model.classes.names)
        mean = float(np.mean(list(scores.values())))
        module.record({METRIC: mean, **{f"ldm/val/dice/{name}": value for name, value in scores.items()}})
        self.scores.append(mean)
        self._keep(module, mean)
        channels = model.header["conditioners"]["image"]["channels"]
        rows = [
            panel_row(
                dict(zip(channels, case.image, strict=True)), case.truth, one.labels, 1 - one.mean[0], one.variance
            )
            for case, one in zip(self.cases, ensembles, strict=True)
        ]
        path = self.folder / f"segmentation_{module.step:07d}.png"
        figures.segmentation_panel(rows[:SHOWN], names[:SHOWN], path)
        self.publish(trainer, "ldm/segmentation", path, module.step)
        self.curves(self.folder, ("ldm/train/loss", "ldm/val/loss", METRIC))

    def _keep(self, module: LightningModule, mean: float) -> None:
        """Write the model if it is the best so far; how good the last one was, its file says."""
        if self.best is None:
            return
        before = read_header(self.best)["metrics"][METRIC] if self.best.is_file() else -1.0
        if mean > before:
            module.model.header |= {"metrics": {METRIC: mean}, "steps": module.step}
            module.model.save(self.best)


def class_dice(found: Sequence[np.ndarray], cases: Sequence[LabelledImage], classes: Sequence[str]) -> dict[str, float]:
    """Dice of each class that any subject has, averaged over those; a subject's images are counted together."""
    subjects: dict[str, list[int]] = defaultdict(list)
    for position, case in enumerate(cases):
        subjects[case.subject].append(position)
    pairs = [
        (np.stack([found[i] for i in positions]), np.stack([cases[i].truth for i in positions]))
        for positions in subjects.values()
    ]
    scores = {}
    for index, name in enumerate(classes, 1):
        known = [dice(labels == index, truth == index) for labels, truth in pairs if (truth == index).any()]
        if known:
            scores[name] = float(np.mean(known))
    return scores


def panel_row(
    given: Mapping[str, np.ndarray],
    truth: np.ndarray | None,
    labels: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
) -> dict[str, np.ndarray | None]:
    """What a row of :func:`ldm.training.figures.segmentation_panel` shows, ``(*S)`` each; None for an unknown truth."""
    return {**given, "truth": truth, "segmentation": labels, "mean": mean, "variance": variance}
