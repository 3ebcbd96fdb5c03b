"""Shared fixtures: a small simulated cohort on disk, and the command line in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
# Processes that work side by side have one thread each; two with two would wait for each other most of the time.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))

TINY = (
    "vae.network.channels=[16,16]",
    "vae.optimizer.warmup_steps=2",
    "ldm.network.channels=[16,32]",
    "ldm.network.attention_levels=[false,true]",
    "ldm.network.num_head_channels=16",
    "ldm.network.norm_num_groups=16",
    "ldm.network.num_res_blocks=1",
    "ldm.optimizer.warmup_steps=2",
    "ldm.batch_size=4",
    "ldm.val_steps=2",
    "ldm.val_samples=2",
    "ldm.condition.dim=16",
    "data.num_workers=0",
    "trainer=cpu",
    "trainer.log_every=1",
)


@pytest.fixture(scope="session")
def cohort_root(tmp_path_factory) -> Path:
    """Thirty simulated brains at 8 mm."""
    from ldm.data.simulated import generate

    return generate(tmp_path_factory.mktemp("cohort") / "brains", n=30, spacing_mm=8.0, workers=1, progress=False)


@pytest.fixture
def tiny(cohort_root) -> tuple[str, ...]:
    """Overrides for the small cohort and networks that train in a second."""
    return (f"data.root={cohort_root}", "data.n=30", "data.spacing_mm=8.0", *TINY)


@pytest.fixture
def ldm(tmp_path, monkeypatch, capfd):
    """Run ``ldm VERB ...`` in an empty folder; returns (exit code, what it printed)."""
    from ldm.commands.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ldm", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capfd.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    return run
