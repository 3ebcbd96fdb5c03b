"""GANs by the same commands as diffusion models, and the table that compares them."""

import json
import os
import re
import sys

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
from omegaconf import OmegaConf

from ldm.commands.audit import NOT_PASSED
from ldm.commands.compare_models import read_entries
from ldm.commands.main import main
from ldm.commands.sample import expect_known_options
from ldm.errors import LdmError
from ldm.model.file import read_header, read_tensors
from ldm.model.gan import GAN
from ldm.training.logging import read_metrics
from tests.conftest import TINY

pytestmark = pytest.mark.slow

NETWORKS = (
    "gan.network.channels=[8,8]",
    "gan.network.latent_dim=8",
    "gan.discriminator.channels=[8,8]",
    "gan.discriminator.hidden=8",
    "gan.condition.dim=8",
    "gan.optimizer.schedule=constant",
    "gan.optimizer.warmup_steps=2",
    "gan.val_samples=2",
    "gan.batch_size=4",
)
VAEGAN = ("gan=vaegan", "gan.encoder.channels=[8,8]", "gan.loss.feature_level=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pictures of small and large squares; both GANs, a diffusion model and a predictor, trained for a few steps."""
    folder, rng, rows = tmp_path_factory.mktemp("gans"), np.random.default_rng(0), ["participant_id\tkind\tside"]
    (folder / "made").mkdir()
    for i in range(40):
        picture, half = rng.normal(20, 10, (16, 16)), 3 + 2 * (i % 2)
        picture[8 - half : 8 + half, 8 - half : 8 + half] += 180
        PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"made/s{i}.png")
        rows.append(f"s{i}\t{['small', 'large'][i % 2]}\t{2 * half + i / 40}")
    (folder / "made/participants.tsv").write_text("\n".join(rows) + "\n")
    common = (
        *(item for item in TINY if not item.startswith("data.")),
        *NETWORKS,
        "data=nifti",
        "data.name=made",
        f"data.root={folder}/made",
        "data.spatial_dims=2",
        "data.num_workers=0",
        "data.image='{participant_id}.png'",
        "data.intensity={kind: window, lower: 0, upper: 255}",
        "data.covariates={kind: {kind: categorical}, side: {kind: continuous}}",
        "data.split.fractions={train: 0.5, valid: 0.25, test: 0.25}",
        f"data.instrument={{kind: predictor, path: {folder}/runs/made/predictor/model.safetensors}}",
        "predictor.network.channels=[8,16]",
        f"runs_dir={folder}/runs",
    )
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        for verb, *more in (
            ("train-predictor", "trainer.max_steps=40", "predictor.optimizer.lr=3e-3", "predictor.batch_size=8"),
            ("train-vae", "trainer.max_steps=1"),
            ("train-ldm", "trainer.max_steps=1"),
            ("train-gan", "trainer.max_steps=4"),
            ("train-gan", "trainer.max_steps=2", *VAEGAN),
        ):
            sys.argv = ["ldm", verb, *common, *more]
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "runs/made", common


def test_run_folders_hold_what_they_should(trained):
    runs, _ = trained
    for name, method in (("lsgan", "LSGAN"), ("vaegan", "VAE-GAN")):
        for file in ("config.yaml", "metrics.jsonl", "last.ckpt", "model.safetensors", "figures/curves.png"):
            assert (runs / name / file).is_file(), file
        model = GAN.load(runs / name / "model.safetensors")
        assert model.what == method
        assert model.schema.names == ("kind", "side")
        assert not any("discriminator" in key for key in model.state_dict())
        metrics = read_metrics(runs / name / "metrics.jsonl")
        expected = [
            "train/adversarial",
            "train/discriminator",
            "train/score/real",
            "val/pooled_kid",
            "val/score/sample",
        ]
        expected += ["val/response/side", "val/level/kind"]
        expected += ["train/kl", "train/score/reconstruction", "val/psnr"] if name == "vaegan" else []
        for key in expected:
            assert f"gan/{key}" in metrics, key
    assert (runs / "vaegan/figures/reconstruction_0000002.png").is_file()
    assert (runs / "lsgan/figures/samples_0000004.png").is_file()


def test_the_same_command_goes_on(trained, ldm):
    runs, common = trained
    for steps in (2, 4):
        code, text = ldm("train-gan", *common, "run_dir=again", f"trainer.max_steps={steps}")
        assert not code, text
    assert "Going on at step 2" in text
    whole, again = (read_header(path) for path in (runs / "lsgan/model.safetensors", "again/model.safetensors"))
    assert again["tensors_sha256"] == whole["tensors_sha256"]
    code, text = ldm("train-gan", *common, "run_dir=again", "trainer.max_steps=5", "gan.network.latent_dim=4")
    assert code
    assert "another configuration" in text
    wider = "data.covariates={kind: {kind: categorical}, side: {kind: continuous, range: [0, 99]}}"
    code, text = ldm("train-gan", *common, wider, "run_dir=again", "trainer.max_steps=5")
    assert code
    assert "covariates" in text
    code, text = ldm(
        "train-gan", *common, "run_dir=new", "trainer.max_steps=1", "gan.discriminator.channels=[8,8,8,8,8]"
    )
    assert code
    assert "gan.discriminator.channels is [8, 8, 8, 8, 8]: an image of 16x16 can be halved 4 times" in text


def test_a_gan_is_sampled_like_any_model_and_refuses_what_it_does_not_know(trained, ldm, tmp_path):
    runs, common = trained
    request = ("sample", *common, f"model={runs}/lsgan/model.safetensors", "covariates={kind: large}", "n=3", "seed=5")
    code, text = ldm(*request, "out=out", "batch_size=2")
    assert not code, text
    pictures = [np.asarray(PIL.Image.open(tmp_path / f"out/sub-00000{i}.png"), float) for i in (1, 2, 3)]
    provenance = json.loads((tmp_path / "out/provenance.json").read_text())
    assert provenance["sampling"] == {}
    assert provenance["model_sha256"] == read_header(runs / "lsgan/model.safetensors")["tensors_sha256"]
    model = GAN.load(runs / "lsgan/model.safetensors")
    drawn = model.sample({"kind": "large"}, n=3, seed=5).images[:, 0]
    np.testing.assert_allclose(np.stack(pictures), 255 * drawn, atol=1)
    assert (tmp_path / "out/mosaic.png").is_file()
    code, text = ldm(*request, "out=other", "steps=5")
    assert code
    assert "steps is no sampling option of the LSGAN; legal: none" in text
    for option in ({"guidance_scale": 2}, {"sampler": "ddim"}, {"eta": 0.5}):
        with pytest.raises(LdmError, match=f"{next(iter(option))} is no sampling option of the LSGAN"):
            expect_known_options(model, OmegaConf.create(option))


def test_a_report_has_what_the_model_can(trained, ldm, tmp_path):
    runs, common = trained
    for name, rebuilt in (("lsgan", False), ("vaegan", True)):
        request = ("evaluate", *common, f"model={runs}/{name}/model.safetensors", "n=8", "repeats=2")
        code, text = ldm(*request, f"run_dir={name}")
        assert not code, text
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert ("reconstruction" in metrics) == rebuilt
        assert ("the same, reconstructed" in metrics["diversity"]) == rebuilt
        assert metrics["fidelity"]["kind"]["samples"]["n"] == 10
        expected = ["held-out images", "held-out images, blurred", "samples of the model"]
        expected[2:2] = ["held-out images, reconstructed"] if rebuilt else []
        assert list(metrics["distances"]["rows"]) == expected
        page = (tmp_path / name / "report.html").read_text()
        assert f"Generated images of made, by the {'VAE-GAN' if rebuilt else 'LSGAN'}: can they" in page
        assert ("reconstructed" in metrics["ms_ssim"]["sets"]) == rebuilt


def test_a_gan_is_audited_as_any_model(trained, ldm, tmp_path):
    runs, common = trained
    small = ("matcher.network.channels=[8,16]", "trainer.max_steps=2", "trainer.val_every=2", "run_dir=matcher")
    code, text = ldm("train-matcher", *common, *small)
    assert not code, text
    request = ("audit", *common, f"model={runs}/lsgan/model.safetensors", "matcher_path=matcher/model.safetensors")
    code, text = ldm(*request, "n=6", "planted=3", "flip_axes=0", "run_dir=audit")
    assert code in (0, NOT_PASSED), text
    found = json.loads((tmp_path / "audit/audit.json").read_text())
    assert set(found["spaces"]) == {"features", "correlation"}  # a GAN has no latents of images
    assert found["model_sha256"] == read_header(runs / "lsgan/model.safetensors")["tensors_sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "n=0"), "n must be a whole number of at least 1, got 0"),
        (("evaluate", "n=1e1"), "n must be a whole number of at least 1, got 10.0"),
        (("evaluate", "goals=3"), "goals is 3; legal: {key: value, ...}, or null"),
        (("compare", "models=lsgan"), "models is 'lsgan'; legal: {key: value, ...}"),
        (
            ("evaluate", "features=null", "real=a", "synthetic=b"),
            "features.path=None: without it two folders cannot be compared",
        ),
        (("audit", "planted=0"), "planted must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_of_another_kind_are_refused(trained, ldm, arguments, message):
    runs, common = trained
    code, text = ldm(arguments[0], *common, f"model={runs}/lsgan/model.safetensors", "run_dir=refused", *arguments[1:])
    assert code
    assert message in text


def test_no_more_samples_are_repeated_than_there_are(trained, ldm, tmp_path):
    runs, common = trained
    model = f"model={runs}/lsgan/model.safetensors"
    code, text = ldm("evaluate", *common, model, "n=3", "repeats=5", "features=null", "run_dir=few")
    assert not code, text
    metrics = json.loads((tmp_path / "few/metrics.json").read_text())
    assert metrics["n"] == {"held_out": 20, "samples": 3, "repeats": 3}
    assert metrics["diversity"]["samples, same covariates"]["rms"]["n"] == 3
    assert "distances" not in metrics


def test_the_table_has_every_row_and_measures_each_once(trained, ldm, tmp_path):
    runs, common = trained
    models = {
        "LSGAN": f"{runs}/lsgan/model.safetensors",
        "VAE-GAN": f"{runs}/vaegan/model.safetensors",
        "LDM": f"{{path: {runs}/ldm/model.safetensors, steps: 3}}",
    }

    def compare(**more):
        listed = ", ".join(f"{name}: {path}" for name, path in {**models, **more}.items())
        return ldm("compare", *common, f"models={{{listed}}}", "n=16", "run_dir=table")

    code, text = compare()
    assert not code, text
    table = json.loads((tmp_path / "table/compare.json").read_text())
    fixed = [
        "held-out images, reconstructed (VAE-GAN)",
        "held-out images, reconstructed (LDM)",
        "first stage alone: decoded draws of N(0, I) (LDM)",
        "held-out images, blurred",
    ]
    assert list(table["rows"]) == ["held-out images", *models, *fixed]
    for name, row in table["rows"].items():
        assert row["n"] == table["protocol"]["n"] == 16
        assert np.isfinite(
            [row["frechet"], row["kid"], row["precision"], row["recall"], *row["frechet_interval"]]
        ).all()
        assert ("seconds_a_sample" in row) == (name in models)
        if "N(0, I)" not in name:  # nothing was asked of it
            assert row["agreement"]["kind"]["n"] == 16
            assert row["spread"]["ms_ssim"]["n"] > 4
    low, high = table["rows"]["held-out images"]["frechet_ratio_interval"]
    assert 0 < low <= 1 <= high  # a set of real images beside the mean of many
    assert table["rows"]["held-out images"]["agreement"]["kind"]["accuracy"] > 0.6  # of the true kinds
    lines = (tmp_path / "table/compare.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(table["rows"])
    assert any(line.startswith("| LDM |") and "kind" in line for line in lines)
    assert PIL.Image.open(tmp_path / "table/compare.png").height > 4 * 80  # real images and three models
    assert len({path.name for path in (tmp_path / "table/samples").iterdir()}) == 3

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("*.safetensors")}
    code, text = compare(**{"LDM 2 steps": f"{{path: {runs}/ldm/model.safetensors, steps: 2}}"})
    assert not code, text
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert len(list((tmp_path / "table/rows").iterdir())) == len(written) + 1
    longer = json.loads((tmp_path / "table/compare.json").read_text())
    assert set(longer["rows"]) == {*table["rows"], "LDM 2 steps"}
    assert longer["rows"]["LSGAN"] == table["rows"]["LSGAN"]

    files = [f"{runs}/{name}/model.safetensors" for name in ("lsgan", "vaegan")]
    code, text = compare(GANs=f"{{path: [{', '.join(files)}]}}")
    assert not code, text
    several = json.loads((tmp_path / "table/compare.json").read_text())["several"]["GANs"]
    singly = [table["rows"][name]["frechet"] for name in ("LSGAN", "VAE-GAN")]  # each is the same model, drawn anew
    assert several["frechet"]["values"] == pytest.approx(singly, rel=1e-3)
    assert several["frechet"]["mean"] == pytest.approx(np.mean(singly), rel=1e-3)
    assert {"kind accuracy", "ms_ssim"} < set(several)
    assert "GANs, mean ± standard deviation of 2 models" in (tmp_path / "table/compare.md").read_text()


def test_a_row_is_of_the_samples_that_a_model_draws(trained, ldm, tmp_path):
    runs, common = trained
    code, text = ldm("compare", *common, f"models={{G: {runs}/lsgan/model.safetensors}}", "n=8", "run_dir=t", "seed=3")
    assert not code, text
    (row,) = (path for path in (tmp_path / "t/rows").iterdir() if path.name.startswith("g-"))
    assert read_header(row, "comparison_row")["row"] == "G"
    from ldm.evaluation.features import PredictorFeatures, extract

    network = PredictorFeatures(runs / "predictor/model.safetensors")
    (folder,) = (tmp_path / "t/samples").iterdir()
    asked = json.loads((folder / "provenance.json").read_text())["rows"]
    images = GAN.load(runs / "lsgan/model.safetensors").sample(asked, seed=3).images
    features = extract(network, np.round(images * 255) / 255)
    np.testing.assert_allclose(read_tensors(row)["features"].numpy(), features, atol=1e-2)
    assert len({row["kind"] for row in asked}) == 2


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{}", "models is empty"),
        ("{A: {path: LSGAN, stepps: 3}}", "models.A.stepps is not a setting. Did you mean 'steps'?"),
        ("{A: nowhere}", "models.A: there is no model file nowhere"),
        ("{A: {path: [LSGAN, LSGAN]}, A 2: LSGAN}", "models: two rows would have one name"),
        ("{A: {steps: 3}}", "models.A names no file"),
        ("{A: PREDICTOR}", "holds a model of kind 'predictor', which draws no images"),
    ],
)
def test_what_cannot_be_compared_is_named(trained, models, message):
    for name in ("lsgan", "predictor"):
        models = models.replace(name.upper(), f"{trained[0]}/{name}/model.safetensors")
    with pytest.raises(LdmError, match=re.escape(message)):
        read_entries(OmegaConf.create(models))


def test_another_split_or_preparation_is_refused(trained, ldm):
    runs, common = trained
    model = f"models={{A: {runs}/lsgan/model.safetensors}}"
    code, text = ldm("compare", *common, model, "data.split.seed=1")
    assert code
    assert "models.A: was trained on another split" in text
    code, text = ldm("compare", *common, model, "data.intensity.upper=200", "data.instrument=null")
    assert code
    assert "models.A: was trained on images that were prepared otherwise (intensity" in text
    code, text = ldm("compare", *common, model.replace("A: ", "A: {path: ").replace("}", ", steps: 3}}"))
    assert code
    assert "steps is no sampling option of the LSGAN" in text
    code, text = ldm("compare", *common, model, "n=21")
    assert code
    assert "n is 21; legal: 8 up to the number of held-out images, 20" in text


def test_volumes_go_all_the_way(ldm, tiny, cohort_root, tmp_path):
    settings = (*tiny, *NETWORKS, *VAEGAN, "gan.batch_size=2", "gan.discriminator.norm=group")
    code, text = ldm("train-gan", *settings, "trainer.max_steps=1")
    assert not code, text
    assert "adaptive_norm on age, sex, ventricles_mm3, brain_mm3" in text
    request = ("covariates={age: 70, sex: F}", "n=1", "out=out")
    code, text = ldm("sample", *settings, "model=runs/simulated/vaegan/model.safetensors", *request)
    assert not code, text
    scan = nib.load(next(cohort_root.glob("sub-*/anat/*T1w.nii.gz")))
    sample = nib.load(tmp_path / "out/sub-000001.nii.gz")
    assert sample.shape == scan.shape
    np.testing.assert_allclose(sample.affine, scan.affine)
