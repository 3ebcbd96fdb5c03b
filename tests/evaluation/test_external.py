"""Instruments that were trained elsewhere: exact volumes on any grid, a program's table, and what is refused."""

import csv
import logging
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.evaluation.external import conformed_geometry, segment_conformed
from ldm.evaluation.instruments import find_instrument, instrument_hashes, quick_sections
from ldm.networks.meshnet import load_meshnet
from tests.networks.test_meshnet import layer, write_meshnet

SCHEMA = CovariateSchema(
    [
        Covariate("brain_mm3", "continuous", "mm3"),
        Covariate("brain_ml", "continuous", "ml"),
        Covariate("age", "continuous", "years"),
    ]
)
SHAPE, BOX = (48, 44, 40), (slice(2, 42), slice(5, 41), slice(4, 38))
BOX_MM3 = 40 * 36 * 34 * 8.0


def prepared(orientation="RAS", channels=("T1",), shape=SHAPE, spacing=2.0):
    """The recipe of images of 2 mm whose files are RAS, with a grid of ``orientation``."""
    affine = nib.affines.from_matvec(np.diag([spacing] * 3), (-50, -60, -30))
    reference = Geometry.plan(shape, affine, orientation)
    return Preprocessing(3, orientation, shape=reference.shape, channels=channels, reference=reference)


@pytest.fixture
def threshold(tmp_path):
    """Section of a network of one layer, which calls everything brain that is brighter than a tenth of the range.

    Between voxels 2 mm apart the corners of a box, at 1 mm, have 0.42 of its value. What is outside has 0.25 or less,
    in so many voxels that it is also the lower end of the range.
    """
    arrays = {"0.weight": np.array([0, 1], np.float32).reshape(2, 1, 1, 1, 1), "0.bias": np.float32([0, -0.1])}
    path = write_meshnet(tmp_path / "threshold.npz", [layer(1, 2, kernel=1)], arrays)
    measures = {"brain_mm3": ["brain"], "brain_ml": ["brain"]}
    return {"kind": "meshnet", "path": str(path), "classes": ["outside", "brain"], "measures": measures}


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR"])
def test_a_box_has_its_volume_on_every_grid(threshold, orientation):
    recipe, image = prepared(orientation), np.zeros((1, *SHAPE), np.float32)
    image[0][BOX] = 100.0
    image = recipe.reference.forward(image)
    found = find_instrument(threshold, recipe, SCHEMA)(image)
    assert found == {"brain_mm3": BOX_MM3, "brain_ml": pytest.approx(BOX_MM3 / 1000)}
    assert np.isnan(find_instrument(threshold, recipe, SCHEMA)(np.zeros_like(image))["brain_ml"])


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR"])
def test_conformed_is_left_inferior_anterior_at_1_mm(orientation):
    recipe, image = prepared(orientation), np.zeros((1, *SHAPE), np.float32)
    image[0, 3, 40, 5] = 1.0
    way = conformed_geometry(recipe)
    volume = way.forward(recipe.reference.forward(image))[0]
    assert volume.shape == (96, 80, 88)
    assert "".join(nib.aff2axcodes(way.affine)) == "LIA"
    centre = np.array(np.nonzero(volume == volume.max())).mean(1)  # of the eight voxels that the bright one becomes
    world = nib.affines.apply_affine(np.array(recipe.reference.original_affine), (3, 40, 5))
    np.testing.assert_allclose(nib.affines.apply_affine(way.affine, centre), world)
    np.testing.assert_allclose(centre, (95 - 6.5, 79 - 10.5, 80.5))  # to the left, down and to the front


def test_of_several_channels_it_reads_t1(threshold):
    image = np.zeros((2, *SHAPE), np.float32)
    image[1][BOX] = 1.0
    image[0] = np.random.default_rng(0).random(SHAPE)
    assert find_instrument(threshold, prepared(channels=("FLAIR", "T1")), SCHEMA)(image)["brain_mm3"] == BOX_MM3
    with pytest.raises(LdmError, match="the images have FLAIR, T2; legal: .*called T1"):
        find_instrument(threshold, prepared(channels=("FLAIR", "T2")), SCHEMA)


def test_a_meshnet_that_cannot_measure_is_refused(threshold, caplog):
    recipe = prepared()
    for change, message in (
        ({"measures": {"brain_ml": ["brian"]}}, "has no class 'brian'. Did you mean 'brain'. It has: outside, brain"),
        ({"measures": {"age": ["brain"]}}, "data.covariates.age.unit is 'years'"),
        ({"measures": {"brain_ml": "brain"}}, "measures.brain_ml is 'brain'; it is a list"),
        ({"measures": ["brain_ml"]}, "it is {covariate:"),
        ({"classes": ["brain"]}, "tells 2 classes apart"),
        ({"robust": True}, "data.instrument.robust is not a setting.*Legal: kind, path, measures, classes"),
        ({"path": None}, "data.instrument.path is not set"),
    ):
        with pytest.raises(LdmError, match=message.replace("?", ".").replace("{", r"\{")):
            find_instrument({**threshold, **change}, recipe, SCHEMA)
    pictures = Preprocessing(2, None, shape=(8, 8), channels=("image",), reference=Geometry.plan((8, 8)))
    with pytest.raises(LdmError, match="not pictures"):
        find_instrument(threshold, pictures, SCHEMA)
    with caplog.at_level(logging.WARNING):
        assert find_instrument({**threshold, "path": "nowhere.npz"}, recipe, SCHEMA) is None
    assert "There is no nowhere.npz and no nowhere.json of a meshnet: nothing is measured" in caplog.text


def test_without_names_classes_are_numbers(threshold):
    config = {**threshold, "classes": None, "measures": {"brain_ml": [0, 1]}}
    image = np.random.default_rng(0).random((1, *SHAPE)).astype(np.float32)
    assert find_instrument(config, prepared(), SCHEMA)(image)["brain_ml"] == pytest.approx(np.prod(SHAPE) * 8 / 1000)


def test_the_hash_follows_the_weights(threshold):
    sections = [{"kind": "ventricles"}, threshold, {"kind": "segmenter", "path": "nowhere.safetensors"}]
    before = instrument_hashes(sections)
    assert before == instrument_hashes(threshold)
    path = Path(threshold["path"])
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "0.bias": np.float32([0, -0.5])})
    assert instrument_hashes(threshold) != before
    assert instrument_hashes([{"kind": "ventricles"}, {**threshold, "path": "nowhere.npz"}]) is None
    assert quick_sections(sections) == [sections[0], sections[2]]


# --- SynthSeg ---------------------------------------------------------------------------------------

PROGRAM = """#!{python}
import argparse, sys, time
import nibabel as nib, numpy as np
options = argparse.ArgumentParser()
for name in ("--i", "--o", "--vol", "--threads"):
    options.add_argument(name, required=True)
for name in ("--cpu", "--robust"):
    options.add_argument(name, action="store_true")
options = options.parse_args()
scan = nib.load(options.i)
voxel = abs(np.linalg.det(scan.affine[:3, :3]))
assert scan.header.get_xyzt_units()[0] == "mm" and options.cpu and options.threads == "2"
{then}
with open(options.vol, "w") as file:
    file.write("subject,total intracranial,left cerebral white matter,right cerebral white matter,x mm\\n")
    sums = (np.asarray(scan.dataobj) > 0.5).sum() * voxel, 10.5, 1000.0 * options.robust, scan.affine[0, 3]
    file.write(",".join(["image", *map(str, sums)]) + "\\n")
"""


@pytest.fixture
def synthseg(tmp_path):
    """Makes the section of a program that speaks the command line of mri_synthseg and runs ``then``."""

    def make(then="", **changes):
        path = tmp_path / "mri_synthseg"
        path.write_text(PROGRAM.format(python=sys.executable, then=then))
        path.chmod(0o755)
        measures = {"brain_mm3": ["total intracranial", "left cerebral white matter", "right cerebral white matter"]}
        return {"kind": "synthseg", "path": str(path), "threads": 2, "measures": measures, **changes}

    return make


IMAGE = np.ones((1, 6, 5, 4), np.float32)


def test_the_columns_of_the_table_add_up(synthseg, monkeypatch, tmp_path):
    recipe = prepared("LAS", shape=IMAGE.shape[1:])
    config = synthseg(
        measures={"brain_mm3": ["total intracranial", "left cerebral white matter"], "brain_ml": ["x mm"]}
    )
    found = find_instrument(config, recipe, SCHEMA)(IMAGE)
    assert found == pytest.approx({"brain_mm3": 120 * 8 + 10.5, "brain_ml": recipe.reference.affine[0, 3] / 1000})
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = synthseg(path=None, robust=True)
    assert find_instrument(config, recipe, SCHEMA)(IMAGE) == pytest.approx({"brain_mm3": 120 * 8 + 10.5 + 1000})
    assert instrument_hashes(config) == instrument_hashes(synthseg()) != instrument_hashes(synthseg(then="#"))


@pytest.mark.parametrize(
    ("then", "changes", "message"),
    [
        ("sys.exit('no model\\nfile is there')", {}, "failed with exit code 1: no model file is there"),
        ("time.sleep(60)", {"timeout_s": 0.01}, "took over 0.01 s for an image"),
        ("sys.exit(0)", {}, "wrote no table of volumes"),
        (
            "",
            {"measures": {"brain_ml": ["total intracranal"]}},
            "gives no volume 'total intracranal'. Did you mean 'total",
        ),
    ],
)
def test_a_program_that_fails_is_named(synthseg, then, changes, message):
    instrument = find_instrument(synthseg(then, **changes), prepared(shape=IMAGE.shape[1:]), SCHEMA)
    with pytest.raises(LdmError, match=f"mri_synthseg {message}"):
        instrument(IMAGE)


def test_without_the_program_nothing_is_measured(synthseg, caplog):
    config = synthseg()
    instrument = find_instrument(config, prepared(shape=IMAGE.shape[1:]), SCHEMA)
    Path(config["path"]).unlink()
    with pytest.raises(LdmError, match="mri_synthseg cannot be run"):
        instrument(IMAGE)
    with caplog.at_level(logging.WARNING):
        assert find_instrument(config, prepared(), SCHEMA) is None
    assert "There is no program" in caplog.text
    assert "nothing is measured" in caplog.text


# --- real scans -------------------------------------------------------------------------------------

ROOTS = [Path(os.environ.get(name, "nowhere")) for name in ("LDM_IXI_ROOT", "LDM_MESHNET_ROOT")]


@pytest.mark.slow
@pytest.mark.skipif(not all(root.is_dir() for root in ROOTS), reason="needs LDM_IXI_ROOT and LDM_MESHNET_ROOT")
def test_the_lateral_ventricles_of_a_scan_are_found():
    ixi, weights = ROOTS
    with (ixi / "participants.tsv").open() as file:
        who = next(row["participant_id"] for row in csv.DictReader(file, delimiter="\t") if row["split"] == "valid")
    scan, labels = (nib.load(ixi / name) for name in (f"T1/{who}_T1.nii.gz", f"seg/{who}_dlmuse.nii.gz"))
    way = Geometry.plan(scan.shape, scan.affine, "LIA", 1.0)
    volume = way.forward(np.asarray(scan.dataobj, np.float32)[None])[0]
    truth = np.isin(way.forward(np.asarray(labels.dataobj, np.uint8)[None], labels=True)[0], (51, 52))
    found = segment_conformed(load_meshnet(weights / "model18cls.npz"), volume, 0.0) == 3
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.6
