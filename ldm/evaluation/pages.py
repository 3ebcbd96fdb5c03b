"""Self-contained HTML: the templates of this package, and pictures inside the page."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ldm.evaluation import goals

METRICS = {"frechet": "Fréchet distance", "frechet_ratio": "times the floor", "kid": "KID", "mmd": "MMD"}


def template(name: str) -> Template:
    """A template of ``ldm/evaluation/templates``: what is put in is escaped, a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader("ldm.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": goals.number, "percent": goals.percent}
    environment.globals |= {"metric_names": METRICS, "other_split": goals.OTHER_SPLIT}
    return environment.get_template(name)


def embedded(path: Path) -> str:
    """A picture as the address that holds it."""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(Path(path).read_bytes()).decode()
