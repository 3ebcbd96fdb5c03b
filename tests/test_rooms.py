"""A room imports only rooms that stand before it, and nothing it should not know."""

import ast
from pathlib import Path

import pytest

import ldm

ROOMS = (
    "data",
    "networks",
    "diffusion",
    "conditioning",
    "latents",
    "model",
    "metrics",
    "training",
    "evaluation",
    "applications",
    "commands",
)
FREE = {"errors", "files", "precision", "source", "__version__"}
FORBIDDEN = {
    "networks": {"pytorch_lightning", "hydra"},
    "diffusion": {"pytorch_lightning", "hydra", "monai", "nibabel"},
    "model": {"pytorch_lightning", "hydra", "omegaconf", "wandb"},
    "applications": {"hydra", "omegaconf"},
}
PACKAGE = Path(ldm.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ldm":
                yield from (f"ldm.{alias.name}" for alias in node.names)
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    legal = {*ROOMS[: ROOMS.index(room) + 1], *FREE}
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "ldm" and len(parts) > 1:
                assert parts[1] in legal, f"{path.relative_to(PACKAGE)} imports {name}"
            assert parts[0] not in FORBIDDEN.get(room, set()), f"{path.relative_to(PACKAGE)} imports {name}"
