"""What ``ldm segment`` settles before it segments: the records, the device, what stands beside."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from ldm.applications.slicing import named_stacks
from ldm.commands import target
from ldm.commands.main import conf_dir
from ldm.commands.segment import cohort_records, find_source
from ldm.commands.target import unnamed_values
from ldm.data.checks import check_cohort
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.segmenter import Segmenter, build_segmenter


def composed(*overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("segment", list(overrides))


@pytest.fixture
def peer(tmp_path):
    """A network without dropout, in a file."""
    config = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [8, 16], "num_res_units": 1}
    recipe = Preprocessing(2, None, None, (8, 8), (1, 1), channels=("T1",), reference=Geometry.plan((8, 8)))
    classes = LabelClasses.from_config({"tumour": 1})
    facts = {"split_sha256": "s", "unnamed": [3]}
    Segmenter(build_segmenter(config), config, classes, recipe, facts=facts).save(tmp_path / "peer")
    return tmp_path / "peer"


@pytest.mark.parametrize("beside", ["missing: nowhere", "network: nowhere"])
def test_what_stands_beside_is_looked_for_first(ldm, tmp_path, peer, beside):
    np.save(tmp_path / "a.npy", np.eye(8, dtype=np.uint8))
    given = ("images=a.npy", "labels=a.npy", "evaluate=true", "out=out")
    code, text = ldm("segment", f"model={peer}", *given, f"beside={{{beside}}}")
    assert code
    assert f"beside.{beside.partition(':')[0]}" in text
    assert not (tmp_path / "out/volumes.tsv").exists()


def test_label_values_that_a_network_was_not_told_of_are_refused(ldm, tmp_path, peer):
    """As a diffusion model refuses them; those that were background in training are background."""
    given = (f"model={peer}", "images=a.npy", "evaluate=true", "out=out")
    np.save(tmp_path / "a.npy", 3 * np.eye(8, dtype=np.uint8))
    for value, refused in ((9, True), (3, False)):
        np.save(tmp_path / f"{value}.npy", value * np.eye(8, dtype=np.uint8))
        code, text = ldm("segment", *given, f"labels={value}.npy")
        assert bool(code) == refused, text
        message = "label value(s) 9 are unknown; legal: 0 background, 1 tumour; background too: 3."
        assert (message in text) == refused


def test_values_that_no_class_names_are_told_of(monkeypatch):
    told, labels = [], SimpleNamespace(label_values=lambda: {0, 1, 3})
    monkeypatch.setattr(target.logger, "warning", lambda message, *words: told.append(message % words))
    datamodule = SimpleNamespace(dataset={"all": labels}.__getitem__)
    assert unnamed_values(LabelClasses.from_config({"tumour": 1}), datamodule) == [3]
    assert told == ["data.label_names names tumour; other values of the label maps are background: 3."]


@pytest.mark.parametrize("name", ["../../x", "a/b", ".."])
def test_no_name_leads_out_of_the_folder(ldm, tmp_path, peer, name):
    np.save(tmp_path / "a.npy", np.eye(8, dtype=np.uint8))
    (tmp_path / "table.tsv").write_text(f"participant_id\tfile\n{name}\ta.npy\n")
    before = set(tmp_path.rglob("*"))
    code, text = ldm("segment", f"model={peer}", "images={T1: '{file}'}", "table=table.tsv", "out=out/deep")
    assert code
    assert f"table.tsv: participant_id '{name}' is not safe as a file name; use letters, digits" in text
    assert not [path for path in set(tmp_path.rglob("*")) - before if path.name.endswith((".png", ".npz"))]
    cut = Record("sub-1", name, {"T1": "a.nii.gz::axial[3]"}, None, {}, "test")
    assert list(named_stacks([cut])) == ["sub-1"]  # by the subject, where that is a name of a file


@pytest.fixture
def volume(tmp_path):
    """Stored from head to feet; the lowest of its five slices is empty."""
    array = np.random.default_rng(0).integers(1, 99, (8, 8, 5)).astype(np.int16)
    array[..., 4] = 0
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, -2, 1])), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz"


def test_a_model_of_slices_takes_a_volume(ldm, tmp_path, peer, volume):
    (tmp_path / "table.tsv").write_text("participant_id\nsub-a\n")
    request = ("segment", f"model={peer}", "images={T1: a.nii.gz}", "table=table.tsv")
    code, text = ldm(*request, "slices={plane: axial, range: [2, 4]}", "out=some")
    assert not code, text
    assert sorted(path.name for path in (tmp_path / "some").glob("*_dseg.png")) == [
        "sub-a_axial002_dseg.png",
        "sub-a_axial003_dseg.png",
    ]
    stacked = nib.load(tmp_path / "some/stacked/sub-a_mean.nii.gz")
    np.testing.assert_allclose(stacked.affine, nib.load(volume).affine)
    known = ~np.isnan(np.asarray(stacked.dataobj)).reshape(8, 8, 5).all((0, 1))
    assert known.tolist() == [False, True, True, False, False]  # stored from head to feet
    code, text = ldm(*request, "slices={plane: axial}", "out=all")
    assert not code, text
    assert len(list((tmp_path / "all").glob("*_dseg.png"))) == 4  # all but the empty one
    code, text = ldm(*request, "out=refused")
    assert code
    assert "is a volume, and this model is of 2-D images. Set slices={plane: axial, range: [80, 128]}" in text
    assert "or name a slice, 'a.nii.gz::axial[80]'" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slices={plane: axil}",), "slices.plane is 'axil'. Did you mean 'axial'?"),
        (("slices={range: [3, 3]}",), "slices.range is [3, 3], step 1; legal"),
        (("slices={range: [3, 9]}",), "slices.range is [3, 9], but a.nii.gz has 5 axial slices: legal are 0 to 5"),
        (("images='a.nii.gz::axial[2]'", "slices={range: [1, 3]}"), "has a selector already; leave out slices"),
        (("images=a.npy", "slices={range: [1, 3]}"), "a.npy is no NIfTI volume"),
        (("images=null", "slices={range: [1, 3]}"), "slices goes with images (of the cohort: data.slices)"),
    ],
)
def test_illegal_slices(ldm, peer, volume, arguments, message):
    code, text = ldm("segment", f"model={peer}", "images=a.nii.gz", "out=refused", *arguments)
    assert code
    assert message in text


def test_a_volume_is_no_image_of_a_2d_model(peer, volume):
    """As ``ldm detect`` meets it in a folder."""
    record = Record("a", "a", {"T1": str(volume)}, None, {}, "test")
    with pytest.raises(LdmError, match=r"a.nii.gz: has 3 spatial axes, .* Select a slice with '::axial\[k\]'"):
        Segmenter.load(peer).preprocessing.load(record)


def test_a_network_runs_where_a_diffusion_model_would(peer, monkeypatch):
    asked, load = [], Segmenter.load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Segmenter, "load", lambda path, device="cpu": asked.append(device) or load(path))
    find_source(composed(f"model={peer}"))
    assert asked == ["cuda"]


def test_what_a_network_cannot_be_asked_for(peer):
    for asked, message in (
        ("timestep_spacing=trailing", "timestep_spacing is for diffusion models"),
        ("augment={missing: {T9: T1}, missing_share: 0.5}", "augment.missing: there is no image 'T9'"),
    ):
        with pytest.raises(LdmError, match=message):
            find_source(composed(f"model={peer}", "members=2", asked))


def test_records_of_a_cohort_need_no_grid_and_no_arrays(tiny, tmp_path):
    """The configuration's networks would have to halve 20 three times; the model's need not be these."""
    config = composed(*tiny, "data.shape=[20,28,20]", f"runs_dir={tmp_path}")
    cohort = check_cohort(config.data, progress=False).cohort
    source = SimpleNamespace(split_sha256=cohort.split_hash, channels=tuple(cohort.records[0].images))
    records = cohort_records(config, source)
    assert [record.id for record in records] == [record.id for record in cohort.split("test")]
    assert not list(tmp_path.rglob("*.npy"))
