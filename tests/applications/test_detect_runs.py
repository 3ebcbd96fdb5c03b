"""Anomaly detection from the command line: train, tune, detect, and what is refused."""

import gc
import json
import os
import shutil
import sys

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from ldm.applications.detection import INTENSITIES, Found
from ldm.commands import detect
from ldm.data.images import read
from ldm.model.classifier import Classifier
from ldm.model.file import read_header, read_tensors, write_model
from ldm.training.logging import read_metrics
from tests.applications.blobs import DATA, SMALL, write_blobs

pytestmark = pytest.mark.slow

FAST = ("steps=10", "batch_size=16", "resamples=20", "score=mean")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A diffusion model and a classifier of the small cohort."""
    from ldm.commands.main import main

    folder = tmp_path_factory.mktemp("blobs")
    root = write_blobs(folder / "data")
    common = (*DATA, *SMALL, f"data.root={root}", f"runs_dir={folder}/runs")
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        for verb, steps in (("train-ldm", 160), ("train-classifier", 80)):
            sys.argv = ["ldm", verb, *common, f"trainer.max_steps={steps}", f"trainer.val_every={steps}"]
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "runs/blobs", common, root


def test_the_classifier_tells_little_noise_better_than_much(trained):
    run, _, _ = trained
    metrics = read_metrics(run / "classifier/metrics.jsonl")
    accuracy = [metrics[f"classifier/val/accuracy_bin/{k}"][-1][1] for k in range(10)]
    assert accuracy[0] > 0.85
    assert accuracy[0] > accuracy[9] + 0.15
    classifier = Classifier.load(run / "classifier/model.safetensors")
    assert classifier.target.levels == ("0", "1")
    assert classifier.facts["model_sha256"] == read_header(run / "ldm/model.safetensors")["tensors_sha256"]


def test_tuned_on_validation_and_evaluated_on_test(trained, ldm, tmp_path):
    run, common, root = trained
    shutil.rmtree(run / "detection", ignore_errors=True)
    request = ("detect", *common, *FAST, "intensity_channel=FLAIR")
    code, text = ldm(*request, "tune=true", "sweep={levels: [300, 500], scales: [10, 60], share: 0.5}")
    assert not code, text
    chosen = json.loads((run / "ldm/detection.json").read_text())["guides"]["classifier"]
    assert len(chosen["sweep"]) == 4
    assert chosen["images"]["patients"] == 4
    largest = max(chosen["sweep"], key=lambda row: row["dice_pooled"])
    assert {name: chosen[name] for name in ("level", "scale", "threshold")} == {
        name: largest[name] for name in ("level", "scale", "threshold")
    }
    assert set(chosen["baselines"]) == {"partial_noising", *INTENSITIES}
    assert chosen["lesion"] == {"lesion": [1]}
    code, text = ldm(*request, "healthy=1", "out=refused")
    assert code
    assert "tuned for target=diseased healthy=0, and not for target=diseased healthy=1" in text
    code, text = ldm(*request, "data.label_names={lesion: 2}", "out=refused")
    assert code
    assert "tuned for lesions that are lesion (1), and not for lesion (2)" in text

    code, text = ldm(*request)
    assert not code, text
    metrics = json.loads((run / "detection/metrics.json").read_text())
    assert metrics["images"] == {"healthy": 8, "diseased": 8}
    assert metrics["chosen_on_these_images"] is False
    found = metrics["methods"]["classifier"]
    assert found["pixel_auroc"]["value"] > 0.8
    assert found["image_auroc"]["value"] > 0.9
    assert found["dice"]["value"] > 0.4
    assert found["image_auroc"]["value"] > metrics["methods"]["partial_noising"]["image_auroc"]["value"]
    sanity = {name: entry["value"] for name, entry in metrics["sanity"].items()}
    assert sanity["round_trip_mae"] < 0.1
    assert sanity["diseased_map_guided"] > 2 * sanity["healthy_map_guided"]
    assert sanity["healthy_change"] == pytest.approx(sanity["healthy_map_guided"] - sanity["healthy_map_unguided"])
    assert "| classifier |" in (run / "detection/metrics.md").read_text()
    provenance = json.loads((run / "detection/provenance.json").read_text())
    assert provenance["options"]["level"] == chosen["level"]
    assert provenance["changeable"]["threshold"] == chosen["threshold"]
    assert (metrics["trained_on_these"], metrics["unit"]) == (0, "patient")

    scores = pd.read_csv(run / "detection/scores.tsv", sep="\t")
    name = scores.loc[scores["diseased"] == 1, "participant_id"].iloc[0]
    anomaly = np.load(run / f"detection/{name}_anomaly.npy")
    lesion = read(run / f"detection/{name}_lesion.png").array[0]
    np.testing.assert_array_equal(lesion > 0, anomaly > chosen["threshold"])
    image, healthy = (
        np.stack([read(folder / file).array[0] for file in files]) / 255
        for folder, files in (
            (root, (f"T1/{name}.png", f"FLAIR/{name}.png")),
            (run / "detection", (f"{name}_healthy_T1.png", f"{name}_healthy_FLAIR.png")),
        )
    )
    np.testing.assert_allclose(np.abs(image - healthy).sum(0), anomaly, atol=0.01)  # as written: 8 bits
    assert (run / "detection/panel.png").is_file()

    # the same command goes on from what is stored; another one is refused
    stored = run / "detection/model_space" / f"{name}.npz"
    time = stored.stat().st_mtime_ns
    code, text = ldm(*request)
    assert not code, text
    assert stored.stat().st_mtime_ns == time
    code, text = ldm(*request, "scale=5")
    assert code
    assert "results of another request (" in text
    assert "(options differ)" in text

    # what only decides maps and scores may change: they are written anew from what is stored
    code, text = ldm(*request, "threshold=0.5", "smoothing=1", "score=max")
    assert not code, text
    assert stored.stat().st_mtime_ns == time
    assert np.load(run / f"detection/{name}_anomaly.npy").max() < anomaly.max()
    again = json.loads((run / "detection/metrics.json").read_text())
    assert again["protocol"]["score"] == "max"
    assert again["thresholds"]["classifier"] == 0.5
    code, text = ldm(*request, "smoothing=1", "evaluate=false")
    assert not code, text
    assert not (run / f"detection/{name}_lesion.png").exists()  # the tuned threshold is of other maps
    assert not (run / "detection/metrics.json").exists()

    # patients of the validation split that nothing was chosen on
    code, text = ldm(*request, "split=valid", "compare=false", "out=rest")
    assert not code, text
    metrics = json.loads((tmp_path / "rest/metrics.json").read_text())
    assert metrics["patients"] == 4
    assert metrics["sanity"] == {}
    assert metrics["protocol"]["split"] == "valid"

    # a model without a first stage can be compared with one that has been trained on the same images
    code, text = ldm(
        "train-vae",
        *(item for item in common if not item.startswith("vae=")),
        "vae.network={channels: [8,8], attention_levels: [false,false], norm_num_groups: 8}",
        "vae.loss={perceptual_weight: 0, adversarial_weight: 0}",
        "trainer.max_steps=2",
        "run_dir=vae",
    )
    assert not code, text
    code, text = ldm(*request, "split=valid", "out=rebuilt", "reconstructed_by=vae/model.safetensors")
    assert not code, text
    metrics = json.loads((tmp_path / "rebuilt/metrics.json").read_text())
    assert set(metrics["methods"]) == {"classifier", "partial_noising", "reconstruction", *INTENSITIES}
    code, text = ldm(*request, "out=refused", f"reconstructed_by={run}/ldm/model.safetensors")
    assert code

    # a threshold of one channel is not one of another
    code, text = ldm(*request[:-1], "split=valid", "out=other_channel")
    assert not code, text
    assert "The threshold of plain intensity was chosen for FLAIR, so T1 has none" in text
    metrics = json.loads((tmp_path / "other_channel/metrics.json").read_text())
    assert [metrics["thresholds"][name] for name in INTENSITIES] == [None, None]
    assert metrics["thresholds"]["partial_noising"] is not None


def test_what_choices_were_made_on_is_known_again(trained, ldm, tmp_path):
    run, common, root = trained
    shutil.copytree(run / "ldm", tmp_path / "ldm")  # where choices are kept
    detect = ("detect", *common, *FAST, "guide=none", "model=ldm/model.safetensors")
    request = (*detect, "out=tuned")
    sweep = ("tune=true", "sweep.levels=[300, 310]", "sweep.split=all")
    code, text = ldm(*request, *sweep)
    assert not code, text
    kept = tmp_path / "ldm/detection.json"
    chosen = json.loads(kept.read_text())["guides"]["none"]
    assert [row["level"] for row in chosen["sweep"]] == [300]  # of ten moves both begin at the same
    code, text = ldm(*detect, "split=all", "out=all", "compare=false")
    assert not code, text
    metrics = json.loads((tmp_path / "all/metrics.json").read_text())
    assert metrics["chosen_on_these_images"] is True
    assert metrics["trained_on_these"] > 0
    assert "the model was trained on" in (tmp_path / "all/metrics.md").read_text()

    # other masks are another sweep
    rows = chosen["sweep"]
    for path in (root / "mask").glob("*-1.png"):
        mask = np.asarray(PIL.Image.open(path))
        PIL.Image.fromarray(np.roll(mask, 5, axis=0)).save(path)
    try:
        code, text = ldm(*request, *sweep, "data.cache=false")
        assert not code, text
    finally:
        for path in (root / "mask").glob("*-1.png"):
            PIL.Image.fromarray(np.roll(np.asarray(PIL.Image.open(path)), -5, axis=0)).save(path)
    again = json.loads(kept.read_text())["guides"]["none"]["sweep"]
    assert again[0]["dice_pooled"] != rows[0]["dice_pooled"]


def test_a_folder_that_choices_were_made_on_is_known_again(trained, ldm, tmp_path):
    run, _, root = trained
    for name in ("p0-0", "p0-1"):
        for channel in ("T1", "FLAIR"):
            (tmp_path / "cases").mkdir(exist_ok=True)
            shutil.copy(root / channel / f"{name}.png", tmp_path / f"cases/{name}_{channel}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        shutil.copy(root / "mask" / f"{name}.png", tmp_path / f"masks/{name}.png")
    shutil.copytree(run / "ldm", tmp_path / "ldm")
    request = ("detect", "model=ldm/model.safetensors", "guide=none", "images=cases", "masks=masks", *FAST)
    code, text = ldm(*request, "tune=true", "sweep.levels=[300]", "out=tuned")
    assert not code, text
    code, text = ldm(*request, "out=same")
    assert not code, text
    assert "the numbers are too good" in text
    shutil.copytree(tmp_path / "cases", tmp_path / "others")
    for path in (tmp_path / "others").iterdir():
        PIL.Image.fromarray(np.asarray(PIL.Image.open(path)) // 2).save(path)
    code, text = ldm(*request, "images=others", "out=other")
    assert not code, text
    assert json.loads((tmp_path / "other/metrics.json").read_text())["chosen_on_these_images"] is False

    shutil.copytree(tmp_path / "masks", tmp_path / "masks/again")
    code, text = ldm(*request, "out=refused")
    assert code
    assert "have one name" in text
    shutil.rmtree(tmp_path / "masks/again")
    (tmp_path / "table.csv").write_text("participant_id,diseased\np0-0,0\np0-1,0\n")
    code, text = ldm(*request, "table=table.csv", "out=refused")
    assert code
    assert "'p0-1' is healthy by its diseased, but" in text
    (tmp_path / "table.csv").write_text("participant_id,diseased\np0-0,0\np0-1,1\np0-1,0\n")
    code, text = ldm(*request, "table=table.csv", "out=refused")
    assert code
    assert "'p0-1' has two rows" in text


def test_a_case_is_written_as_it_is_done_and_not_kept(trained, ldm, tmp_path, monkeypatch):
    _, common, _ = trained
    computed, alive = [], []

    def write(out, *_):
        computed.append(len(list((out / "model_space").glob("*.npz"))))
        alive.append(sum(isinstance(one, Found) for one in gc.get_objects()))

    monkeypatch.setattr(detect, "write_case", write)
    settings = ("guide=none", "level=300", "batch_size=4", "evaluate=false", "shown=2")
    code, text = ldm("detect", *common, *FAST, *settings, "out=out")
    assert not code, text
    assert computed == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4
    assert max(alive) <= 2  # the one at hand, and the one before it


def test_a_folder_is_read_before_anything_is_computed(trained, ldm, tmp_path):
    run, _, root = trained
    (tmp_path / "cases").mkdir()
    for name in ("p0-0", "p0-1", "p1-0", "p1-1"):
        for channel in ("T1", "FLAIR"):
            shutil.copy(root / channel / f"{name}.png", tmp_path / f"cases/{name}_{channel}.png")
    bad = [tmp_path / f"cases/{name}_T1.png" for name in ("p0-1", "p1-0")]
    for path in bad:
        PIL.Image.fromarray(np.full((16, 16), 7, np.uint8)).save(path)
    request = ("detect", f"model={run}/ldm/model.safetensors", "guide=none", "images=cases", *FAST, "out=out")
    code, text = ldm(*request)
    assert code
    assert "2 of 4 images cannot be used" in text
    assert all(path.name in text for path in bad)
    assert not (tmp_path / "out/model_space").exists()
    for name in ("p0-1", "p1-0"):  # taken out, the rest is the request
        for channel in ("T1", "FLAIR"):
            (tmp_path / f"cases/{name}_{channel}.png").unlink()
    code, text = ldm(*request)
    assert not code, text

    # masks that are empty, and patients that are known or not
    (tmp_path / "masks").mkdir()
    for name in ("p0-0", "p1-1"):
        shutil.copy(root / "mask/p0-0.png", tmp_path / f"masks/{name}.png")
    table = "participant_id\tdiseased\tsubject\np0-0\t0\ta\np1-1\t1\tb\n"
    (tmp_path / "table.tsv").write_text(table)
    code, text = ldm(*request[:-1], "masks=masks", "table=table.tsv", "out=empty")
    assert code
    assert "None of the 2 masks to evaluate (p0-0, p1-1) has a label other than 0" in text
    assert not (tmp_path / "empty/model_space").exists()
    code, text = ldm(*request, "table=table.tsv")
    assert not code, text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["unit"] == "patient"
    (tmp_path / "table.tsv").write_text(table.replace("subject", "other"))
    code, text = ldm(*request, "table=table.tsv")
    assert not code, text
    assert "each counts as a patient of its own" in text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["unit"] == "image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("level=abc",), "level is 'abc'"),
        (("scale=-5",), "scale is -5; legal: 0 (no guidance) or more"),
        (("smoothing=wide",), "smoothing is 'wide'"),
        (("tune=true", "sweep.levels=[]"), "sweep.levels is empty"),
        (("tune=true", "sweep.scales=[abc]"), "scale is 'abc'"),
        (("tune=true", "sweep.share=0"), "sweep.share is 0"),
        (("tune=true", "level=300"), "level has no meaning with tune=true: set sweep.levels"),
        (("images=cases", "lesion=[tumour]"), "lesion names classes of data.label_names"),
    ],
)
def test_illegal_requests(trained, ldm, arguments, message):
    _, common, _ = trained
    code, text = ldm("detect", *common, *FAST, "out=refused", *arguments)
    assert code
    assert message in text


@pytest.mark.parametrize(("guide", "scale"), [("free", 2.0), ("none", None)])
def test_a_folder_of_images_without_classifier(trained, ldm, tmp_path, guide, scale):
    _, common, root = trained
    cases, masks = tmp_path / "cases", tmp_path / "masks"
    masks.mkdir()
    for name in ("p0-0", "p0-1", "p1-0", "p1-1"):
        (cases / name).mkdir(parents=True)
        for channel in ("T1", "FLAIR"):
            shutil.copy(root / channel / f"{name}.png", cases / name / f"{name}_{channel.lower()}.png")
        shutil.copy(root / "mask" / f"{name}.png", masks / f"{name}_seg.png")
    model = next(item for item in common if item.startswith("runs_dir=")).removeprefix("runs_dir=")
    request = ("detect", f"model={model}/blobs/ldm/model.safetensors", f"guide={guide}", "images=cases", *FAST)
    code, text = ldm(*request, *([f"scale={scale}"] if scale else []), "compare=false", "out=alone")
    assert not code, text
    scores = pd.read_csv(tmp_path / "alone/scores.tsv", sep="\t")
    assert scores["diseased"].isna().all()
    unbroken = "".join(text.split())  # a long path is broken where the line ends
    assert f"detection.jsonhasnothingforguide={guide},sothesearenottuned:level:" in unbroken
    code, text = ldm(*request, "masks=masks", "out=compared", "threshold=0.4")
    assert not code, text
    metrics = json.loads((tmp_path / "compared/metrics.json").read_text())
    assert set(metrics["methods"]) == ({"none"} if guide == "none" else {"free", "partial_noising", *INTENSITIES})
    if guide == "free":
        scores = pd.read_csv(tmp_path / "compared/scores.tsv", sep="\t").groupby("diseased")["score"].mean()
        assert scores[1] > scores[0]
        return

    for change, arguments, message in (
        (lambda: (masks / "p1-1_seg.png").unlink(), (), "'p1-1' has no mask"),
        (
            lambda: PIL.Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / "p1-1_seg.png"),
            (),
            "record 'p1-1': 'T1' and 'labels' do not lie on one grid (shapes are (16, 16) and (9, 9))",
        ),
        (
            lambda: [shutil.copy(root / "mask/p0-0.png", masks / f"{name}_seg.png") for name in ("p0-1", "p1-1")],
            (),
            "All 4 images to evaluate are healthy by 'diseased'",
        ),
        (lambda: None, ("healthy=2",), "has no level '2'"),
        (lambda: None, ("images=masks",), "no image there is called NAME_{T1,FLAIR}"),
        (lambda: (cases / "p1-0/p1-0_flair.png").unlink(), (), "'p1-0' has no FLAIR (no p1-0_FLAIR.*"),
    ):
        change()
        code, text = ldm(*request, "masks=masks", "out=refused", *arguments)
        assert code, message
        assert message in text


def test_what_does_not_belong_together_is_refused(trained, ldm, tmp_path):
    run, common, _ = trained
    other = tmp_path / "other.safetensors"
    header, tensors = read_header(run / "ldm/model.safetensors"), read_tensors(run / "ldm/model.safetensors")
    tensors["latent_space.std"] = tensors["latent_space.std"] * 1.1
    write_model(other, tensors, header)
    code, text = ldm("detect", *common, *FAST, f"model={other}", "out=refused")
    assert code
    assert "noisy latents of another diffusion model (latent_space_sha256 differ)" in text

    (tmp_path / "detection.json").write_text(json.dumps({"model_sha256": "0" * 64, "guides": {}}))
    code, text = ldm("detect", *common, *FAST, f"model={other}", "guide=free", "out=refused")
    assert code
    assert "was made for another model" in text
    (tmp_path / "detection.json").unlink()

    for arguments, message in (
        (("classifier.target=diseasd",), "no covariate 'diseasd'. Did you mean 'diseased'?"),
        (("classifier.class_weights=balance",), "Did you mean 'balanced'?"),
        (("data.split={column: null, seed: 3}",), "another split"),
    ):
        code, text = ldm("train-classifier", *common, "run_dir=refused", *arguments)
        assert code
        assert message in text
