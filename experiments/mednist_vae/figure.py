"""The figure of the study: reconstructions, lines between codes, draws of N(0, I), samples of the diffusion model.

    python experiments/mednist_vae/figure.py experiment=mednist_vae/lecture

Writes ``pictures.png``, with held-out pictures of the data set in it, and ``synthetic.png`` without, to the run folder
of the evaluation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from ldm.commands.held_out import held_out
from ldm.commands.main import conf_dir
from ldm.commands.stages import cohort_datamodule, prepared
from ldm.evaluation.distances import prior_images
from ldm.model.latent_diffusion import LatentDiffusionModel

COLUMNS = 12
STRIPS = ((0, 1), (8, 9), (4, 8))  # columns at the ends of a line: of one class, of one class, of two
Row = tuple[str, np.ndarray]  # caption, pictures (COLUMNS, H, W)


def main(config: DictConfig) -> None:
    """Draw both pictures."""
    model = LatentDiffusionModel.load(config.model)
    images, asked, _ = held_out(prepared(cohort_datamodule(config)), model.preprocessing.channels)
    ordered = sorted(range(len(images)), key=lambda i: asked[i]["class"])
    chosen = [ordered[i] for i in np.linspace(0, len(images) - 1, COLUMNS).astype(int)]  # two of each class
    real = torch.from_numpy(np.stack([images[i] for i in chosen]))  # (COLUMNS, 1, H, W)
    rows = [asked[i] for i in chosen]
    with torch.no_grad():
        codes, _ = model.first_stage.encode(real)  # (COLUMNS, 3, h, w), posterior means
        lines = [interpolation(model, codes[first], codes[last]) for first, last in STRIPS]
        reconstructed = decode(model, codes)
    prior = np.stack([image[0] for image in prior_images(model, 2 * COLUMNS, config.seed)])
    samples = model.sample(rows * 2, seed=config.seed, batch_size=2 * COLUMNS).images[:, 0]
    synthetic: list[Row] = [
        ("z ~ N(0, I), decoded", prior[:COLUMNS]),
        ("", prior[COLUMNS:]),
        ("diffusion model", samples[:COLUMNS]),
        ("", samples[COLUMNS:]),
    ]
    seen: list[Row] = [("held-out", real[:, 0].numpy()), ("reconstructed", reconstructed)]
    seen += [("straight line" if k == 0 else "", line) for k, line in enumerate(lines)]
    folder = Path(config.run_dir)
    draw([*seen, *synthetic], folder / "pictures.png")
    draw(synthetic, folder / "synthetic.png")


def interpolation(model: LatentDiffusionModel, first: Tensor, last: Tensor) -> np.ndarray:
    """Pictures along the straight line between two raw codes ``(3, h, w)``, both ends included."""
    share = torch.linspace(0, 1, COLUMNS).view(-1, 1, 1, 1)
    return decode(model, torch.lerp(first[None], last[None], share))


def decode(model: LatentDiffusionModel, codes: Tensor) -> np.ndarray:
    """Pictures ``(N, H, W)`` of raw codes ``(N, 3, h, w)``."""
    return model.decode(model.latent_space.to_scaled(codes.float()))[:, 0].float().numpy()


def draw(rows: list[Row], path: Path) -> None:
    """One strip of pictures a row, with its caption on the left."""
    figure = Figure(figsize=(0.8 * COLUMNS + 1.5, 0.82 * len(rows)))
    for axis, (caption, pictures) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axis.imshow(np.concatenate(list(pictures), axis=1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[], frame_on=False)
    figure.tight_layout(pad=0.2, h_pad=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    print(path)


if __name__ == "__main__":
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = compose("evaluate", sys.argv[1:])
    main(settings)
