"""Fixtures of the tests of commands."""

import contextlib

import pytest
import torch


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device has no autocast; the modules only ever switch it off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, enabled, **__: contextlib.nullcontext())
