"""``report.html``: one self-contained page, verdict first, that opens without a server."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ldm.evaluation import masks
from ldm.model.generative import Generative

CAPTIONS = {
    "samples.png": "Samples, asked with the covariates of held-out subjects: axial, coronal and sagittal centre plane.",
    "real.png": "The held-out subjects with these covariates.",
}


def write_report(
    path: Path,
    model: Generative,
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
    values, levels = (
        {name: entry for name, entry in metrics.get("fidelity", {}).items() if entry["kind"] == kind}
        for kind in ("continuous", "categorical")
    )
    scatter = {
        name: [_embed(figures / f"measured_{kind}_{name}.png") for kind in ("real", "samples")] for name in values
    }
    page = _template("report.html").render(
        cohort=metrics["cohort"],
        simulated=metrics["simulated"],
        metrics=metrics,
        verdict=verdict(metrics),
        distances=metrics.get("distances"),
        masks=metrics.get("mask_dice"),
        what=model.what,
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
    return _write(path, page)


def write_folder_report(path: Path, real: Path, synthetic: Path, distances: Mapping[str, Any]) -> Path:
    """Write the page that compares two folders of images.

    Args:
        path: ``report.html``.
        real, synthetic: the folders.
        distances: see :func:`ldm.evaluation.distances.compare`.
    """
    lines = distances_in_words(distances)
    page = _template("folders.html").render(real=real, synthetic=synthetic, verdict=lines, distances=distances)
    return _write(path, page)


def write_page(path: Path, template: str, pictures: Mapping[str, Path], **content: Any) -> Path:
    """Write a page of another template; ``pictures`` are embedded under their names."""
    embedded = {name: _embed(picture) for name, picture in pictures.items()}
    return _write(path, _template(template).render(pictures=embedded, **content))


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("ldm.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"figures": three_figures, "percent": percent}
    return environment.get_template(name)


def _write(path: Path, page: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page)
    os.replace(temporary, path)
    return path


def verdict(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in plain sentences."""
    lines, reconstruction = [], metrics.get("reconstruction")
    if reconstruction is not None:
        lines.append(
            f"The model reconstructs {reconstruction['n']} held-out images with a PSNR of "
            f"{reconstruction['psnr_mean']:.1f} dB (standard deviation {reconstruction['psnr_std']:.1f})."
        )
    lines += [_verdict_on(name, entry) for name, entry in metrics.get("fidelity", {}).items()]
    lines += masks_in_words(metrics.get("mask_dice", {}).get("labels", {}))
    spread = metrics["diversity"]
    if "samples asked as these" in spread:
        alike = {name: values["ms_ssim"]["mean"] for name, values in spread.items()}
        rebuilt = alike.get("the same, reconstructed")
        between = "" if rebuilt is None else f" after reconstruction, which takes detail away, {rebuilt:.3f};"
        lines.append(
            f"Two held-out subjects with like covariates have an MS-SSIM of {alike['real, nearest covariates']:.3f};"
            f"{between} two samples asked with their covariates {alike['samples asked as these']:.3f}. Higher is more "
            "alike."
        )
    return lines + (distances_in_words(metrics["distances"]) if "distances" in metrics else [])


def masks_in_words(labels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each label that samples were asked to have: their Dice, that of the instrument, and chance."""
    lines = []
    for name, rows in labels.items():
        means = {row: f"{values['mean']:.3f}" for row, values in rows.items() if values["n"]}
        if masks.SAMPLES in means:
            lines.append(f"{name}, Dice: " + "; ".join(f"{row} {mean}" for row, mean in means.items()) + ".")
    return lines


def distances_in_words(distances: Mapping[str, Any]) -> list[str]:
    """How far the last row's images, those that were generated, are from the reference, and whether it can be told."""
    rows, floor, control = (distances[name] for name in ("rows", "floor", "control"))
    *_, generated = rows
    lines = [
        f"Distance from {distances['protocol']['reference']['n']} images of the "
        f"{distances['protocol']['reference']['images']} (Fréchet, {distances['protocol']['n']} images each): "
        f"{generated} {rows[generated]['frechet']:.3g}; {floor} {rows[floor]['frechet']:.3g}; "
        f"{control} {rows[control]['frechet']:.3g}."
    ]
    if not distances["control_is_worse"]:
        lines.append(
            f"With these features and this number of images the Fréchet distance does not tell {control} from others: "
            "it says nothing about the generated images either."
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
