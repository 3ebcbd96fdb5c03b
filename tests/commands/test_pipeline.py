"""The main job from end to end, at a size that takes seconds; and that it goes on where it stopped."""

import json
import re
import shutil
from importlib import metadata

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from transformers import Dinov2Config, Dinov2Model

from ldm.data.images import read
from ldm.errors import LdmError
from ldm.model.first_stage import FirstStage
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.networks.autoencoder import AutoencoderKL
from ldm.training.logging import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cohort_root):
    """Both stages of the small cohort, trained for a few steps through the command line."""
    import os
    import sys

    from ldm.commands.main import main
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("runs")
    common = (f"data.root={cohort_root}", "data.n=30", "data.spacing_mm=8.0", f"runs_dir={folder}", *TINY)
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        for verb in ("train-vae", "train-ldm"):
            sys.argv = ["ldm", verb, *common, "trainer.max_steps=12", "trainer.val_every=6"]
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder, common


def test_run_folders_hold_what_they_should(trained):
    folder, _ = trained
    for stage in ("vae", "ldm"):
        run = folder / "simulated" / stage
        for name in ("config.yaml", "metrics.jsonl", "last.ckpt", "model.safetensors", "figures/curves.png"):
            assert (run / name).is_file(), name
        torch.load(run / "last.ckpt", weights_only=True)  # plain tensors, numbers and dicts only
    assert not any("first_stage" in name for name in torch.load(run / "last.ckpt", weights_only=True)["state_dict"])
    metrics = read_metrics(folder / "simulated/vae/metrics.jsonl")
    for name in (
        "train/loss",
        "train/kl",
        "train/weight/kl",
        "train/grad_last_layer/reconstruction",
        "val/psnr",
        "val/ssim",
        "val/latent_std/0",
    ):
        assert f"vae/{name}" in metrics, name
    metrics = read_metrics(folder / "simulated/ldm/metrics.jsonl")
    for name in ("train/loss", "val/loss", "val/loss_bin/9", "val/response/age"):
        assert f"ldm/{name}" in metrics, name


def test_nothing_is_written_into_the_data_folder(trained, cohort_root):
    folder, _ = trained
    assert not (cohort_root / ".ldm-cache").exists()
    assert (folder / "simulated/cache").is_dir()


def test_a_sweep_runs_in_folders_of_its_own(ldm, tiny, tmp_path):
    code, text = ldm("train-vae", *tiny, "--multirun", "vae.optimizer.lr=1e-3,2e-3", "trainer.max_steps=1")
    assert not code, text
    for job in ("0", "1"):
        assert (tmp_path / "runs/simulated/vae-sweep" / job / "model.safetensors").is_file()


def test_a_first_stage_below_the_gate_is_named_with_its_number(trained, ldm):
    _, common = trained
    code, text = ldm("train-ldm", *common, "trainer.max_steps=12", "vae.gate_psnr=99")
    assert code == 0
    assert re.search(r"reaches \d+\.\d\d dB held-out PSNR, below vae.gate_psnr=99", text)


def test_the_second_stage_never_runs_the_encoder_again(trained, ldm, tmp_path, monkeypatch):
    def encode(*_):
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    _, common = trained
    code, text = ldm("train-ldm", *common, "trainer.max_steps=1", f"run_dir={tmp_path}/again")
    assert code == 0, text


def test_a_first_stage_starts_from_another(trained, ldm, tmp_path):
    folder, common = trained
    path = folder / "simulated/vae/model.safetensors"
    still = ("trainer.max_steps=1", "vae.optimizer.lr=0", f"run_dir={tmp_path}/further", "seed=1")
    code, text = ldm("train-vae", *common, *still, f"vae.init_from={path}")
    assert code == 0, text
    assert FirstStage.load(tmp_path / "further/model.safetensors").sha256 == FirstStage.load(path).sha256


def test_weights_and_biases_gets_curves_pictures_and_configuration(trained, ldm, tmp_path):
    """Also of the second job of a sweep, which runs in the same process."""
    _, common = trained
    runs = (tmp_path / "first", tmp_path / "second")
    for run in runs:
        code, text = ldm("train-vae", *common, "trainer.max_steps=2", "logger=wandb", f"run_dir={run}")
        assert code == 0, text
    wandb.teardown()  # as the end of the process does: what is buffered is written
    for run in runs:
        (offline,) = run.glob("wandb/offline-run-*")
        assert list(offline.glob("files/media/images/vae/*.png"))
        logged = next(offline.glob("run-*.wandb")).read_bytes()
        for name in (b"vae/train/loss", b"vae/val/psnr", b"spacing_mm"):
            assert name in logged, name


def test_one_file_is_enough_and_the_latents_are_scaled(trained):
    folder, _ = trained
    model = LatentDiffusionModel.load(folder / "simulated/ldm/model.safetensors")
    assert model.header["first_stage_sha256"] == FirstStage.load(folder / "simulated/vae/model.safetensors").sha256
    assert model.schema.names == ("age", "sex", "ventricles_mm3", "brain_mm3")
    caches = list((folder / "simulated/latents").glob("*/index.json"))
    assert len(caches) == 2
    mean = np.concatenate([np.load(path.parent / "mean.npy") for path in caches if _split(path) == "train"])
    std = np.concatenate([np.load(path.parent / "std.npy") for path in caches if _split(path) == "train"])
    draw = model.latent_space.draw(*(torch.from_numpy(x).float() for x in (mean, std)), torch.randn(mean.shape))
    assert draw.mean((0, 2, 3, 4)).abs().max() < 0.1
    assert (draw.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


def _split(index):
    return json.loads(index.read_text())["key"]["split"]


def test_samples_are_written_in_the_cohorts_space(trained, ldm, cohort_root, tmp_path):
    _, common = trained
    request = ("sample", *common, "covariates={age: 70, sex: F}", "n=3", "steps=2", "batch_size=2", "out=out")
    assert "Did you mean" in ldm(*request, "sampler=ddmp")[1]  # draws nothing, and leaves the folder free
    assert ldm(*request)[0] == 0
    scan = nib.load(next(cohort_root.glob("sub-*/anat/*T1w.nii.gz")))
    sample = nib.load(tmp_path / "out/sub-000001.nii.gz")
    assert sample.shape == scan.shape
    np.testing.assert_allclose(sample.affine, scan.affine)
    assert sample.header.get_xyzt_units()[0] == "mm"
    table = pd.read_csv(tmp_path / "out/participants.tsv", sep="\t")
    assert list(table.columns) == ["participant_id", "age", "sex", "ventricles_mm3", "brain_mm3"]
    assert (table["age"] == 70).all()
    assert table["brain_mm3"].isna().all()
    provenance = json.loads((tmp_path / "out/provenance.json").read_text())
    assert provenance["seed"] == 0
    assert provenance["sampling"]["num_inference_steps"] == 2
    assert provenance["simulated_training_data"] is True
    assert provenance["written"]["versions"]["torch"] == metadata.version("torch")
    assert (tmp_path / "out/mosaic.png").is_file()

    # the same command goes on: only what is missing is drawn again, and it comes out the same
    kept, lost = (tmp_path / f"out/sub-00000{i}.nii.gz" for i in (1, 2))
    before, time = read(lost).array, kept.stat().st_mtime_ns
    lost.unlink()
    assert ldm(*request)[0] == 0
    np.testing.assert_allclose(read(lost).array, before, atol=0.02)
    assert kept.stat().st_mtime_ns == time
    code, text = ldm(*request, "seed=1")
    assert code
    assert "results of another request" in text
    assert "remarks" not in provenance
    asked = [item for item in request if "covariates" not in item]
    code, text = ldm(*asked, "covariates={age: 170}", "n=1", "out=beyond")
    assert "Extrapolation: age = 170" in text
    beyond = json.loads((tmp_path / "beyond/provenance.json").read_text())["remarks"]["extrapolated"]
    assert [len(found) for found in beyond.values()] == [1]
    code, text = ldm(*asked, "covariates={agee: 70}", "out=other")
    assert code
    assert "Did you mean 'age'?" in text


def test_what_is_written_can_be_read_as_a_cohort(trained, ldm):
    _, common = trained
    assert ldm("sample", *common, "n=24", "steps=1", "out=out")[0] == 0
    code, text = ldm(
        "check",
        "data=nifti",
        "data.name=synthetic",
        "data.root=out",
        "data.image='{participant_id}.nii.gz'",
        "data.covariates={age: {kind: continuous, unit: years}, sex: {kind: categorical}}",
    )
    assert not code, text
    assert "No faults" in text


def test_the_report_holds_pictures_and_numbers(trained, ldm, tmp_path):
    _, common = trained
    more = ("seeds=[0,1]", "sweep={ventricles_mm3: [5e3, 2e5, 2]}", "sweep_n=1")
    request = ("evaluate", *common, "n=4", "repeats=2", "steps=2", "run_dir=evaluation", *more)
    code, text = ldm(*request)
    assert not code, text
    metrics = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert metrics["seeds"] == [0, 1]
    assert metrics["ms_ssim"]["protocol"]["pairs"] == 6
    first, second = (
        read(tmp_path / f"evaluation/{name}/sub-000001.nii.gz").array for name in ("samples", "samples_seed1")
    )
    assert np.abs(first - second).max() > 0.01
    assert len(metrics["ms_ssim"]["seeds"]["difference"]["values"]) == 2
    sweep = metrics["sweep"]["ventricles_mm3"]
    assert (sweep["asked"], sweep["extrapolation"]) == ([5e3, 2e5], [True, True])
    assert list(sweep["measured"]) == ["ventricles"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation").glob("s*/**/*.nii.gz")}
    assert len(kept) == 6 + 4 + 2
    assert "fidelity" in metrics  # samples of a model trained for 12 steps may not be measurable
    assert metrics["instruments"] == {"data.instrument": [{"kind": "ventricles"}], "sha256": None}  # a method, no file
    assert set(metrics["diversity"]) == {
        "real, nearest covariates",
        "the same, reconstructed",
        "samples asked as these",
        "samples, same covariates",
    }
    pairs = {name: values["rms"]["n"] for name, values in metrics["diversity"].items()}
    assert len({pairs[name] for name in list(pairs)[:3]}) == 1  # the same pairs of covariates
    page = (tmp_path / "evaluation/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert "simulated" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert "extrapolation" in page

    # the same command goes on: no sample is drawn again; another goal is only another verdict
    code, text = ldm(*request, "goals.ms_ssim=1")
    assert not code, text
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert "goal: at most 1 either way" in (tmp_path / "evaluation/report.html").read_text()
    for wrong, said in (("seeds=[0,0]", "different whole numbers"), ("goals.share=0", "goals.share is 0")):
        code, text = ldm(*request, wrong)
        assert code
        assert said in text


def test_a_sample_does_not_depend_on_its_batch(trained):
    folder, _ = trained
    model = LatentDiffusionModel.load(folder / "simulated/ldm/model.safetensors")
    rows = model.covariate_rows(None, 4, seed=5)
    options = {"num_inference_steps": 3, "precision": "float32"}
    together = next(model.sample_batches(rows, range(4), seed=1, batch_size=4, **options)).images
    alone = next(model.sample_batches(rows[2:3], [2], seed=1, batch_size=1, **options)).images
    np.testing.assert_allclose(alone[0], together[2], atol=1e-4)
    assert np.abs(together[1] - together[2]).max() > 0.01
    with pytest.raises(LdmError, match="Did you mean 'num_inference_steps'"):
        model.sample({"age": 60}, num_inference_step=3)


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(trained, ldm, cohort_root, tmp_path):
    folder, common = trained
    request = ("train-ldm", *common, "trainer.val_every=6")
    model = folder / "simulated/ldm/model.safetensors"
    code, text = ldm(*request, "trainer.max_steps=12")
    assert not code
    assert "Already trained for 12 steps" in text
    code, text = ldm(*request, "trainer.max_steps=14")
    assert not code, text
    assert "Going on at step 12" in text
    assert LatentDiffusionModel.load(model).header["steps"] == 14
    shutil.copytree(cohort_root, tmp_path / "scratch", copy_function=shutil.copyfile)  # with new time stamps
    code, text = ldm(*request, "trainer.max_steps=16", f"data.root={tmp_path / 'scratch'}")
    assert not code, text
    assert "Going on at step 14" in text
    assert "encoding" not in text
    code, text = ldm(*request, "trainer.max_steps=18", "ldm.prediction_type=epsilon")
    assert code
    assert "prediction_type is epsilon now, was v_prediction" in text


def test_another_preparation_is_refused(trained, ldm):
    _, common = trained
    code, text = ldm("train-ldm", *common, "data.intensity.upper=90", "trainer.max_steps=1")
    assert code
    assert "prepared otherwise" in text
    assert "intensity" in text


def test_the_report_has_distances_when_there_is_a_feature_network(trained, ldm, tmp_path, monkeypatch):
    _, common = trained
    request = ("evaluate", *common, "n=4", "repeats=0", "steps=1", "run_dir=evaluation")
    code, text = ldm(*request)
    assert not code, text
    assert "distances are left out" in text
    assert "distances" not in json.loads((tmp_path / "evaluation/metrics.json").read_text())
    tiny = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(tiny).save_pretrained(tmp_path / "dinov2")
    monkeypatch.setattr("ldm.evaluation.distances.SMALLEST", 4)
    request = (*request, "features.kind=dinov2", f"features.path={tmp_path / 'dinov2'}")
    code, text = ldm(*request)
    assert not code, text
    distances = json.loads((tmp_path / "evaluation/metrics.json").read_text())["distances"]
    assert distances["protocol"]["n"] == 4
    assert len(distances["rows"]) == 5
    features = distances["protocol"]["features"]
    assert features["planes"].startswith("3 slices across each axis")
    page = (tmp_path / "evaluation/report.html").read_text()
    assert "samples of the model</td>" in page
    assert "training split" in page
    assert "more features (24) than images (4)" in page

    # the same noise with more steps beside: only what is new is drawn, and the same settings give the same distance
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation/samples").glob("*.nii.gz")}
    code, text = ldm(*request, "samplers={Three steps: {steps: 3}, one: {steps: 1}}")
    assert not code, text
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    rows = json.loads((tmp_path / "evaluation/metrics.json").read_text())["samplers"]["rows"]
    assert list(rows) == ["as configured", "Three steps", "one"]
    assert "num_inference_steps 3" in rows["Three steps"]["sampling"]
    assert all(row["seconds_a_sample"] > 0 for row in rows.values())
    same, other = (rows[name]["distance"]["frechet"] for name in ("one", "Three steps"))
    assert rows["as configured"]["distance"]["frechet"] == pytest.approx(same)
    assert other != pytest.approx(same)
    assert "Three steps<br>" in (tmp_path / "evaluation/report.html").read_text()
    seeded = ("seeds=[5]", "run_dir=seeded", "samplers={10: {steps: 1}, seed 1: {steps: 3}}")  # names are the user's
    code, text = ldm(*request, *seeded)
    assert not code, text
    rows = json.loads((tmp_path / "seeded/metrics.json").read_text())["samplers"]["rows"]
    assert rows["as configured"]["distance"]["frechet"] == pytest.approx(rows["10"]["distance"]["frechet"])  # one noise
    for wrong, said in (
        ("samplers={a: {step: 3}}", "samplers.a.step is not a setting. Did you mean 'steps'?"),
        ("samplers={a: 3}", "samplers.a is 3; give settings of ldm sample"),
        ("samplers={a: {steps: 0}}", "samplers.a: "),
        ("samplers={as configured: {steps: 1}}", "samplers.as configured: the first row is called like this"),
    ):
        code, text = ldm(*request, wrong)
        assert code
        assert said in text
