"""What a comparison refuses before it measures, what it keeps under which name, and which models are in memory."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from omegaconf import OmegaConf

from ldm.commands import audit as audit_verb
from ldm.commands import compare, compare_models
from ldm.commands.compare import HeldOut, build_measure, model_row, read_samples
from ldm.commands.compare_models import check_entries, read_entries
from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.audit import Scans
from ldm.evaluation.comparison import agreements_of_all, markdown
from ldm.evaluation.instruments import OfAnotherSplit
from ldm.model.load import load_generative
from tests.evaluation.test_distances import Texture
from tests.model.test_gan_model import AGE, KIND, gan
from tests.model.test_transfer import model

CONFIG = OmegaConf.create({"seed": 0, "batch_size": 4, "data": {"instrument": None}})


def saved(made, path):
    made.header["split_sha256"] = "ours"
    made.save(path)
    return path


def entry(path, **options):
    (found,) = read_entries({"A": {"path": str(path), **options}})
    return found


@pytest.fixture
def subjects(tmp_path):
    """Eight held-out pictures, one a subject."""
    PIL.Image.new("L", (12, 8)).save(tmp_path / "scan.png")
    rows = [{"age": 50.0 + i, "kind": "abc"[i % 3]} for i in range(8)]
    scan = {"image": str(tmp_path / "scan.png")}
    records = [Record(f"s{i}", f"s{i}", scan, None, row, "test") for i, row in enumerate(rows)]
    return HeldOut([np.zeros((1, 12, 8), np.float32)] * 8, rows, records, "content of eight")


class Measured:
    """Takes the place of a measure: makes the images and the facts, and measures nothing."""

    def row(self, name, key, images, further):
        return len(images()), further()


# models -------------------------------------------------------------------------------------------------


def test_models_are_checked_without_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_models, "load_generative", None)
    paths = [saved(gan(), tmp_path / "gan.safetensors"), saved(model([AGE], "concat"), tmp_path / "ldm.safetensors")]
    for path, illegal, message in (
        (paths[0], {"steps": 3}, "steps is no sampling option of the LSGAN"),
        (paths[1], {"guidance_scale": {"colour": 2}}, "guidance_scale: covariate or conditioner"),
    ):
        one = entry(path)
        assert all(tensor.is_meta for tensor in one.outline.state_dict().values())
        cohort = SimpleNamespace(name="test", split_hash="ours")
        datamodule = SimpleNamespace(preprocessing=one.outline.preprocessing, cohort=cohort)
        network = Texture(preprocessing=None)
        check_entries([one], datamodule, network)
        with pytest.raises(LdmError, match=message):
            check_entries([entry(path, **illegal)], datamodule, network)
        cohort.split_hash = "theirs"
        with pytest.raises(LdmError, match="models.A: was trained on another split"):
            check_entries([one], datamodule, network)


def test_a_model_is_in_memory_while_it_draws_and_draws_once(tmp_path, subjects, monkeypatch):
    loaded = []

    def load(*given):
        made = load_generative(*given)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(compare_models, "load_generative", load)
    one = entry(saved(gan(), tmp_path / "gan.safetensors"))
    count, facts = model_row(Measured(), one, subjects, CONFIG, tmp_path)
    gc.collect()
    assert count == 8
    assert facts["seconds_a_sample"] > 0
    assert [reference() for reference in loaded] == [None]
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*/*.png")}
    assert len(drawn) == 8
    # measured with other features, or shown: from the files
    assert len(read_samples(one, subjects, CONFIG, tmp_path, [0, 5], one.load)) == 2
    assert len(loaded) == 1
    assert drawn == {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*/*.png")}


def test_samples_lie_under_what_decides_them(tmp_path, subjects):
    path = saved(model([AGE], "concat"), tmp_path / "ldm.safetensors")
    fewer = HeldOut(subjects.images[1:], subjects.rows[1:], subjects.records[1:], "content of seven")
    asked = [(entry(path), subjects, CONFIG), (entry(path, steps=3), subjects, CONFIG), (entry(path), fewer, CONFIG)]
    asked += [(entry(path), subjects, OmegaConf.merge(CONFIG, more)) for more in ({"seed": 1}, {"batch_size": 2})]
    names = [compare.samples_folder(*one) for one in asked]
    assert len(set(names)) == len(names)
    assert compare.samples_folder(entry(path, steps=2), subjects, CONFIG) == names[0]  # which is the model's default


# rows ---------------------------------------------------------------------------------------------------


def test_rows_of_other_channels_have_other_names(tmp_path, subjects):
    recipe = gan().preprocessing
    cohort = SimpleNamespace(split_hash="ours", content_hash=lambda: subjects.content)
    datamodule = SimpleNamespace(preprocessing=recipe, schema=CovariateSchema([AGE, KIND]), cohort=cohort)
    measures = (
        build_measure(CONFIG, datamodule, replace(recipe, channels=channels), Texture(), subjects, tmp_path)
        for channels in (("T1",), ("T2",))
    )
    one, two = (measure.file_name("held-out images", {}) for measure in measures)
    assert one != two


def test_every_instrument_of_a_row_is_heard():
    rows = [{"age": 40.0 + i} for i in range(6)]
    pictures = [np.full((1, 2, 2), row["age"], np.float32) for row in rows]
    instruments = {
        "near": lambda image: {"age": float(image.mean())},
        "far": lambda image: {"age": 2 * float(image.mean()), "unknown": 1.0},
    }
    found = agreements_of_all(instruments, CovariateSchema([AGE]), rows, pictures, list("abcdef"))
    assert {name: (one["instrument"], round(one["slope"], 3)) for name, one in found.items()} == {
        "age": ("near", 1.0),
        "age (far)": ("far", 2.0),
    }


def test_the_table_says_where_each_row_was_timed_and_what_is_of_another_split():
    metrics = ("frechet", "kid", "mmd", "precision", "recall", "density", "coverage", "frechet_ratio")
    numbers = {**dict.fromkeys(metrics, 1.0), **{f"{name}_interval": [0.0, 2.0] for name in metrics}}
    numbers |= {"frechet_infinity": None}
    rows = {name: {**numbers, "seconds_a_sample": 0.5, "timed_on": "CUDA"} for name in ("A", "B")}
    rows["A"] |= {"model_sha256": "0123456789abcdef0", "steps": 70, "sampling": {"steps": 5, "eta": None}}
    table = {"rows": {"real": numbers, **rows}, "floor": "real", "controls": [], "untrusted": {}}
    table["protocol"] = {"cohort": "brains", "n": 8, "seconds_a_sample": "batches of 4"}
    text = markdown(table)
    assert "* seconds_a_sample: batches of 4 on CUDA\n" in text
    assert text.count("CUDA") == 1
    assert "* A: 0123456789abcdef, 70 steps; steps 5\n" in text
    assert "other versions" not in text
    table["protocol"]["versions"], rows["B"]["versions"] = {"ldm": "2"}, {"ldm": "1"}
    assert "* B was measured by other versions: ldm 1\n" in markdown(table)
    rows["B"]["timed_on"] = "CPU, 2 threads"
    text = markdown(table)
    assert "* seconds_a_sample: batches of 4\n" in text
    assert [" 0.5 (CUDA) |" in line for line in text.splitlines() if line.startswith(("| A", "| B"))] == [True, False]
    assert " 0.5 (CPU, 2 threads) |" in text
    assert "another split" not in text
    table["protocol"]["of_another_split"] = ["segmenter"]
    assert "\nsegmenter: The instrument was trained on another split" in markdown(table)


# what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"n_ref": -1}, {"batch_size": 0}, {"n": 1e1}], ids=str)
def test_counts_are_checked_first(wrong):
    (name,) = wrong
    with pytest.raises(LdmError, match=f"{name} must be a whole number of at least 1"):
        compare.run(OmegaConf.create({"n": None, "n_ref": 100, "batch_size": 16, **wrong}))


def test_too_few_subjects_are_refused_before_anything_is_drawn(subjects, monkeypatch):
    records = [Record(f"s{i}", f"p{i % 2}", {}, None, {}, "test") for i in range(8)]
    monkeypatch.setattr(compare, "held_out", lambda *_: (subjects.images, subjects.rows, records))
    with pytest.raises(LdmError, match="Of held-out images .* those of 2 subjects; legal: 3 subjects or more"):
        HeldOut.choose(None, ("image",), None, 0)
    datamodule = SimpleNamespace(dataset=lambda _: records, cohort=SimpleNamespace(split=lambda _: records))
    with pytest.raises(LdmError, match="Of training images .* those of 2 subjects; legal: 3 subjects or more"):
        compare.reference_positions(datamodule, 100, 0)


def test_an_audit_counts_subjects_before_it_draws(monkeypatch, tmp_path):
    for name in ("cohort_datamodule", "expect_same_split", "require_file", "check_matcher", "checked_flips"):
        monkeypatch.setattr(audit_verb, name, lambda *_: None)
    cohort = SimpleNamespace(preprocessing=SimpleNamespace(spatial_dims=2), cohort=None)
    monkeypatch.setattr(audit_verb, "prepared", lambda _: cohort)
    monkeypatch.setattr(audit_verb, "optional_model", lambda _: (None, tmp_path))
    monkeypatch.setattr(audit_verb.Matcher, "load", lambda *_: None)
    monkeypatch.setattr(audit_verb, "real_scans", lambda *_: Scans([0, 0], ["one", "one"], ["a", "b"]))
    monkeypatch.setattr(audit_verb, "synthetic_folder", None)
    counts = {"n": 4, "batch_size": 4, "planted": 4}
    asked = {"rate": 0.05, "alpha": 0.05, "recall": 0.95, "seed": 0, "flip_axes": None, "matcher_path": "m"}
    with pytest.raises(LdmError, match="needs 2 subjects or more"):
        audit_verb.run(OmegaConf.create({**counts, **asked, "run_dir": str(tmp_path)}))


def test_instruments_are_for_the_channels_that_models_generate(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(compare, "find_instruments", lambda sections, recipe, *_: given.append(recipe) or {})
    recipe = Preprocessing(2, None, channels=("T1",))
    datamodule = SimpleNamespace(
        preprocessing=replace(recipe, channels=("T1", "T2")),
        schema=CovariateSchema([]),
        cohort=SimpleNamespace(split_hash="0", content_hash=lambda: "0"),
    )
    network, config = SimpleNamespace(identity={"sha256": "0"}), OmegaConf.create({"data": {}, "seed": 0})
    build_measure(config, datamodule, recipe, network, HeldOut([], [], [], ""), tmp_path)
    assert given == [recipe]
    found = {"segmenter": OfAnotherSplit(dict), "ventricles": dict}
    monkeypatch.setattr(compare, "find_instruments", lambda *_: found)
    measure = build_measure(config, datamodule, recipe, network, HeldOut([], [], [], ""), tmp_path)
    assert measure.of_another_split == ["segmenter"]
