"""What a detection is asked and what its numbers are worth: known before anything is computed."""

import numpy as np
import pytest

from ldm.applications.anomaly import DetectionOptions
from ldm.applications.cases import Truth, gather, unit_of
from ldm.applications.detection_report import markdown
from ldm.applications.tuning import settled, tuned_baselines
from ldm.commands.detect import expect_a_lesion, worth
from ldm.commands.detect_request import Images, chain_of, digests, map_settings, tuned_ids
from ldm.commands.detect_tuning import chosen_on
from ldm.data.draft import Record
from ldm.data.labels import LabelClasses
from ldm.data.schema import Covariate
from ldm.errors import LdmError
from ldm.model.provenance import settle_request

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
