"""Which files of a folder are images and masks."""

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from ldm.applications.cases import folder_records
from ldm.data import images
from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError

RECIPE = Preprocessing(2, None, None, (8, 8), (1, 1), channels=("T1",), reference=Geometry.plan((8, 8)))
(TARGET,) = CovariateSchema.from_config({"ill": {"kind": "categorical", "levels": ["no", "yes"]}})


@pytest.mark.parametrize(("folder", "out"), [("scans", "scans/found"), ("scans", "results"), ("all/scans", "all")])
def test_results_below_the_images_are_no_images(tmp_path, monkeypatch, folder, out):
    monkeypatch.chdir(tmp_path)
    scans, results = tmp_path / folder, tmp_path / out
    for path in (scans / "a.png", scans / "b/b.png", results / "earlier" / "a_map.png", results / "a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    records = folder_records(scans, RECIPE, TARGET, "no", scans, out=results.relative_to(tmp_path))
    assert [record.id for record in records] == ["a", "b"]
    assert [record.labels for record in records] == [str(scans / "a.png"), str(scans / "b/b.png")]


def test_volumes_are_no_images_of_a_2d_model(tmp_path):
    """Unless slices of them are asked for."""
    array = np.random.default_rng(0).integers(1, 99, (8, 8, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(array[..., :1], np.eye(4)), tmp_path / "b.nii.gz")
    message = r"a.nii.gz is a volume, as 1 of 2 files there are, .* Set slices=\{plane: axial, range: \[80, 128\]\}"
    with pytest.raises(LdmError, match=message):
        folder_records(tmp_path, RECIPE, TARGET, "no")
    assert [record.id for record in folder_records(tmp_path, RECIPE, TARGET, "no", volumes=True)] == ["a", "b"]
    images.write(tmp_path / "a_axial002.npy", images.read(f"{tmp_path}/a.nii.gz::axial[2]").array)
    (tmp_path / "a.nii.gz").unlink()
    records = folder_records(tmp_path, RECIPE, TARGET, "no")
    assert [RECIPE.load(record)[0].shape for record in records] == [(1, 8, 8)] * 2
