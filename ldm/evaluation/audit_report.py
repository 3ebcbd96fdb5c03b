"""The result of an audit as a page of its own, as a fragment for other pages, and as pictures of the nearest pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.evaluation.audit import AuditResult, Scans
from ldm.evaluation.pages import embedded, template
from ldm.files import write_text
from ldm.training import figures

NEAREST = "nearest_{}.png"  # of a space
CAUTION = "The pictures show training scans: this page is for those who may see these."


def pair_pictures(
    result: AuditResult,
    synthetic: Sequence[np.ndarray],
    train: Scans,
    folder: Path,
    value_range: tuple[float, float] | None,
    rgb: bool = False,
) -> dict[str, Path]:
    """Write a picture of each space's nearest pairs, a synthetic image beside its nearest training scan.

    Returns:
        Space -> file.
    """
    paths = {}
    for name, pairs in result.worst.items():
        images, titles = [], []
        for pair in pairs:
            images += [synthetic[pair.synthetic], train.images[pair.train]]
            titles += [
                f"synthetic {pair.synthetic + 1}, {pair.distance:.3g}" + (" COPY" if pair.copy else ""),
                f"training {train.names[pair.train]}",
            ]
        path = Path(folder) / NEAREST.format(name)
        paths[name] = figures.mosaic(images, path, titles, value_range, 2 if images[0].ndim == 4 else 4, rgb)
    return paths


def audit_fragment(content: Mapping[str, Any], pictures: Mapping[str, Path] | None = None) -> str:
    """HTML for another page: headings of level 2, no styles of its own.

    Args:
        content: of ``audit.json``, see :meth:`AuditResult.to_dict`.
        pictures: space -> file, embedded; None leaves them out, and with them every training scan.
    """
    return _render("audit.html", content, pictures or {})


def write_audit_page(path: Path, content: Mapping[str, Any], pictures: Mapping[str, Path]) -> Path:
    """Write the audit's own page, atomically; arguments as in :func:`audit_fragment`."""
    return write_text(path, _render("audit_page.html", content, pictures))


def _render(name: str, content: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    inside = {space: embedded(path) for space, path in pictures.items()}
    return template(name).render(audit=content, pictures=inside, caution=CAUTION)
