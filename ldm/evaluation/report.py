"""``report.html``: one self-contained page, verdict first, that opens without a server.

It is made of what stands in the folder of an evaluation: ``metrics.json``, ``figures/`` and, if there is one,
``audit.json``. Parts that are missing are left out, so that an older evaluation, or one without a feature network, has
a report too, and an audit that comes later only needs :func:`write_report` again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import LdmError
from ldm.evaluation import goals, masks
from ldm.evaluation.audit_report import NEAREST, audit_fragment
from ldm.evaluation.pages import embedded, template
from ldm.files import write_text

CURVES = {"curves_first_stage.png": "first stage", "curves_model.png": "model"}
AUDIT = "audit.json"
FOLDERS = {"real.png": "Real images.", "samples.png": "Synthetic images."}


def write_report(folder: Path) -> Path:
    """Write the page of an evaluation's folder; pictures are embedded.

    Args:
        folder: holds ``metrics.json``; pictures are in its ``figures/``. ``audit.json``, if it is there, is that of
            ``ldm audit``; one of another model, or of images that were drawn with other sampling settings, is left
            out, and of the latter the verdict says so. Its pictures, which show training scans, are taken from
            ``figures/`` if they were put there.

    Returns:
        ``report.html`` in the folder.

    Raises:
        LdmError: no ``metrics.json``, or a JSON file that cannot be read.
    """
    folder = Path(folder)
    metrics, audit = _read(folder / "metrics.json"), _read(folder / AUDIT, optional=True)
    if audit and audit.get("model_sha256") != metrics.get("model_sha256"):
        audit = None
    found, figures = goals.verdicts(metrics, audit), folder / "figures"
    if audit and goals.audit_differs(audit, metrics.get("sampling")):
        audit = None  # the verdict says why
    nearest = {name: figures / NEAREST.format(name) for name in (audit or {}).get("spaces", ())}
    nearest = {name: path for name, path in nearest.items() if path.is_file()}
    page = template("report.html").render(
        metrics=metrics,
        verdicts=found,
        overall=goals.overall(found),
        cohort=metrics.get("cohort", "a cohort"),
        simulated=metrics.get("simulated", False),
        what=metrics.get("model", {}).get("kind"),
        distances=metrics.get("distances"),
        masks=metrics.get("mask_dice"),
        masks_in_words=masks_in_words(metrics.get("mask_dice", {}).get("labels", {})),
        images=_images(figures),
        values=_of_kind(metrics, figures, "continuous"),
        levels=_of_kind(metrics, figures, "categorical"),
        sweeps={name: _sweep(name, entry, figures) for name, entry in metrics.get("sweep", {}).items()},
        audit=audit_fragment(audit, nearest) if audit and "spaces" in audit else None,
        nearest=nearest,
        curves=[(title, embedded(figures / name)) for name, title in CURVES.items() if (figures / name).is_file()],
        protocol=_protocol(metrics),
    )
    return write_text(folder / "report.html", page)


def write_folder_report(folder: Path) -> Path:
    """Write the page that compares two folders of images, ``report.html``; returns it.

    Args:
        folder: holds ``metrics.json`` with ``real``, ``synthetic``, ``goals``, ``distances`` and perhaps ``ms_ssim``;
            mosaics are in its ``figures/``.
    """
    metrics, figures = _read(folder / "metrics.json"), folder / "figures"
    found = [goals.realism(metrics["distances"], metrics["goals"]["frechet_ratio"])]
    found.append(goals.diversity(metrics.get("ms_ssim"), metrics["goals"]["ms_ssim"]))
    parts = {"Distances": metrics["distances"]["protocol"], "Likeness": metrics.get("ms_ssim", {}).get("protocol")}
    page = template("folders.html").render(
        metrics=metrics,
        real=metrics["real"],
        synthetic=metrics["synthetic"],
        verdicts=found,
        overall=goals.overall(found),
        distances=metrics["distances"],
        images=[(caption, embedded(figures / name)) for name, caption in FOLDERS.items() if (figures / name).is_file()],
        protocol={name: _indented(part) for name, part in parts.items() if part},
    )
    return write_text(folder / "report.html", page)


def write_page(path: Path, name: str, pictures: Mapping[str, Path], **content: Any) -> Path:
    """Write a page of another template; ``pictures`` are embedded under their names."""
    inside = {title: embedded(picture) for title, picture in pictures.items()}
    return write_text(path, template(name).render(pictures=inside, **content))


def _images(figures: Path) -> list[tuple[str, str]]:
    """Captions and pictures: pairs side by side, or, in an older evaluation, one mosaic after the other."""
    if (figures / "pairs.png").is_file():
        caption = "Real held-out images, and at the right of each the generated one with the same covariates."
        return [(caption, embedded(figures / "pairs.png"))]
    captions = {
        "real.png": "Real held-out images.",
        "samples.png": "Generated images, in the same order, asked for the covariates of these.",
    }
    return [(text, embedded(figures / name)) for name, text in captions.items() if (figures / name).is_file()]


def _of_kind(metrics: Mapping[str, Any], figures: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Covariates of one kind, with their scatter plots."""
    found = {}
    for name, entry in metrics.get("fidelity", {}).items():
        if entry.get("kind", "continuous") == kind:
            names = [figures / f"measured_{which}_{name}.png" for which in ("real", "samples")]
            found[name] = {"share": None, **entry, "pictures": [embedded(path) for path in names if path.is_file()]}
    return found


def _sweep(name: str, entry: Mapping[str, Any], figures: Path) -> dict[str, Any]:
    names = [figures / f"sweep_{name}.png", *(figures / f"sweep_{name}_{title}.png" for title in entry["measured"])]
    return {**entry, "pictures": [embedded(path) for path in names if path.is_file()]}


def _protocol(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Title -> what the numbers depend on."""
    parts = {
        "Distances": metrics.get("distances", {}).get("protocol"),
        "Instruments": metrics.get("instruments"),
        "Likeness (MS-SSIM)": metrics.get("ms_ssim", {}).get("protocol"),
        "Images": {name: metrics[name] for name in ("n", "seeds", "split_sha256", "model_sha256") if name in metrics},
        "Goals": metrics.get("goals"),
    }
    return {title: _indented(part) for title, part in parts.items() if part}


def _indented(part: Any) -> str:
    return json.dumps(part, indent=1, ensure_ascii=False)


def _read(path: Path, optional: bool = False) -> dict[str, Any] | None:
    if optional and not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LdmError(f"{path}: cannot be read ({error}); the report is made of it. Run ldm evaluate.") from error


def masks_in_words(labels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each label that samples were asked to have: their Dice, that of the instrument, and chance."""
    lines = []
    for name, rows in labels.items():
        means = {row: f"{values['mean']:.3f}" for row, values in rows.items() if values["n"]}
        if masks.OF_SAMPLES in means:
            lines.append(f"{name}, Dice: " + "; ".join(f"{row} {mean}" for row, mean in means.items()) + ".")
    return lines
