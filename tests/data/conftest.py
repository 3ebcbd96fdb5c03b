"""Shared fixtures: the template, prepared once."""

from __future__ import annotations

import pytest

from ldm.data.simulated import render, writer


@pytest.fixture(scope="session")
def atlas() -> render.Atlas:
    return render.Atlas.build(4.0)


@pytest.fixture
def coarse(atlas, monkeypatch) -> None:
    """Spare the writer the seconds of building the same atlas again."""
    monkeypatch.setattr(writer.Atlas, "build", classmethod(lambda cls, spacing: atlas))
