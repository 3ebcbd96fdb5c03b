"""Which files of a folder are images and masks."""

import numpy as np
import PIL.Image
import pytest

from ldm.applications.cases import folder_records
from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema

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
