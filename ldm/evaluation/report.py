"""``report.html``: one self-contained page, verdict first, that opens without a server."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ldm.model.latent_diffusion import LatentDiffusionModel

CAPTIONS = {
    "samples.png": "Samples, asked with the covariates of held-out subjects: axial, coronal and sagittal centre plane.",
    "real.png": "The held-out subjects with these covariates.",
}


def write_report(
    path: Path,
    model: LatentDiffusionModel,
    metrics: Mapping[str, Any],
    figures: Path,
    curves: Mapping[str, Path],
) -> Path:
    """Write the page; pictures are embedded.

    Args:
        path: ``report.html``.
        model: what was evaluated.
        metrics: content of ``metrics.json``.
        figures: folder with the pictures of this evaluation.
        curves: title -> picture, of the trainings.
    """
    environment = Environment(
        loader=PackageLoader("ldm.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figures": three_figures, "percent": percent}
    values, levels = (
        {name: entry for name, entry in metrics.get("fidelity", {}).items() if entry["kind"] == kind}
        for kind in ("continuous", "categorical")
    )
    scatter = {
        name: [_embed(figures / f"measured_{kind}_{name}.png") for kind in ("real", "samples")] for name in values
    }
    html = environment.get_template("report.html").render(
        cohort=metrics["cohort"],
        simulated=metrics["simulated"],
        metrics=metrics,
        verdict=verdict(metrics),
        mosaics=[(caption, _embed(figures / name)) for name, caption in CAPTIONS.items()],
        values=values,
        levels=levels,
        scatter=scatter,
        curves=[(title, _embed(picture)) for title, picture in curves.items()],
        model={
            "parameters": f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.1f} M",
            "latent": "x".join(map(str, model.latent_shape)),
            "condition": model.condition_in_words(),
            "sampling": ", ".join(f"{k} {v}" for k, v in vars(model.defaults).items() if v is not None),
            "steps": model.header.get("steps", "unknown"),
            "sha256": metrics["model_sha256"][:16],
        },
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(html)
    os.replace(temporary, path)
    return path


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in plain sentences."""
    reconstruction = metrics["reconstruction"]
    lines = [
        f"The first stage reconstructs {reconstruction['n']} held-out images with a PSNR of "
        f"{reconstruction['psnr_mean']:.1f} dB (standard deviation {reconstruction['psnr_std']:.1f})."
    ]
    lines += [_verdict_on(name, entry) for name, entry in metrics.get("fidelity", {}).items()]
    spread = metrics["diversity"]
    if "samples asked as these" in spread:
        real, rebuilt, drawn = (
            spread[name]["ms_ssim"]["mean"]
            for name in ("real, nearest covariates", "the same, reconstructed", "samples asked as these")
        )
        lines.append(
            f"Two held-out subjects with like covariates have an MS-SSIM of {real:.3f}; after reconstruction by the "
            f"first stage, which takes noise and fine detail away, {rebuilt:.3f}; two samples asked with their "
            f"covariates {drawn:.3f}. Higher is more alike."
        )
    return lines


def _verdict_on(name: str, entry: Mapping[str, Any]) -> str:
    samples, real = entry["samples"], entry["instrument_on_held_out"]
    if entry["kind"] == "categorical":
        return (
            f"{name}: {percent(samples)} of {samples['n']} samples show the level that was asked for; the instrument "
            f"itself finds the true one in {percent(real)} of {real['n']} held-out images."
        )
    return (
        f"{name}: measured in {samples['n']} samples it follows what was asked with r = {samples['r']:.3f} and "
        f"slope {samples['slope']:.2f}; the instrument itself, on {real['n']} held-out images with known truth, "
        f"reaches r = {real['r']:.3f} and slope {real['slope']:.2f}."
    )


def percent(share: Mapping[str, Any]) -> str:
    """A share of agreement with its interval."""
    low, high = share["interval"]
    return f"{share['accuracy']:.1%} (95 %: {low:.1%} to {high:.1%})"


def three_figures(value: float) -> str:
    """A number with at least three figures: 12,345 or 0.0123."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
