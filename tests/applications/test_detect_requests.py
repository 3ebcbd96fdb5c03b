"""What a detection is asked and what its numbers are worth: known before anything is computed."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from ldm.applications.anomaly import DetectionOptions
from ldm.applications.cases import Truth, gather, unit_of
from ldm.applications.detection_report import markdown
from ldm.applications.tuning import (
    FILE,
    expect_lesions_of,
    lesion_values,
    read_choices,
    settled,
    tuned_baselines,
    write_choices,
)
from ldm.commands.detect import (
    baseline_thresholds,
    expect_a_lesion,
    expect_diffusion_of_images,
    warn_of_defaults,
    worth,
)
from ldm.commands.detect_request import FIRST_STAGE, Images, chain_of, digests, map_settings, tuned_ids
from ldm.commands.detect_tuning import chosen_on
from ldm.data.draft import Record
from ldm.data.labels import LabelClasses
from ldm.data.schema import Covariate
from ldm.errors import LdmError
from ldm.model.file import write_model
from ldm.model.provenance import settle_request
from tests.model.test_gan_model import gan
from tests.model.test_transfer import model as diffusion_model

TRUTH = Truth(Covariate("diseased", "categorical", levels=("0", "1")), "0", LabelClasses.from_config({"core": 4}))


def record(name, subject, files=(), split="valid"):
    return Record(name, subject, {f"C{k}": str(file) for k, file in enumerate(files)}, None, {}, split)


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    return {name: tmp_path / name for name in ("a", "b", "c")}


def images(*records, split="valid", **settings):
    sha256 = None if split is None else "0" * 64
    return Images(records, TRUTH, split, sha256, files_sha256=digests(records), **settings)


def test_patients_are_known_again_by_name_on_other_slices(files):
    tuned = images(record("p1_080", "p1", [f"{files['a']}::z=80"]))
    entry = {"images": chosen_on(tuned, tuned.records)}
    others = images(
        record("p1_100", "p1", [f"{files['a']}::z=100"]),
        record("p2_100", "p2", [f"{files['b']}::z=100"]),
    )
    assert tuned_ids(others, entry) == {"p1_100"}
    assert tuned_ids(others, None) == set()


def test_patients_are_known_again_by_file_wherever_it_lies(files, tmp_path):
    tuned = images(record("p1", "p1", [files["a"], files["b"]]))
    entry = {"images": chosen_on(tuned, tuned.records)}
    (tmp_path / "copied").write_text("b")
    folder = images(
        record("x", "x", [tmp_path / "copied"]), record("p1", "p1", [files["c"]]), split=None, patients_known=False
    )
    assert tuned_ids(folder, entry) == {"x"}  # the same name in a folder may be somebody else's
    cohort = images(record("p1", "p1", [files["c"]]), record("p3", "p3", [files["b"]]))
    assert tuned_ids(cohort, {"images": chosen_on(folder, folder.records[:1])}) == {"p3"}


def test_training_images_are_told_of(caplog):
    everyone = images(record("a", "a", split="train"), record("b", "b", split="test"), split="all")
    found = worth(everyone, {"a", "b"}, {"b"})
    assert found == {"trained_on_these": 1, "chosen_on_these_images": True, "unit": "patient"}
    assert "trained on 1 of these 2 images" in caplog.text
    assert worth(everyone, {"b"}, set())["trained_on_these"] == 0
    text = markdown({"images": {"healthy": 1, "diseased": 1}, "methods": {}, **found})
    assert "1 of 2 images are ones that the model was trained on" in text
    assert "were chosen on these images" in text


def test_images_without_patients_are_told_of(caplog):
    folder = images(record("a", "a"), record("b", "b"), split=None, patients_known=False)
    found = worth(folder, {"a", "b"}, set())
    assert found == {"trained_on_these": None, "chosen_on_these_images": False, "unit": "image"}
    assert "intervals are too narrow" in caplog.text
    assert "not over patients" in markdown({"images": {"healthy": 1, "diseased": 1}, "methods": {}, **found})
    assert unit_of(True) == "patient"
    assert chosen_on(folder, folder.records)["unit"] == "image"


def test_only_what_decides_the_counterparts_binds_a_folder(tmp_path):
    options, other = DetectionOptions(), DetectionOptions(smoothing=1.0, score="mean", channels="mean")
    settle_request(tmp_path, chain_of(options), changeable=map_settings(options))
    settle_request(tmp_path, chain_of(other), changeable=map_settings(other, 0.3))
    with pytest.raises(LdmError, match=r"\(steps differ\)"):
        settle_request(tmp_path, chain_of(DetectionOptions(steps=7)), changeable=map_settings(options))


def test_other_maps_leave_the_chains_of_what_is_compared():
    baselines = {"partial_noising": {"level": 300.0, "threshold": 0.4}}
    entry = {"options": settled(DetectionOptions()), "baselines": baselines}
    assert tuned_baselines(entry, DetectionOptions(level=200.0)) == baselines
    other = tuned_baselines(entry, DetectionOptions(smoothing=1.0))
    assert other == {"partial_noising": {"level": 300.0, "threshold": None}}
    assert tuned_baselines(entry, DetectionOptions(steps=7)) == tuned_baselines(None, DetectionOptions()) == {}


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, {"weight": torch.zeros(1)}, {"kind": "diffusion"})
    return path


def choice(**question):
    kept = {"subjects": [], "files": [], "unit": "patient"}
    options = settled(DetectionOptions())
    return {"classifier_sha256": None, "images": kept, "level": 300.0, "options": options, **question}


def test_what_was_chosen_for_another_question_is_refused(model_file):
    older, entry = choice(), choice(target="diseased", healthy="0", lesion={"core": [4]})
    write_choices(model_file, "free", entry)
    write_choices(model_file, "none", older)
    assert read_choices(model_file, None, "free", TRUTH) == entry
    without = {name: value for name, value in entry["options"].items() if name != "change"}  # there was none to choose
    write_choices(model_file, "free", entry | {"options": without})
    assert read_choices(model_file, None, "free", TRUTH) == entry
    expect_lesions_of(entry, model_file, "free", TRUTH)
    other_target = Truth(Covariate("tumour", "categorical", levels=("0", "1")), "0")
    for truth, now in ((other_target, "target=tumour healthy=0"), (replace(TRUTH, healthy="1"), "target=diseased he")):
        with pytest.raises(LdmError, match=rf"for target=diseased healthy=0, and not for {now}.*tune=true guide=free"):
            read_choices(model_file, None, "free", truth)
        assert read_choices(model_file, None, "none", truth) == older
    for classes, words in ((LabelClasses.from_config({"edema": 2}), r"edema \(2\)"), (None, "every label but 0")):
        truth = replace(TRUTH, lesion=classes)
        with pytest.raises(LdmError, match=rf"tuned for lesions that are core \(4\), and not for {words}"):
            expect_lesions_of(entry, model_file, "free", truth)
        expect_lesions_of(older, model_file, "none", truth)
    assert lesion_values(TRUTH) == entry["lesion"]


def test_guides_that_are_tuned_side_by_side_are_both_kept(model_file):
    lock = FileLock(f"{model_file.with_name(FILE)}.lock")
    with lock:
        other = threading.Thread(target=write_choices, args=(model_file, "free", choice()))
        other.start()
        other.join(0.3)
        assert not model_file.with_name(FILE).exists()  # it waits for who writes already
    other.join()
    write_choices(model_file, "none", choice())
    assert set(json.loads(model_file.with_name(FILE).read_text())["guides"]) == {"free", "none"}


def test_what_nobody_tuned_is_told_of(model_file, caplog):
    asked = {"level": None, "scale": None, "threshold": None}
    warn_of_defaults({**asked, "level": 300.0, "threshold": 0.1}, model_file, DetectionOptions(guide="none"), 300.0)
    assert not caplog.text
    warn_of_defaults(asked, model_file, DetectionOptions(), 500.0)
    assert (
        "detection.json has nothing for guide=classifier, so these are not tuned: level: 500; scale: 100" in caplog.text
    )
    assert "no lesions are written. ldm detect tune=true guide=classifier chooses them" in caplog.text


def test_only_diffusion_models_of_images_can_detect(tmp_path):
    with pytest.raises(LdmError, match=r"gan.safetensors holds LSGAN; only a diffusion model can"):
        expect_diffusion_of_images(gan(), tmp_path / "gan.safetensors")
    model = diffusion_model([], "none")
    expect_diffusion_of_images(model, tmp_path / "model.safetensors")
    model.header["target"] = {"labels": {"tumour": [1]}, "unnamed": []}
    with pytest.raises(LdmError, match=r"labels.safetensors makes label maps, and no images"):
        expect_diffusion_of_images(model, tmp_path / "labels.safetensors")


def test_a_threshold_of_another_first_stage_is_not_taken(caplog):
    one, other = (SimpleNamespace(rebuilds=True, rebuilder=SimpleNamespace(sha256=name)) for name in ("one", "other"))
    baselines = {"reconstruction": {"threshold": 0.4, FIRST_STAGE: "one"}}
    assert baseline_thresholds(baselines, "T1", one) == {"reconstruction": 0.4}
    assert baseline_thresholds({"reconstruction": {"threshold": 0.4}}, "T1", other) == {"reconstruction": 0.4}
    assert not caplog.text
    assert baseline_thresholds(baselines, "T1", other) == {"reconstruction": None}
    assert "another first stage" in caplog.text


def test_masks_without_any_lesion_are_refused_by_name():
    both = images(record("a", "a"), record("b", "b"), record("c", "c"))
    with pytest.raises(LdmError, match=r"None of the 2 masks to evaluate \(a, b\) has a label of core"):
        expect_a_lesion(both, {"a", "b"}, {"a": False, "b": False, "c": True})
    expect_a_lesion(both, {"a", "c"}, {"a": False, "b": False, "c": True})
    expect_a_lesion(both, {"a"}, {"a": None})


def test_all_faults_are_told_at_once():
    def read(one):
        if one.id != "b":
            raise LdmError(f"{one.id}.png: is constant.")
        return np.zeros(1)

    records = [record(name, name) for name in "abc"]
    with pytest.raises(LdmError, match=r"2 of 3 images cannot be used:\n'a': a.png: is constant.\n'c': c.png"):
        gather(records, read)
    assert len(gather(records[1:2], read)) == 1
