"""What a folder of results is bound to, and what is written into it, with networks that say what they are given."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ldm.applications.segmentation import read_result, segment
from ldm.applications.segmentation_evaluation import evaluate
from ldm.applications.segmentation_report import differences, null_for_nan, report, verdict
from ldm.applications.segmentation_sources import NetworkSource
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.segmenter import Segmenter


class Bright(nn.Module):
    """The class is where the first channel is bright."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, :1]), 9 * x[:, :1]], 1)  # (B, 2, *S)


def bright(channels=("T1", "FLAIR"), shape=(16, 16)):
    recipe = Preprocessing(2, None, None, shape, (1, 1), channels=channels, reference=Geometry.plan(shape))
    classes = LabelClasses.from_config({"bright": 1})
    return NetworkSource([Segmenter(Bright(), {}, classes, recipe, facts={"split_sha256": "s"})], ["a"])


def of(name, images, labels=None):
    return Record(name, name, images, labels, {}, "test")


@pytest.fixture
def files(tmp_path):
    """Three arrays, and a volume stored LPS of 20 x 16 x 8 voxels of 1 x 2 x 4 mm."""
    rng = np.random.default_rng(0)
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", rng.random((16, 16)).astype(np.float32))
    volume = rng.random((20, 16, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -2, 4, 1])), tmp_path / "vol.nii.gz")
    return {name: str(tmp_path / f"{name}.npy") for name in "abc"} | {"volume": str(tmp_path / "vol.nii.gz")}


def test_results_of_another_image_are_not_taken_for_these(tmp_path, files):
    """Channels, subjects or slices that change places: the same names and the same files."""
    a, b, c, volume = files.values()
    first, second = {"T1": a, "FLAIR": b}, {"T1": b, "FLAIR": c}
    cuts = [{"T1": f"{volume}::axial[{k}]", "FLAIR": f"{volume}::axial[{k}]"} for k in (3, 4)]
    swapped = (
        ([of("s", first)], [of("s", {"T1": b, "FLAIR": a})]),
        ([of("s", first), of("t", second)], [of("s", second), of("t", first)]),
        ([of("s", cuts[0])], [of("s", cuts[1])]),
    )
    for number, (asked, other) in enumerate(swapped):
        out = tmp_path / str(number)
        source = bright(shape=(16, 20) if number == 2 else (16, 16))
        segment(source, asked, out, {"files_sha256": "the same"})
        segment(source, asked, out, {"files_sha256": "the same"})
        with pytest.raises(LdmError, match=r"another request \(images differ\)"):
            segment(source, other, out, {"files_sha256": "the same"})


@pytest.mark.parametrize(
    ("slice_", "shape", "spacing"),
    [("axial[3]", (16, 20), (2, 1, 4)), ("coronal[3]", (8, 20), (4, 1, 2)), ("sagittal[3]", (8, 16), (4, 2, 1))],
)
def test_slices_of_volumes_are_measured_in_mm(tmp_path, files, slice_, shape, spacing):
    source, record = bright(("T1",), shape), of("s", {"T1": f"{files['volume']}::{slice_}"})
    table = pd.read_csv(segment(source, [record], tmp_path / "out", {}), sep="\t", keep_default_na=False)
    found = read_result(tmp_path / "out", record, source)
    assert found.labels.shape == shape
    assert found.spacing == spacing
    (row,) = table.to_dict("records")
    assert (row["volume"], row["unit"]) == (found.labels.sum() * 8, "mm3")
    assert (row["low"], row["high"]) == ("n/a", "n/a")  # of a single network


def test_pictures_are_measured_in_pixels(tmp_path, files):
    source, record = bright(("T1",)), of("s", {"T1": files["a"]})
    segment(source, [record], tmp_path / "out", {})
    assert read_result(tmp_path / "out", record, source).spacing is None


def test_the_truth_of_some_has_a_column_for_all(tmp_path, files, monkeypatch):
    """And the table does not wait for the picture."""
    np.save(tmp_path / "truth.npy", np.eye(16, dtype=np.uint8))
    truth = str(tmp_path / "truth.npy")
    for number, labels in enumerate(((None, truth), (truth, None), (None, None))):
        records = [of(name, {"T1": files[name]}, one) for name, one in zip("ab", labels, strict=True)]
        assert len(pd.read_csv(segment(bright(("T1",)), records, tmp_path / str(number), {}), sep="\t")) == 2
        assert (tmp_path / str(number) / "panel.png").is_file()
    monkeypatch.setattr("ldm.applications.segmentation.write_panel", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segment(bright(("T1",)), records, tmp_path / "cut", {})
    assert (tmp_path / "cut/volumes.tsv").is_file()


def test_a_page_of_one_patient_says_where_there_is_no_interval(tmp_path, files):
    np.save(tmp_path / "truth.npy", np.eye(16, dtype=np.uint8))
    source, out = bright(("T1",)), tmp_path / "out"
    records = [of("a", {"T1": files["a"]}, str(tmp_path / "truth.npy"))]
    segment(source, records, out, {})
    metrics = evaluate(source, records, out)
    json.dumps(null_for_nan(metrics), allow_nan=False)
    others = {"other": metrics}
    assert "(95 %: n/a)" in verdict(metrics, others)[0]
    assert differences(metrics, others)["other"]["bright"] == {"value": 0, "interval": None, "n": 1}
    page = report(out, metrics, others).read_text()
    assert "(n/a; 1)" in page
    assert "nan" not in page.partition("<h2>Examples")[0].replace("data:image", "").split("<img")[0]
