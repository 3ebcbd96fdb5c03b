"""``ldm ema``: an average of another length, from the snapshots that a training left."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from torch import Tensor

from ldm.commands.run import require_file
from ldm.errors import LdmError
from ldm.model.file import differences
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.snapshots import Snapshot, find_snapshots, reconstruct

logger = logging.getLogger(__name__)

SNAPSHOTS = "ema_snapshots"  # below the run folder
FAR = 0.1  # more of a profile than this left out is worth a warning


def run(config: DictConfig) -> list[Path]:
    """Write ``model-sigma_rel<width>.safetensors`` of every width asked for; returns the files."""
    run_dir = Path(config.run_dir)
    path = require_file(run_dir / "model.safetensors", "diffusion model", "train-ldm")
    snapshots = find_snapshots(run_dir / SNAPSHOTS)
    step = snapshot_step(snapshots, config.step, run_dir)
    model, written = LatentDiffusionModel.load(path), []
    for sigma_rel in config.sigma_rel if isinstance(config.sigma_rel, ListConfig) else [config.sigma_rel]:
        parameters, left = reconstruct(snapshots, sigma_rel, step)
        replace_parameters(model, parameters, run_dir / SNAPSHOTS)
        model.header.pop("ema_decay", None)
        average = {"sigma_rel": sigma_rel, "step": step, "profile_left": left}
        model.header |= {"metrics": {}, "steps": step, "posthoc_ema": average}
        written.append(run_dir / f"model-sigma_rel{sigma_rel}.safetensors")
        model.save(written[-1])
        logger.info("sigma_rel %g at step %d: %s, %.2g of the profile left.", sigma_rel, step, written[-1], left)
        if left > FAR:
            logger.warning("That is far from the snapshots' widths: keep one nearer (ldm.posthoc_ema.sigma_rels).")
    return written


def snapshot_step(snapshots: list[Snapshot], asked: int | None, run_dir: Path) -> int:
    """The step asked for, or that of the last snapshot.

    Raises:
        LdmError: no snapshots, or none of that step.
    """
    if not snapshots:
        raise LdmError(f"{run_dir} holds no snapshots: set ldm.posthoc_ema.every=<steps> when training.")
    steps = sorted({snapshot.step for snapshot in snapshots})
    if asked is not None and asked not in steps:
        raise LdmError(f"step is {asked}; there are snapshots of {', '.join(map(str, steps))}.")
    return steps[-1] if asked is None else asked


def replace_parameters(model: LatentDiffusionModel, parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Put an average's parameters into the model's network; buffers are the same for all averages.

    Raises:
        LdmError: they are of another network.
    """
    own = dict(model.network.named_parameters())
    faults = differences(own, parameters)
    if faults:
        raise LdmError(f"{folder} does not fit model.safetensors beside it:\n  " + "\n  ".join(faults))
    for name, parameter in own.items():
        parameter.data.copy_(parameters[name])
