"""2-D slices out of volumes, channels of array rows, pictures at another size, and subjects carved out of a split."""

import itertools
import shutil

import nibabel as nib
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ldm.applications.slicing import named_stacks
from ldm.commands.main import conf_dir
from ldm.data import images
from ldm.data.checks import check_cohort
from ldm.data.cohort import Cohort
from ldm.data.draft import Record, carved, split_subjects
from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.stacks import Cut, put_back
from ldm.errors import LdmError

SEQUENCES = {"T1": "t1", "T1ce": "t1ce", "T2": "t2", "FLAIR": "flair"}


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Six folders as of BraTS 2021, stored LPS; a voxel of the label map tells its axial slice."""
    root, rng = tmp_path_factory.mktemp("brats"), np.random.default_rng(0)
    for number in range(6):
        folder = root / f"BraTS2021_{number:05}"
        folder.mkdir()
        for suffix in SEQUENCES.values():
            volume = rng.integers(1, 900, (12, 10, 8)).astype(np.int16)
            nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -1, 1, 1])), folder / f"{folder.name}_{suffix}.nii.gz")
        labels = np.broadcast_to(np.arange(8, dtype=np.uint8) % 5, (12, 10, 8)).copy()
        labels[labels == 3] = 0
        nib.save(nib.Nifti1Image(labels, np.diag([-1.0, -1, 1, 1])), folder / f"{folder.name}_seg.nii.gz")
    return root


def config(root, *overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("check", ["data=brats", f"data.root={root}", *overrides]).data


SLICES = ("data.spatial_dims=2", "data.slices={range: [2, 6]}")


@pytest.mark.parametrize("slices", [(), SLICES])
def test_a_moved_channel_and_an_unknown_label_are_found_in_slices_too(patients, tmp_path, slices):
    """Slices of one size do not tell that their volumes lie elsewhere; 3 is what later sets call the enhancing part."""
    shutil.copytree(patients, tmp_path / "brats", ignore=shutil.ignore_patterns(".ldm-cache"))
    moved, mask = (tmp_path / f"brats/BraTS2021_00001/BraTS2021_00001_{name}.nii.gz" for name in ("flair", "seg"))
    affine = np.diag([-1.0, -1, 1, 1])
    affine[1, 3] = 5
    nib.save(nib.Nifti1Image(np.asarray(nib.load(moved).dataobj), affine), moved)
    labels = np.asarray(nib.load(mask).dataobj)
    nib.save(nib.Nifti1Image(np.where(labels == 4, 3, labels), np.diag([-1.0, -1, 1, 1])), mask)
    for _ in range(2):  # read, and from the cache
        report = check_cohort(config(tmp_path / "brats", *slices), progress=False)
        found = {fault.kind for fault in report.faults}
        assert found == {"channels-affine", "labels-unknown"}, report.render()
    assert "label value(s) 3; data.label_names names 0 background, [1, 2, 4] tumour" in report.render()
    names = "data.label_names={tumour: [1, 2, 3, 4]}"
    report = check_cohort(config(tmp_path / "brats", *slices, names), progress=False)
    assert {fault.kind for fault in report.faults} == {"channels-affine"}
    ref = f"{moved}::axial[4]"
    recipe = Preprocessing.from_config({**config(patients, *SLICES)}, 2)
    other = f"{str(moved).replace('flair', 't1')}::axial[4]"
    recipe = recipe.fit([Record("a", "a", {"T1": other}, None, {}, "train", "a")])
    with pytest.raises(LdmError, match="'T1' and 'FLAIR' do not lie on one grid .the affines differ by up to 5 voxels"):
        recipe.read_channels({"T1": other, "FLAIR": ref})


def test_volumes_become_slices_of_one_patient(patients):
    report = check_cohort(config(patients, *SLICES), progress=False)
    assert not report.faults, report.render()
    cohort = report.cohort
    assert len(cohort.records) == 24
    assert cohort.channels == tuple(SEQUENCES)
    assert all(
        len({r.split for r in cohort.records if r.subject == who}) == 1 for who in {r.subject for r in cohort.records}
    )
    record = next(one for one in cohort.records if one.id == "BraTS2021_00002_axial004")
    assert record.subject == "BraTS2021_00002"
    stored = nib.load(patients / "BraTS2021_00002/BraTS2021_00002_flair.nii.gz").get_fdata()[::-1, ::-1, 4]  # RAS
    read = images.read(record.images["FLAIR"], spatial_dims=2).array
    np.testing.assert_array_equal(read[0], np.rot90(stored))
    recipe = Preprocessing.from_config({**config(patients, *SLICES)}, 2).fit(cohort.records)
    assert recipe.load(record)[0].shape == (4, 10, 12)
    assert set(np.unique(recipe.load_labels(record))) == {4}


def test_what_is_missing_is_named(patients):
    with pytest.raises(LdmError, match=r"there is no such slice; axial runs from 0 to 7"):
        images.read(f"{patients}/BraTS2021_00000/BraTS2021_00000_t1.nii.gz::axial[008]")
    report = check_cohort(config(patients, "data.spatial_dims=2", "data.slices={range: [7, 9]}"), progress=False)
    assert {fault.record for fault in report.faults} == {f"BraTS2021_{n:05}_axial008" for n in range(6)}
    with pytest.raises(LdmError, match=r"set data.spatial_dims=2"):
        Cohort.from_config(config(patients, "data.slices={range: [2, 6]}"))
    with pytest.raises(LdmError, match=r"data.slices.plane is 'axail'. Did you mean 'axial'"):
        Cohort.from_config(config(patients, "data.spatial_dims=2", "data.slices={plane: axail, range: [2, 6]}"))
    with pytest.raises(LdmError, match=r"data.slices.range is \[6, 2\]"):
        Cohort.from_config(config(patients, "data.spatial_dims=2", "data.slices={range: [6, 2]}"))


def test_the_published_numbers_of_patients():
    names = [f"BraTS20_Training_{number:03}" for number in range(1, 370)]
    splits = list(split_subjects(names, 0, config("x").split.fractions).values())
    assert (splits.count("train"), splits.count("valid"), splits.count("test")) == (332, 37, 0)


def test_a_channel_of_a_row(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (3, 2, 6, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=array)
    read = images.read(f"{tmp_path}/a.npz::images[2,1]", spatial_dims=2).array
    np.testing.assert_array_equal(read, array[2, 1][None])
    for selector in ("images[3,0]", "images[2,2]"):
        with pytest.raises(LdmError, match=r"there is no row"):
            images.read(f"{tmp_path}/a.npz::{selector}", spatial_dims=2)


def test_pictures_at_half_size_and_back():
    way = Geometry.plan((8, 12), spacing=2)
    assert way.shape == (4, 6)
    image = np.kron(np.random.default_rng(0).random((1, 4, 6)), np.ones((1, 2, 2))).astype(np.float32)
    labels = np.kron(np.arange(24).reshape(1, 4, 6), np.ones((1, 2, 2))).astype(np.uint8)
    assert way.forward(image).mean() == pytest.approx(image.mean(), abs=0.03)
    np.testing.assert_array_equal(way.forward(labels, labels=True)[0], np.arange(24).reshape(4, 6))
    np.testing.assert_array_equal(way.undo(way.forward(labels, labels=True), labels=True), labels)
    assert Geometry.from_dict(way.to_dict()) == way
    data = {"spatial_dims": 2, "pixel_size": 0, "intensity": {}}
    with pytest.raises(LdmError, match=r"data.pixel_size: 0"):
        Preprocessing.from_config(data)


def test_validation_subjects_come_out_of_training():
    table = {f"p{n}": "train" if n < 20 else "valid" for n in range(25)}
    splits = carved(table, {"carve_out": 0.2, "seed": 0})
    assert {who for who, split in splits.items() if split == "test"} == {f"p{n}" for n in range(20, 25)}
    assert sum(split == "valid" for split in splits.values()) == 4
    assert carved(table, {"carve_out": None, "seed": 0}) == table
    assert carved(table, {"carve_out": 0.2, "seed": 1}) != splits


@pytest.mark.parametrize("plane", ["sagittal", "coronal", "axial"])
def test_slices_go_back_where_they_were_cut_out_whatever_the_orientation(tmp_path, plane):
    volume, path = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16), tmp_path / "v.nii.gz"
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = (np.diag(signs) * (1.0, 1.5, 2.0))[list(order)]
        affine[:3, 3] = 5, -3, 2
        nib.save(nib.Nifti1Image(volume, affine), path)
        count = images.read(path).facts["axcodes"].translate(str.maketrans("RAS", "LPI"))
        count = volume.shape[count.index({"sagittal": "L", "coronal": "P", "axial": "I"}[plane])]
        cut = {index: images.read(f"{path}::{plane}[{index}]").array for index in range(count)}
        back = put_back(path, plane, cut)
        np.testing.assert_array_equal(np.asarray(back.dataobj), volume)
        np.testing.assert_allclose(back.affine, affine)
        del cut[1]
        gap = put_back(path, plane, cut, fill=-1)
        assert (np.asarray(gap.dataobj) == -1).sum() == volume.size / count


def test_only_a_slice_of_a_nifti_file_was_cut_out():
    assert Cut.of("a/T1.nii.gz::axial[40]").index == 40
    assert [Cut.of(ref) for ref in ("T1.nii.gz", "a.png", "a.npz::images[3]", "T1.nii.gz::oblique[3]")] == [None] * 4


def test_a_stack_has_the_name_of_its_volume_and_shares_it_with_no_other():
    def record(name, ref, subject="s"):
        return Record(name, subject, {"T1": ref}, None, {}, "test")

    records = [
        record("a_axial003", "x/a.nii.gz::axial[3]"),
        record("a_axial004", "x/a.nii.gz::axial[4]"),
        record("a_coronal004", "x/a.nii.gz::coronal[4]"),  # another plane: another stack
        record("mine", "y/a.nii.gz::axial[3]"),
        record("s_volume2_axial003", "z/b.nii.gz::axial[3]"),
        record("yours", "w/a.nii.gz::axial[3]"),
        record("picture", "a.png"),
    ]
    stacks = named_stacks(records)
    assert {name: (str(cut.path), cut.plane, list(stack)) for name, (cut, stack) in stacks.items()} == {
        "a": ("x/a.nii.gz", "axial", [3, 4]),
        "a_volume2": ("x/a.nii.gz", "coronal", [4]),
        "s": ("y/a.nii.gz", "axial", [3]),
        "s_volume2": ("z/b.nii.gz", "axial", [3]),
        "s_volume3": ("w/a.nii.gz", "axial", [3]),
    }
