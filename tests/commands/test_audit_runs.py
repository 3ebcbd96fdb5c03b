"""``ldm audit`` on tiny data: its files, its exit status, and what it refuses."""

import json
import logging
import shutil
from types import SimpleNamespace

import PIL.Image
import pytest

from ldm.applications.release import read_audit
from ldm.commands.audit import NOT_PASSED, origin, read_folder
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.file import read_header
from ldm.networks.autoencoder import AutoencoderKL
from tests.conftest import TINY
from tests.training.test_matcher_training import PERSONS, write_persons

ASKED = (*PERSONS, "planted=5")


def copied(tmp_path, count, source="made", target="drawn", first=0):
    """A folder of samples that are pictures of the cohort, or of another folder."""
    (tmp_path / target).mkdir()
    for i in range(count):
        shutil.copy(tmp_path / f"{source}/s{first + i}.png", tmp_path / f"{target}/sub-{i + 1:06d}.png")


def test_only_what_stands_beside_the_images_says_which_model_drew_them(tmp_path, caplog):
    first_stage = AutoencoderKL.__new__(AutoencoderKL)  # of which nothing but the kind counts here
    model = SimpleNamespace(header={"tensors_sha256": "a" * 64}, first_stage=first_stage)
    with caplog.at_level(logging.WARNING):
        found = origin(tmp_path, model)
    assert found["model_sha256"] is None
    assert found["sampling"] is None
    assert found["latents"] == f"of model {'a' * 64}, which need not have drawn the images"
    assert "for no model" in caplog.text
    assert "latents" not in origin(tmp_path, None)
    for name in ("release.json", "provenance.json"):
        (tmp_path / name).write_text(json.dumps({"model_sha256": name, "sampling": {"eta": 0}, "seed": 3}))
        known = {"model_sha256": name, "sampling": {"eta": 0}, "sampling_seed": 3, "synthetic": str(tmp_path)}
        known["conditions"] = None
        assert origin(tmp_path, model) == known == origin(tmp_path, None)


def test_an_image_without_the_file_of_a_channel_is_named(tmp_path):
    grid, intensity = Geometry.plan((4, 4), shape=(4, 4)), IntensityRecipe("window", 0, 255)
    recipe = Preprocessing(2, None, None, (4, 4), (1, 1), intensity, ("a", "b"), grid)
    for i, name in enumerate(("sub-000001_a", "sub-000001_b", "sub-000002_a", "mosaic")):
        PIL.Image.new("L", (4, 4), 51 * i).save(tmp_path / f"{name}.png")
    with pytest.raises(LdmError, match=r"sub-000002_b.png is missing beside .*sub-000002_a.png"):
        list(read_folder(recipe, tmp_path))
    (tmp_path / "sub-000002_a.png").unlink()
    (image,) = read_folder(recipe, tmp_path)
    assert image[:, 0, 0] == pytest.approx([0, 0.2])


@pytest.mark.slow
def test_a_folder_of_copies_does_not_pass_and_another_split_is_refused(ldm, tmp_path):
    write_persons(tmp_path / "made")
    copied(tmp_path, 40)
    code, text = ldm("audit", *ASKED, "synthetic=drawn")
    assert code == 1
    assert "There is no matcher" in text
    assert "ldm train-matcher" in text
    assert ldm("train-matcher", *PERSONS, "trainer.max_steps=12", "trainer.val_every=12")[0] == 0
    code, text = ldm("audit", *ASKED, "synthetic=drawn")
    assert code == NOT_PASSED, text
    assert "NOT PASSED" in text
    assert "the latent space is left out" in text
    found = json.loads((tmp_path / "runs/made/audit/audit.json").read_text())
    assert found["passed"] is False
    assert found["n"]["synthetic"] == 40
    assert found["n"]["train"]["scans"] == 28
    assert found["protocol"]["matcher"]["steps"] == 12
    assert found["protocol"]["model_sha256"] is None
    write_persons(tmp_path / "others", 70)  # the first 40 are the cohort's
    copied(tmp_path, 30, "others", "unseen", first=40)
    code, text = ldm("audit", *PERSONS, "synthetic=unseen", "run_dir=unseen_audit")
    assert code == 0, text
    passed = json.loads((tmp_path / "unseen_audit/audit.json").read_text())
    assert passed["passed"] is True
    assert passed["protocol"]["recall"] == 0.95
    assert passed["any_space"]["synthetic images"]["n"] == 30
    assert "PASSED: not more synthetic images than held-out scans" in " ".join(text.split())
    page = (tmp_path / "runs/made/audit/audit.html").read_text()
    assert "no formal guarantee" in page
    assert "http" not in page
    for overrides, message in (
        (("data.split.seed=1",), "trained on another split"),
        (("data.intensity.upper=200",), "prepared otherwise (intensity"),
        (("synthetic=made",), "no images sub-*.png"),
        (("synthetic=nowhere",), "is no folder"),
        (("planted=0",), "planted must be a whole number of at least 1"),
    ):
        code, text = ldm("audit", *ASKED, "synthetic=drawn", *overrides)
        assert code == 1
        assert message in text


@pytest.mark.slow
def test_z_scores_have_one_range_whatever_the_first_scan(ldm, tmp_path):
    write_persons(tmp_path / "made")
    copied(tmp_path, 6)
    settings = (*PERSONS, "data.intensity={kind: zscore, lower: null, upper: null}")
    assert ldm("train-matcher", *settings, "trainer.max_steps=1", "trainer.val_every=1")[0] == 0
    code, text = ldm("audit", *settings, "planted=3", "synthetic=drawn")
    assert code in (0, NOT_PASSED), text
    found = json.loads((tmp_path / "runs/made/audit/audit.json").read_text())
    assert found["protocol"]["value_range"] == [-5, 5]


@pytest.mark.slow
def test_a_model_is_sampled_and_its_latent_space_looked_in(ldm, tmp_path):
    write_persons(tmp_path / "made")
    networks = [item for item in TINY if not item.startswith(("data.", "vae.network", "ldm.network.channels"))]
    settings = (*networks, *PERSONS, "ldm.network.channels=[16,32]", "trainer.max_steps=1", "trainer.val_every=1")
    for verb in ("train-vae", "train-ldm", "train-matcher"):
        code, text = ldm(verb, *settings)
        assert not code, text
    code, text = ldm("audit", *settings, "n=6", "steps=1", "planted=3", "data.subjects_linked=false")
    assert code in (0, NOT_PASSED), text
    found = json.loads((tmp_path / "runs/made/audit/audit.json").read_text())
    model_sha256 = read_header(tmp_path / "runs/made/ldm/model.safetensors")["tensors_sha256"]
    reason = None if found["passed"] else "a test of the file's form"
    record = read_audit(tmp_path / "runs/made/audit/audit.json", model_sha256, reason)  # as a release does
    assert record["statement"] == found["lines"][0]
    with pytest.raises(LdmError, match="is of another model"):
        read_audit(tmp_path / "runs/made/audit/audit.json", "0" * 64, reason)
    assert set(found["spaces"]) == {"features", "correlation", "latents"}
    assert "reconstructed" in found["spaces"]["latents"]["control"]
    assert found["spaces"]["latents"]["control"]["unchanged"]["recall"] == 1
    assert found["spaces"]["latents"]["control"]["flipped"]["source_found"] == 1  # a flip of it is encoded too
    assert found["protocol"]["sampling"]["num_inference_steps"] == 1
    assert found["protocol"]["conditions"]["source"] == "training distribution"
    assert found["protocol"]["conditions"]["n"] == 6
    assert found["subjects_linked"] is False
    assert "does not say which scans are of one person" in text
    samples = tmp_path / "runs/made/audit/samples"
    provenance = json.loads((samples / "provenance.json").read_text())
    (samples / "provenance.json").write_text(json.dumps(provenance | {"model_sha256": "0" * 64}))
    code, text = ldm("audit", *settings, f"synthetic={samples}", "planted=3")
    assert code == 1
    assert "was drawn from model 0000000000000000" in text
    (samples / "provenance.json").unlink()
    assert ldm("audit", *settings, f"synthetic={samples}", "planted=3")[0] in (0, NOT_PASSED)
    found = json.loads((tmp_path / "runs/made/audit/audit.json").read_text())
    assert found["model_sha256"] is None
    assert "need not have drawn" in found["protocol"]["latents"]
