"""Killed at any point, the same command goes on and loses at most what was not yet written."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from ldm.model.first_stage import FirstStage
from ldm.training.logging import read_metrics

pytestmark = pytest.mark.slow


def start(folder, overrides):
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-m", "ldm", "train-vae", *overrides, f"runs_dir={folder}", "trainer.max_steps=400",
         "trainer.val_every=1000", "trainer.checkpoint_seconds=0.2", "trainer.val_batches=1"],
        env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def last_step(folder):
    path = folder / "simulated/vae/metrics.jsonl"
    if not path.is_file():
        return 0
    return max((step for step, _ in read_metrics(path).get("vae/train/loss", [(0, 0)])), default=0)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_kill_and_go_on(tiny, tmp_path, kill):
    process = start(tmp_path, tiny)
    end = time.monotonic() + 120
    while last_step(tmp_path) < 30:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(kill)
    process.communicate(timeout=60)
    reached = last_step(tmp_path)
    assert 30 <= reached < 400
    output, _ = start(tmp_path, tiny).communicate(timeout=200)
    text = " ".join(output.split())
    assert "Going on at step" in text, output
    resumed = int(text.split("Going on at step ")[1].split(" ")[0])
    assert reached - 40 < resumed <= reached + 1
    assert last_step(tmp_path) >= 399
    assert not [path for path in (tmp_path / "simulated/vae").iterdir() if path.name.endswith(".tmp")]


def test_every_validated_state_is_kept_and_can_be_continued(ldm, tiny, tmp_path, monkeypatch):
    """Both files are written at each validation, which comes every ``val_every`` optimisation steps."""
    kept, killed = [], tmp_path / "killed"

    def save(self, path):
        state = torch.load(path.parent / "last.ckpt", weights_only=True)
        kept.append((self.facts["steps"], state["ldm"]["step"], "psnr" in self.metrics))
        if state["ldm"]["step"] == 2 and not killed.exists():  # as if killed right after the first validation
            killed.mkdir()
            shutil.copy(path.parent / "last.ckpt", killed / "last.ckpt")

    monkeypatch.setattr(FirstStage, "save", save)
    settings = (*tiny, "trainer.max_steps=5", "trainer.val_every=2", "vae.optimizer.accumulate=2", "data.cache=false")
    code, text = ldm("train-vae", *settings, "run_dir=whole")
    assert not code, text
    assert list(dict.fromkeys(kept)) == [(2, 2, True), (4, 4, True), (5, 5, True)]
    code, text = ldm("train-vae", *settings, "run_dir=killed")
    assert not code, text
    assert "Going on at step 2" in text
    assert [step for step, _ in read_metrics(killed / "metrics.jsonl")["vae/train/loss"]] == [3, 4, 5]
