"""Two processes with half the batch each take the same steps as one process with the whole batch."""

import os
import subprocess
import sys

import pytest

from ldm.training.logging import read_metrics

pytestmark = pytest.mark.slow


def launch(verb, folder, overrides):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "ldm", verb, *overrides, f"runs_dir={folder}"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(verb, stage, folder, overrides, metric):
    launch(verb, folder, overrides)
    points = read_metrics(folder / "simulated" / stage / "metrics.jsonl")
    return [value for _, value in points[metric]], points


def test_ddp_equals_one_process(tiny, tmp_path):
    common = (
        *(item for item in tiny if not item.startswith("trainer=")),
        "trainer.precision=32-true",
        "trainer.max_steps=4",
        "trainer.val_every=100",
        "vae.loss.adversarial_weight=0.1",
        "vae.loss.adversarial_start=2",
        "vae.discriminator.channels=8",
        "vae.discriminator.num_layers_d=1",
    )
    runs = {}
    for name, trainer, batch in (("one", "cpu", 2), ("two", "ddp_cpu2", 1)):
        folder = tmp_path / name
        folder.mkdir()
        settings = (*common, f"trainer={trainer}", f"vae.batch_size={batch}", f"ldm.batch_size={2 * batch}")
        vae, points = losses("train-vae", "vae", folder, settings, "vae/train/loss")
        assert "vae/train/adversarial" in points
        if name == "two":  # the second stage of both builds on the same first stage
            settings = (*settings, f"first_stage={tmp_path}/one/simulated/vae/model.safetensors")
        runs[name] = vae, losses("train-ldm", "ldm", folder, settings, "ldm/train/loss")[0]
    assert len(runs["one"][0]) == len(runs["one"][1]) == 4
    assert runs["two"][0] == pytest.approx(runs["one"][0], rel=2e-3)
    assert runs["two"][1] == pytest.approx(runs["one"][1], rel=2e-3)


def test_every_job_of_a_sweep_gives_all_its_ranks_its_own_settings(tiny, tmp_path):
    common = [item for item in tiny if not item.startswith(("trainer=", "runs_dir="))]
    common += ["trainer=ddp_cpu2", "trainer.max_steps=2", "trainer.val_every=100", "vae.batch_size=1"]
    launch("train-vae", tmp_path, ["--multirun", *common, "vae.loss.kl_weight=0,0.5"])
    launch("train-vae", tmp_path, [*common, "vae.loss.kl_weight=0.5"])
    folders = [tmp_path / "simulated" / name for name in ("vae-sweep/0", "vae-sweep/1", "vae")]
    without, swept, alone = (
        [loss for _, loss in read_metrics(folder / "metrics.jsonl")["vae/train/loss"]] for folder in folders
    )
    assert swept == pytest.approx(alone, rel=1e-5)
    assert swept != pytest.approx(without, rel=1e-3)
