"""Killed at any point, the same command goes on and loses at most what was not yet written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ldm.model.first_stage import FirstStage
from ldm.training.checkpoint import ResumeCheckpoint
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.logging import read_metrics
from ldm.training.vae import VAE

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


@pytest.mark.parametrize(("kill", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_kill_and_go_on(tiny, tmp_path, kill, status):
    process = start(tmp_path, tiny)
    end = time.monotonic() + 120
    while last_step(tmp_path) < 30:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode == status  # no success: `ldm train-vae && ldm train-ldm` stops here
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
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    assert sum("vae/val/psnr" in line for line in lines) == 3  # at 2, 4 and 5, each once
    code, text = ldm("train-vae", *settings, "run_dir=killed")
    assert not code, text
    assert "Going on at step 2" in text
    assert [step for step, _ in read_metrics(killed / "metrics.jsonl")["vae/train/loss"]] == [3, 4, 5]


@pytest.mark.parametrize(
    ("verb", "module", "key", "workers"),
    [("train-vae", VAE, "index", 1), ("train-ldm", LatentDiffusion, "row", 0)],
    ids=["vae", "ldm"],
)
def test_an_interrupted_run_sees_the_data_and_ends_as_one_that_was_not(
    ldm, tiny, tmp_path, monkeypatch, verb, module, key, workers
):
    """24 images in batches of 5, two batches a step; stopped in the 9th batch, in the middle of epoch and step."""
    seen, original = [], module.training_step

    def training_step(self, batch, batch_index):
        original(self, batch, batch_index)
        seen.append(batch[key].tolist())
        if len(seen) == stop:
            raise SystemExit(143)

    settings = (
        *tiny,
        "trainer.precision=32-true",
        "trainer.max_steps=8",
        "trainer.val_every=3",
        "data.augment={flip_axes: [0], brightness: 0.1}",
        "ldm.network.dropout=0.2",
        f"data.num_workers={workers}",
        *(f"{stage}.{setting}" for stage in ("vae", "ldm") for setting in ("batch_size=5", "optimizer.accumulate=2")),
    )
    if verb == "train-ldm":
        code, text = ldm("train-vae", *settings, "trainer.max_steps=1")
        assert not code, text
        assert "PSNR" in text, text
    monkeypatch.setattr(module, "training_step", training_step)
    stop = None
    code, text = ldm(verb, *settings, "run_dir=whole")
    assert not code, text
    whole, seen[:], stop = list(seen), [], 9
    assert ldm(verb, *settings, "run_dir=stopped")[0]
    assert seen == whole[:9]
    seen[:], stop = [], None
    code, text = ldm(verb, *settings, "run_dir=stopped")
    assert not code, text
    assert "Going on at step 4" in text
    assert seen == whole[8:]  # the step that was cut off is taken anew
    assert len({tuple(rows) for rows in whole}) == len(whole)

    expected, found = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "stopped"))
    assert expected["state_dict"].keys() == found["state_dict"].keys()
    assert all(torch.equal(value, found["state_dict"][name]) for name, value in expected["state_dict"].items())
    assert moments(expected).keys() == moments(found).keys()
    assert all(torch.equal(value, moments(found)[name]) for name, value in moments(expected).items())
    curves = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "stopped")]
    stage = verb.removeprefix("train-")
    assert [step for step, _ in curves[0][f"{stage}/train/loss"]] == list(range(1, 9))
    for name, points in curves[0].items():
        if "/val/" in name or "/train/" in name:
            assert curves[1][name] == points, name


def moments(checkpoint):
    """Tensors of the optimizers' states by their place."""
    return {
        (number, parameter, name): value
        for number, optimizer in enumerate(checkpoint["optimizer_states"])
        for parameter, state in optimizer["state"].items()
        for name, value in state.items()
    }


@pytest.mark.parametrize("updating", [False, True])
def test_a_step_that_is_half_taken_is_not_kept(tmp_path, updating):
    """The weights have changed and the moving average has not: the state before is the one to go on from."""
    written = []
    trainer = SimpleNamespace(world_size=1, is_global_zero=False, save_checkpoint=written.append)
    checkpoint = ResumeCheckpoint(tmp_path, 60.0, lambda: None)
    checkpoint.on_exception(trainer, SimpleNamespace(step=3, updating=updating), KeyboardInterrupt())
    assert bool(written) is not updating


def test_a_run_is_not_continued_with_what_would_change_its_meaning(ldm, tiny, tmp_path):
    """Covariates in another order have codes of the same shape, augmented latents other statistics."""
    short = ("trainer.max_steps=1", "ldm.val_samples=0")
    code, text = ldm("train-vae", *tiny, *short)
    assert not code, text
    code, text = ldm("train-vae", *tiny, "trainer.max_steps=2", "vae.loss.adversarial_weight=0.1")
    assert code
    assert "discriminator is {" in text
    order = "data.covariates={{{}: {{kind: continuous}}, {}: {{kind: continuous}}}}"
    asked = (*tiny, *short, order.format("age", "brain_mm3"))
    code, text = ldm("train-ldm", *asked)
    assert not code, text
    for other, name in (
        ((*tiny, order.format("brain_mm3", "age")), "covariates is"),
        ((*asked, "ldm.latents.variants=2", "data.augment={flip_axes: [0]}"), "latents is"),
    ):
        code, text = ldm("train-ldm", *other, "trainer.max_steps=2", "ldm.val_samples=0")
        assert code, name
        assert name in text, text
        assert "another configuration" in text
