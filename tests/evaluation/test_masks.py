"""Dice of asked and found label maps: known answers for obedient, indifferent and unmeasurable samples."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from ldm.commands.evaluate import mask_agreement
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.images import write
from ldm.data.intensity import IntensityRecipe
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.masks import (
    CHANCE,
    OF_HELD_OUT,
    OF_SAMPLES,
    REBUILT,
    mask_dice,
    mask_segmenter,
    other_subjects,
    summary,
)
from ldm.evaluation.pages import template
from ldm.evaluation.report import masks_in_words
from ldm.model.segmenter import Segmenter, build_segmenter

CLASSES = LabelClasses.from_config({"left": 10, "right": [20, 21]})
RECIPE = Preprocessing(
    2,
    None,
    shape=(8, 8),
    intensity=IntensityRecipe(),
    channels=("image",),
    reference=Geometry.plan((8, 8)),
)


class Reader:
    """A segmenter of pictures that are class indices: it reads the map that a picture is."""

    labels = CLASSES

    def segment(self, image):
        return image[0].astype(np.uint8)


def stripe(column, width=2, value=1):
    """A map with one class in a stripe of 8 rows, and class 2 in one corner of it."""
    found = np.zeros((8, 8), np.uint8)
    found[:, column : column + width] = value
    found[0, column] = 2
    return found


FOUND = [stripe(0), stripe(3), stripe(6)]
MASKS = [np.array([0, 10, 21], np.uint8)[one] for one in FOUND]  # as they are stored
IMAGES = [one[None].astype(np.float32) for one in FOUND]


def rows_of(samples, asked, real=IMAGES, rebuilt=IMAGES, masks=MASKS, subjects="abc"):
    return mask_dice(Reader(), masks, real, rebuilt, samples, asked, subjects)["labels"]


def test_obedient_samples_reach_the_ceiling_and_chance_does_not():
    subjects = [0, 1, 2, 0]
    narrower = [one.copy() for one in IMAGES]
    for one, column in zip(narrower, (0, 3, 6), strict=True):
        one[0, :, column + 1] = 0  # half of the stripe, 8 of 15 voxels of class 1, is not found any more
    rows = rows_of([IMAGES[k] for k in subjects], subjects, rebuilt=narrower)["left"]
    assert rows[OF_SAMPLES] == {"mean": 1.0, "std": 0.0, "interval": [1.0, 1.0], "n": 4}
    assert rows[OF_HELD_OUT]["mean"] == 1
    assert rows[OF_HELD_OUT]["n"] == 3
    assert rows[REBUILT]["mean"] == pytest.approx(2 * 7 / (7 + 15))
    assert rows[CHANCE]["mean"] == 0
    assert rows[CHANCE]["n"] == 4


def test_samples_that_are_all_the_same_do_no_better_than_chance():
    subjects = [0, 1, 2]
    rows = rows_of([IMAGES[0]] * 3, subjects)
    for label in ("left", "right"):
        assert rows[label][OF_SAMPLES]["mean"] == pytest.approx(1 / 3)  # subject 0 is one of three
        assert rows[label][CHANCE]["mean"] == pytest.approx(1 / 3)


def test_a_label_that_is_missing_scores_0_and_one_that_nobody_has_is_not_counted():
    without = IMAGES[1].copy()
    without[without == 2] = 0
    nothing = [np.zeros((1, 8, 8), np.float32)] * 2
    rows = rows_of([without, IMAGES[2]], [1, 2])["right"]
    assert (rows[OF_SAMPLES]["mean"], rows[OF_SAMPLES]["n"]) == (0.5, 2)
    empty = [np.zeros((8, 8), np.uint8)] * 2
    result = mask_dice(Reader(), empty, nothing, nothing, nothing, [0, 1], "ab")
    assert result["labels"]["left"][OF_SAMPLES] == {"mean": None, "std": None, "interval": None, "n": 0}
    assert masks_in_words(result["labels"]) == []
    json.dumps(result)


def test_the_other_sample_is_of_another_subject():
    assert other_subjects([0, 1, 2, 0, 1]) == [2, 3, 4, 1, 2]
    assert other_subjects([0, 0]) == []
    subjects = [k % 5 for k in range(11)]
    assert all(subjects[i] != subjects[j] for i, j in enumerate(other_subjects(subjects)))
    assert CHANCE not in rows_of(IMAGES[:1] * 2, [0, 0])["left"]


def test_two_scans_of_a_subject_are_not_two_subjects():
    masks, images = [MASKS[0], MASKS[0], MASKS[2]], [IMAGES[0], IMAGES[0], IMAGES[2]]
    rows = rows_of(images, [0, 1, 2], images, images, masks, "aab")["left"]
    assert rows[CHANCE]["mean"] == 0  # never the other scan of the same subject
    assert rows[OF_HELD_OUT]["interval"] == [1, 1]
    for row in rows_of(images, [0, 1, 2], images, images, masks, "aaa")["left"].values():
        assert row["interval"] is None
        assert row["n"] == 3


def test_the_interval_is_one_over_subjects():
    values, subjects = np.array([0.2, 0.8, np.nan]), [3, 5, 7]
    once, repeated = summary(values, subjects), summary(np.repeat(values, 50), np.repeat(subjects, 50))
    assert (once["mean"], once["std"], once["n"]) == (0.5, pytest.approx(0.3), 2)
    for one in (once, repeated):  # 50 samples a subject are no more subjects
        assert one["interval"] == pytest.approx([0.2, 0.8])
    assert repeated["n"] == 100
    assert summary(np.array([0.2, 0.4]), [1, 1])["interval"] is None
    many = summary(np.random.default_rng(0).normal(0.5, 0.1, 400), range(400))
    assert np.ptp(many["interval"]) == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


@pytest.fixture
def segmenter(tmp_path):
    network = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "num_res_units": 1}
    made = Segmenter(build_segmenter(network), network, CLASSES, RECIPE, facts={"split_sha256": "0"})
    made.save(tmp_path / "model.safetensors")
    return {"kind": "segmenter", "path": str(tmp_path / "model.safetensors")}


def test_why_there_is_no_dice(segmenter):
    assert mask_segmenter(segmenter, CLASSES, RECIPE)[0].labels == CLASSES
    several = [{"kind": "ventricles"}, segmenter]
    assert mask_segmenter(several, CLASSES, RECIPE)[0].labels == CLASSES
    turned = LabelClasses.from_config({"right": [20, 21], "left": 10})
    assert mask_segmenter(segmenter, turned, RECIPE)[0].labels == CLASSES  # the order does not matter
    other = LabelClasses.from_config({"left": 10, "right": 20})
    larger = Preprocessing(2, None, None, (8, 8), intensity=IntensityRecipe(), channels=("T2",))
    for config, classes, recipe, message in (
        (None, CLASSES, RECIPE, "data.instrument is not set; only a segmenter"),
        ({"kind": "ventricles"}, CLASSES, RECIPE, "data.instrument.kind is ventricles"),
        ({**segmenter, "path": "none.safetensors"}, CLASSES, RECIPE, "no segmenter none.safetensors yet"),
        (segmenter, other, RECIPE, r"finds left \(10\), right \(20 21\), but the model's mask has .*right \(20\)"),
        (segmenter, CLASSES, larger, r"channels \['image'\], the model's have \['T2'\]"),
    ):
        with pytest.raises(LdmError, match=message):
            mask_segmenter(config, classes, recipe)


def test_evaluate_reads_the_maps_and_says_what_it_left_out(segmenter, tmp_path, caplog):
    write(tmp_path / "map.png", MASKS[0])
    model = SimpleNamespace(
        network=SimpleNamespace(conditioners={"mask": SimpleNamespace(classes=CLASSES)}), preprocessing=RECIPE
    )
    records = [Record(name, name, {}, str(tmp_path / "map.png"), {}, "test") for name in "ab"]
    config = OmegaConf.create({"data": {"instrument": segmenter}, "n": 2, "seed": 0})
    shown = ImageSet(IMAGES[:2], [{}, {}], ["a", "b"])
    images = SimpleNamespace(real=shown, rebuilt=IMAGES[:2], once=shown, records=records)
    cohort = SimpleNamespace(split_hash="0")
    setup = SimpleNamespace(config=config, model=model, datamodule=SimpleNamespace(cohort=cohort))
    with caplog.at_level("INFO", "ldm"):
        found = mask_agreement(setup, images)
    assert [found["labels"]["left"][row]["n"] for row in (OF_SAMPLES, OF_HELD_OUT, REBUILT, CHANCE)] == [2] * 4
    assert "Dice of left: samples" in caplog.text
    page = template("masks.html").render(masks=found)
    assert page.count("<td>left</td>") == 4
    assert f"{found['labels']['left'][OF_SAMPLES]['mean']:.3f}" in page
    assert "another split" not in page
    del found["trained_on_split"]  # as an older evaluation has it
    assert template("masks.html").render(masks=found) == page
    cohort.split_hash = "1"
    assert "another split" in template("masks.html").render(masks=mask_agreement(setup, images))
    alone = replace(shown, subjects=["a", "a"])
    images.real = images.once = alone
    assert CHANCE not in mask_agreement(setup, images)["labels"]["left"]
    config.data.instrument = None
    found = mask_agreement(setup, images)
    assert "data.instrument is not set" in caplog.text
    assert "No Dice: data.instrument is not set" in template("masks.html").render(masks=found)
    records[1] = replace(records[1], labels=None)
    assert "data.labels" in mask_agreement(setup, images)["left_out"]
