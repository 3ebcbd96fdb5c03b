"""Files appear whole or not at all, and a folder of results belongs to one request."""

import json

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.files import write_json, write_npz, write_text
from ldm.model.provenance import PROVENANCE, settle_request


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "new" / "a.txt", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_what_is_written_comes_back_and_nothing_else_stays(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "é"]})
    write_npz(tmp_path / "a.npz", {"x": np.arange(3)})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": [1, "é"]}
    assert np.load(tmp_path / "a.npz", allow_pickle=False)["x"].tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.npz"}


def test_a_folder_goes_on_with_its_own_request_alone(tmp_path):
    settle_request(tmp_path, {"seed": 0, "steps": 20})
    settle_request(tmp_path, {"steps": 20, "seed": 0}, remarks={"extrapolated": ["age"]})
    settle_request(tmp_path, {"steps": 20, "seed": 0})
    with pytest.raises(LdmError, match=r"another request \(seed differ\)"):
        settle_request(tmp_path, {"seed": 1, "steps": 20})


def test_a_request_without_results_binds_nobody(tmp_path):
    settle_request(tmp_path, {"seed": 0}, "sub-*")
    settle_request(tmp_path, {"seed": 1}, "sub-*")
    assert json.loads((tmp_path / PROVENANCE).read_text())["seed"] == 1
    (tmp_path / "sub-0001.nii.gz").touch()
    with pytest.raises(LdmError, match="another request"):
        settle_request(tmp_path, {"seed": 2}, "sub-*")
