"""Volumes that a model of 2-D images looks at slice by slice: they come back as volumes, with a score each."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ldm.applications.slicing import cut_slices
from ldm.data.geometry import Geometry
from ldm.data.images import read, write
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate
from ldm.errors import LdmError
from tests.model.test_transfer import model

CHANNELS, RANGE = ("T1", "FLAIR"), range(1, 4)
SLICES = "slices={plane: axial, range: [1, 4]}"
PARTS = ("anomaly", "lesion", *(f"healthy_{channel}" for channel in CHANNELS))


@pytest.fixture
def request_(tmp_path):
    """``ldm detect`` with a model of random weights, which changes images visibly and the same way each time."""
    made = model([Covariate("diseased", "categorical", levels=("0", "1"))], "adaptive_norm", channels=2)
    window, grid = IntensityRecipe("window", 0, 255), Geometry.plan((8, 8))
    made.preprocessing = Preprocessing(2, None, None, (8, 8), (2, 2), window, CHANNELS, grid)
    made.save(tmp_path / "model.safetensors")
    return "detect", "model=model.safetensors", "guide=free", "scale=3", "level=500", "steps=4", "compare=false"


@pytest.fixture
def scans(tmp_path):
    """``a`` is oblique and stored from other corners, T1 unlike FLAIR; ``b`` is smaller than the model's grid."""
    angle, rng = 0.3, np.random.default_rng(0)
    oblique = np.eye(4)
    oblique[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = oblique @ np.diag([1.0, 1.5, 2.0, 1.0])
    oblique[:3, 3] = 5, -3, 2
    stored = {"a": {"T1": "PSL", "FLAIR": "LAI"}, "b": {"T1": "RAS", "FLAIR": "RAS"}}
    (tmp_path / "scans").mkdir()
    for name, shape in (("a", (8, 8, 5)), ("b", (6, 7, 4))):
        for channel, axes in stored[name].items():
            scan = nib.Nifti1Image(rng.integers(10, 250, shape).astype(np.int16), oblique)
            scan = scan.as_reoriented(nib.orientations.axcodes2ornt(axes))
            nib.save(scan, tmp_path / f"scans/{name}_{channel}.nii.gz")
    return tmp_path / "scans"


def test_volumes_come_back_slice_for_slice_in_their_own_space(ldm, tmp_path, request_, scans):
    code, text = ldm(*request_, "images=scans", SLICES, "threshold=0.3", "out=out")
    assert not code, text
    for name in "ab":  # the same slices, as images of their own
        for channel in CHANNELS:
            for index in RANGE:
                one = read(scans / f"{name}_{channel}.nii.gz::axial[{index}]").array
                write(tmp_path / f"single/{name}_axial{index:03}_{channel}.npy", one)
    code, text = ldm(*request_, "images=single", "threshold=0.3", "out=alone")
    assert not code, text

    alone = pd.read_csv(tmp_path / "alone/scores.tsv", sep="\t").set_index("participant_id")
    table = pd.read_csv(tmp_path / "out/stacked/scores.tsv", sep="\t").set_index("participant_id", drop=False)
    assert set(json.loads((tmp_path / "out/stacked/scores.json").read_text())) == set(table.columns)
    for name in "ab":
        slices = {part: _slices(tmp_path, name, part) for part in PARTS}
        for part in PARTS:
            channel = part.removeprefix("healthy_") if part.startswith("healthy") else "T1"
            volume, scan = nib.load(tmp_path / f"out/stacked/{name}_{part}.nii.gz"), scans / f"{name}_{channel}.nii.gz"
            assert volume.shape == nib.load(scan).shape
            np.testing.assert_allclose(volume.affine, nib.load(scan).affine, atol=1e-5)
            for index in set(slices[part]) - set(RANGE):  # not looked at
                kept = read(f"{scan}::axial[{index}]").array[0] if part.startswith("healthy") else 0
                np.testing.assert_array_equal(slices[part][index], kept)
        for index in RANGE:
            one = tmp_path / f"alone/{name}_axial{index:03}"
            np.testing.assert_allclose(slices["anomaly"][index], np.load(f"{one}_anomaly.npy"), atol=1e-5)
            np.testing.assert_array_equal(slices["lesion"][index], read(f"{one}_lesion.png").array[0])
            for channel in CHANNELS:  # pictures are whole numbers from 0 to 255
                picture = read(f"{one}_healthy_{channel}.png").array[0]
                np.testing.assert_allclose(slices[f"healthy_{channel}"][index].clip(0, 255), picture, atol=0.51)
        assert 0 < np.mean([slices["lesion"][index] for index in RANGE]) < 1

        of_slices = alone.loc[[f"{name}_axial{index:03}" for index in RANGE]]
        row = table.loc[name]
        assert row["highest_slice"] == RANGE[of_slices["score"].argmax()]
        assert row["highest_score"] == pytest.approx(of_slices["score"].max(), rel=1e-4)
        assert row["lesion_voxels"] == of_slices["lesion_voxels"].sum()
        assert row["slices"] == len(RANGE)
    maps = np.stack([np.load(tmp_path / f"alone/a_axial{index:03}_anomaly.npy") for index in RANGE])  # as large as
    assert table.loc["a", "score"] == pytest.approx(np.percentile(maps, 99), rel=1e-4)  # the model's grid


def _slices(folder, name, part):
    path = folder / f"out/stacked/{name}_{part}.nii.gz"
    return {index: read(f"{path}::axial[{index}]").array[0] for index in range(5 if name == "a" else 4)}


def test_the_same_command_goes_on_and_maps_may_change(ldm, tmp_path, request_, scans):
    (tmp_path / "table.tsv").write_text("participant_id\tsubject\tdiseased\na\tp1\t1\nb\tp2\t0\n")
    request = (*request_, "images=scans", "table=table.tsv", "out=scans/out")  # below the images
    code, text = ldm(*request, SLICES, "threshold=0.3")
    assert not code, text
    stored = tmp_path / "scans/out/model_space/a_axial002.npz"
    time = stored.stat().st_mtime_ns
    (tmp_path / "scans/out/model_space/b_axial003.npz").unlink()  # as if it had been interrupted
    code, text = ldm(*request, SLICES, "score=mean")
    assert not code, text
    assert stored.stat().st_mtime_ns == time
    assert (tmp_path / "scans/out/model_space/b_axial003.npz").is_file()
    stacked = tmp_path / "scans/out/stacked"
    assert sorted(path.name for path in stacked.iterdir()) == sorted(
        ["scores.json", "scores.tsv", *(f"{name}_{part}.nii.gz" for name in "ab" for part in PARTS if part != "lesion")]
    )
    of_slices = pd.read_csv(tmp_path / "scans/out/scores.tsv", sep="\t").groupby("subject")["score"].mean()
    table = pd.read_csv(stacked / "scores.tsv", sep="\t").set_index("subject")
    np.testing.assert_allclose(table["score"], of_slices[table.index], rtol=1e-4)
    assert table["diseased"].to_dict() == {"p1": 1, "p2": 0}
    assert not (tmp_path / "scans/out/metrics.json").exists()
    code, text = ldm(*request, "slices={plane: axial, range: [0, 3]}")
    assert code
    assert "results of another request (images differ)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "is a volume, as 4 of 4 files there are, and this model is of 2-D images. Set slices={plane: axial, range",
        ),
        (("slices={plane: axil}",), "slices.plane is 'axil'. Did you mean 'axial'?"),
        (("slices={range: [1, 5]}",), "slices.range is [1, 5], but scans/b_T1.nii.gz has 4 axial slices"),
        ((SLICES, "images=null"), "slices goes with images=FOLDER (of the cohort: data.slices)"),
        ((SLICES, "evaluate=true"), "evaluate=true does not go with slices"),
        ((SLICES, "tune=true", "level=null", "scale=null"), "tune=true does not go with slices"),
        ((SLICES, "masks=scans"), "masks has no meaning with slices"),
    ],
)
def test_illegal_slices(ldm, tmp_path, request_, scans, arguments, message):
    code, text = ldm(*request_, "images=scans", "out=refused", *arguments)
    assert code
    assert message in text
    assert not (tmp_path / "refused/model_space").exists()


def test_a_model_of_volumes_has_no_slices():
    with pytest.raises(LdmError, match="slices is for models of 2-D images, and this one is of volumes; leave it out"):
        cut_slices([], {"plane": "axial"}, 3)
