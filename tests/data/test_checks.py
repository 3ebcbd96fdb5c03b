"""One small cohort with every fault planted: the report names each one, with its kind and its file."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from ldm.data.checks import check_cohort
from ldm.data.images import read
from ldm.data.inspection import _inspect_header, inspect
from ldm.data.intensity import IntensityRecipe
from ldm.errors import LdmError

SHAPE = (10, 11, 12)
COLUMNS = ("participant_id", "subject", "file", "age", "sex", "scanner", "split", "late")
DIM, XYZT_UNITS = 40, 123
"""Offsets in a NIfTI-1 header."""
HUGE = np.array([3, 32767, 32767, 32767, 1, 1, 1, 1], "<i2").tobytes()
CLEAN = [f"clean{i:02}" for i in range(12)]


def _volume(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 100, shape).astype(np.float32)


def _save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def _patch(path: Path, offset: int, patch: bytes) -> None:
    """Overwrite bytes of a file, or of what a gzipped one holds."""
    zipped = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    content = content[:offset] + patch + content[offset + len(patch) :]
    path.write_bytes(gzip.compress(content) if zipped else content)


class Planted:
    """A cohort on disk that grows row by row."""

    def __init__(self, root: Path) -> None:
        self.root, self.rows, self.seed = root, [], 0
        for index, name in enumerate(CLEAN):
            self.add(name, age=str(50 + index), split="valid" if index > 9 else "train")

    def add(self, name: str, array=None, affine=None, labels=None, labels_affine=None, file=None, **cells) -> str:
        """Add a row with its files; return where the report should place a fault of the row."""
        self.seed += 1
        file = name if file is None else file
        defaults = {
            "subject": name,
            "age": "60",
            "sex": "FM"[self.seed % 2],
            "scanner": "A",
            "split": "train",
        }
        self.rows.append({"participant_id": name, "file": file, "late": "train", **defaults, **cells})
        if "/" not in file and file:
            array = _volume(self.seed) if array is None else array
            labels = (array > 50).astype(np.uint8) if labels is None else labels
            _save(self.image(file), array, affine)
            _save(
                self.root / "seg" / f"{file}.nii.gz",
                labels,
                affine if labels_affine is None else labels_affine,
            )
        return f"participants.tsv:{len(self.rows) + 1}"

    def image(self, name: str) -> Path:
        return self.root / "T1" / f"{name}.nii.gz"

    def config(self, **changes) -> dict:
        lines = ["\t".join(COLUMNS), *("\t".join(row[column] for column in COLUMNS) for row in self.rows)]
        (self.root / "participants.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {
            "name": "planted",
            "root": str(self.root),
            "table": "participants.tsv",
            "subject": "subject",
            "image": "T1/{file}.nii.gz",
            "labels": "seg/{file}.nii.gz",
            "covariates": {
                "age": {"kind": "continuous", "unit": "years", "range": [18, 100]},
                "sex": {"kind": "categorical", "levels": ["F", "M"]},
            },
            "missing_covariate": "error",
            "split": {"column": "split"},
            **changes,
        }


def _plant(root: Path) -> tuple[Planted, set[tuple[str, str]]]:
    """Write the cohort; return it with the (kind, where) of every fault in it."""
    cohort = Planted(root)
    expected = set()

    def in_file(kind: str, name: str, folder: str = "T1", **files) -> None:
        cohort.add(name, **files)
        expected.add((kind, f"{folder}/{name}.nii.gz"))

    def in_row(kind: str, name: str, **cells) -> None:
        expected.add((kind, cohort.add(name, **cells)))

    nan = _volume(100)
    nan[0, 0, 0] = np.nan
    flipped = np.diag([-1.0, 1, 1, 1])
    ct = _volume(101) * 10
    ct[:3] = -1024
    in_file("not-finite", "with_nan", array=nan)
    in_file("constant-image", "constant", array=np.full(SHAPE, 7, np.float32))
    plain = np.ones(SHAPE, np.uint8)
    in_file("wrong-dimensions", "series", array=_volume(102, (*SHAPE, 7)), labels=plain)
    in_file("wrong-dimensions", "two_echoes", array=_volume(103, (*SHAPE, 2)), labels=plain)
    in_file("wrong-dimensions", "slice", array=_volume(104, (10, 11, 1)), labels=plain)
    in_file("wrong-dimensions", "two_maps", "seg", labels=np.ones((*SHAPE, 2), np.uint8))
    in_file("spacing", "thick", affine=np.diag([1.0, 1, 3, 1]))
    in_file("intensity", "ct", array=ct)
    in_file("labels-shape", "small_labels", "seg", labels=np.ones((4, 4, 4), np.uint8))
    in_file("labels-affine", "moved_labels", "seg", labels_affine=flipped)
    in_file("labels-values", "soft_labels", "seg", labels=np.full(SHAPE, 0.5, np.float32))

    in_file("unreadable", "truncated")
    content = cohort.image("truncated").read_bytes()
    cohort.image("truncated").write_bytes(content[: len(content) // 2])
    in_file("unreadable", "no_nifti")
    cohort.image("no_nifti").write_bytes(gzip.compress(b"not a scan" * 50))
    in_file("unreadable", "units")
    _patch(cohort.image("units"), XYZT_UNITS, bytes([112]))
    in_file("unreadable", "huge")
    _patch(cohort.image("huge"), DIM, HUGE)
    in_file("missing-file", "absent")
    cohort.image("absent").unlink()
    in_file("sform-qform", "two_forms")
    image = nib.load(cohort.image("two_forms"))
    image.set_qform(flipped, code=1)
    image.set_sform(np.eye(4), code=1)
    nib.save(nib.Nifti1Image(_volume(105), None, image.header), cohort.image("two_forms"))
    in_file("singular-affine", "flat")
    header = nib.load(cohort.image("flat")).header
    header["sform_code"], header["srow_z"] = 1, 0
    nib.save(nib.Nifti1Image(_volume(106), None, header), cohort.image("flat"))
    for name, age in (("copy_a", "61"), ("copy_b", "62")):
        in_file("identical-image", name, array=_volume(107), age=age)

    in_row("duplicate-id", "twice", file="twice_1")
    in_row("duplicate-id", "twice", file="twice_2")
    in_row("unsafe-id", "a b", file="a_b")
    in_row("subject-in-two-splits", "leak_1", subject="leak", split="train")
    in_row("subject-in-two-splits", "leak_2", subject="leak", split="valid")
    in_row("unknown-split", "strange_split", split="holdout")
    in_row("missing-covariate", "no_age", age="n/a")
    in_row("covariate-not-numeric", "word_age", age="63 years")
    in_row("covariate-out-of-range", "old", age="300")
    in_row("covariate-unknown-level", "third_sex", sex="X")
    in_row("missing-value", "no_file", file="")
    in_row("path-escape", "up", file="../../secret")
    in_row("path-escape", "absolute", file="/etc/passwd")
    in_row("path-escape", "folder", file="T1/x")
    return cohort, expected


def test_report_names_every_planted_fault_with_kind_and_place(tmp_path):
    cohort, expected = _plant(tmp_path)
    _save(tmp_path / "T1" / "stray.nii.gz", _volume(1))
    config = cohort.config()
    config["covariates"] |= {"scanner": {"kind": "categorical"}}
    config["split"] = {"column": "split"}
    report = check_cohort(config, progress=False)

    expected.add(("covariate-constant", "data.covariates.scanner"))
    assert {(fault.kind, fault.where) for fault in report.faults} == expected
    assert all(fault.reason and fault.remedy for fault in report.faults)
    assert ("file-without-row", "T1/stray.nii.gz") in {(w.kind, w.where) for w in report.warnings}
    assert report.cohort is None
    with pytest.raises(LdmError) as error:
        report.raise_for_policy()
    for kind, where in expected:
        assert kind in str(error.value)
        assert where in str(error.value)
    assert len(json.loads(json.dumps(report.to_dict()))["faults"]) == len(report.faults)


def test_leave_out_drops_exactly_the_affected_rows(tmp_path):
    cohort, _ = _plant(tmp_path)
    report = check_cohort(cohort.config(faults="leave_out"), progress=False)
    report.raise_for_policy()
    assert [record.id for record in report.cohort.records] == CLEAN
    planted = {row["participant_id"] for row in cohort.rows} - set(CLEAN)
    assert planted - set(report.facts["left_out"]) == set()
    assert not set(CLEAN) & set(report.facts["left_out"])


def test_clean_cohort_passes_and_a_fault_of_the_whole_always_stops(tmp_path):
    cohort = Planted(tmp_path)
    report = check_cohort(cohort.config(), progress=False)
    report.raise_for_policy()
    assert report.faults == ()
    assert [warning.kind for warning in report.warnings] == ["no-test-split"]
    assert report.facts["splits"] == {"train": 10, "valid": 2, "test": 0}
    assert report.facts["shape_max"] == [1, *SHAPE]
    assert report.render().endswith("No faults.")

    empty = check_cohort(cohort.config(split={"column": "late"}, faults="leave_out"), progress=False)
    assert [fault.kind for fault in empty.faults] == ["empty-split"]
    assert empty.cohort is None
    with pytest.raises(LdmError, match="no record is left in the valid split"):
        empty.raise_for_policy()

    covariates = {"weight": {"kind": "continuous"}, "agee": {"kind": "continuous"}}
    unknown = check_cohort(cohort.config(covariates=covariates, faults="leave_out"), progress=False)
    assert [fault.kind for fault in unknown.faults] == ["unknown-column"] * 2
    assert "Did you mean 'age'" in unknown.render()


def test_copies_that_agree_leave_the_first(tmp_path):
    cohort = Planted(tmp_path)
    shutil.copy(cohort.image("clean03"), cohort.image("clean04"))
    cohort.rows[4] |= {"age": cohort.rows[3]["age"], "sex": cohort.rows[3]["sex"]}
    report = check_cohort(cohort.config(faults="leave_out"), progress=False)
    assert report.facts["left_out"] == ["clean04"]


def test_level_that_training_lacks_is_a_fault_of_the_row(tmp_path):
    cohort = Planted(tmp_path)
    cohort.add("other", sex="X", split="valid")
    config = cohort.config(covariates={"sex": {"kind": "categorical"}}, faults="leave_out")
    report = check_cohort(config, progress=False)
    assert [(fault.kind, fault.record) for fault in report.faults] == [("covariate-unknown-level", "other")]
    assert [record.id for record in report.cohort.records] == CLEAN


def test_forms_of_different_spaces_only_warn_and_resampling_accepts_any_spacing(tmp_path):
    cohort = Planted(tmp_path)
    image = nib.load(cohort.image("clean00"))
    moved = np.eye(4)
    moved[:3, 3] = 20
    image.set_qform(moved, code=1)
    image.set_sform(np.eye(4), code=4)
    nib.save(nib.Nifti1Image(_volume(1), None, image.header), cohort.image("clean00"))
    cohort.add("thick", affine=np.diag([1.0, 1, 3, 1]))
    report = check_cohort(cohort.config(spacing_mm=2.0), progress=False)
    assert report.faults == ()
    assert ("sform-qform", "T1/clean00.nii.gz") in {(w.kind, w.where) for w in report.warnings}


TWO_MM = np.diag([2.0, 2, 2, 1])


def _of_two_mm(root: Path) -> Planted:
    cohort = Planted(root)
    for index, name in enumerate(CLEAN):
        _save(cohort.image(name), _volume(300 + index), TWO_MM)
    return cohort


def test_a_header_of_other_voxels_is_a_fault_also_when_resampling(tmp_path):
    cohort = _of_two_mm(tmp_path)
    cohort.add("centimetres", affine=np.diag([20.0, 20, 20, 1]))
    cohort.add("micron", affine=np.diag([2e-1, 2e-1, 2e-1, 1]))
    for shape in (None, [16, 16, 16]):
        report = check_cohort(cohort.config(spacing_mm=2.0, shape=shape, labels=None), progress=False)
        assert [(fault.kind, fault.where, fault.record) for fault in report.faults] == [
            ("field-of-view", "T1/centimetres.nii.gz", "centimetres"),
            ("field-of-view", "T1/micron.nii.gz", "micron"),
        ]
    assert "200 x 220 x 240 mm (voxels of 20 x 20 x 20 mm), the cohort's median 20 x 22 x 24 mm" in report.render()
    as_stored = check_cohort(cohort.config(labels=None), progress=False)
    assert [fault.kind for fault in as_stored.faults] == ["spacing"] * 2


def test_thick_slices_and_fields_of_view_that_are_cropped_only_warn(tmp_path):
    cohort = _of_two_mm(tmp_path)
    cohort.add("thick", array=_volume(1, (10, 11, 3)), affine=np.diag([2.0, 2, 8, 1]))
    cohort.add("long", array=_volume(2, (10, 11, 40)), affine=TWO_MM)
    report = check_cohort(cohort.config(spacing_mm=2.0, labels=None), progress=False)
    assert [(fault.kind, fault.record) for fault in report.faults] == [("field-of-view", "long")]
    assert ("voxel-size", "thick") in {(warning.kind, warning.record) for warning in report.warnings}
    cropped = check_cohort(cohort.config(spacing_mm=2.0, labels=None, shape=[16, 16, 16]), progress=False)
    assert cropped.faults == ()
    assert {(warning.kind, warning.record) for warning in cropped.warnings} >= {
        ("voxel-size", "thick"),
        ("field-of-view", "long"),
    }


def test_small_images_and_a_second_protocol_only_warn(tmp_path):
    cohort = _of_two_mm(tmp_path)
    cohort.add("slab", array=_volume(1, (10, 11, 3)), affine=TWO_MM)
    for index in range(3):
        cohort.add(f"long{index}", array=_volume(10 + index, (10, 11, 40)), affine=TWO_MM)
    report = check_cohort(cohort.config(spacing_mm=2.0, labels=None), progress=False)
    assert report.faults == ()
    told = {warning.record: warning.remedy for warning in report.warnings if warning.kind == "field-of-view"}
    assert sorted(told) == ["long0", "long1", "long2", "slab"]
    assert "it is padded" in told["slab"]
    assert "set data.shape" in told["long0"]


def test_the_report_prints_the_grid_of_the_model(tmp_path):
    cohort = _of_two_mm(tmp_path)
    config = cohort.config(spacing_mm=[4.0, 2.0, 1.0], labels=None)
    report = check_cohort(config, progress=False, multiple=8)
    assert report.facts["model_grid"] == {"channels": 1, "shape": [8, 16, 24], "spacing_mm": [4.0, 2.0, 1.0]}
    assert "channels 1, shape [8, 16, 24], spacing_mm [4.0, 2.0, 1.0]" in report.render()
    given = check_cohort(config | {"shape": [8, 8, 8], "spacing_mm": None}, progress=False, multiple=8)
    assert given.facts["model_grid"] == {"channels": 1, "shape": [8, 8, 8], "spacing_mm": [2.0, 2.0, 2.0]}


def test_pictures_of_another_size_warn(tmp_path):
    for index, side in enumerate([16] * 6 + [50]):
        Image.fromarray(_volume(index, (16, side)).astype(np.uint8)).save(tmp_path / f"p{index}.png")
    config = {"root": str(tmp_path), "image": "{name}.png", "id": "name", "subject": "name", "spatial_dims": 2}
    report = check_cohort(config | {"intensity": {"kind": "window", "lower": 0, "upper": 255}}, progress=False)
    assert report.faults == ()
    assert ("field-of-view", "p6") in {(warning.kind, warning.record) for warning in report.warnings}
    assert report.facts["model_grid"] == {"channels": 1, "shape": [16, 50]}


def test_channels_lie_on_one_grid(tmp_path):
    cohort = Planted(tmp_path)
    for index, name in enumerate(CLEAN):
        _save(tmp_path / "T2" / f"{name}.nii.gz", _volume(200 + index, (5, 5, 5) if index == 2 else SHAPE))
    config = cohort.config(image={"t1": "T1/{file}.nii.gz", "t2": "T2/{file}.nii.gz"})
    faults = check_cohort(config, progress=False).faults
    assert [(fault.kind, fault.where) for fault in faults] == [("channels-shape", "T2/clean02.nii.gz")]


def test_impossible_covariates_warn_and_stop_nothing(tmp_path):
    cohort = Planted(tmp_path)
    place = cohort.add("unknown_age", age="-9")
    report = check_cohort(cohort.config(covariates={"age": {"kind": "continuous"}}), progress=False)
    assert report.faults == ()
    assert ("covariate-code-of-missing", place) in {(warning.kind, warning.where) for warning in report.warnings}


def test_a_cohort_of_several_volumes_a_file_warns(tmp_path):
    cohort = Planted(tmp_path)
    assert "volumes-as-channels" not in check_cohort(cohort.config(), progress=False).render()
    for index, name in enumerate(CLEAN):
        _save(cohort.image(name), _volume(400 + index, (*SHAPE, 3)))
    report = check_cohort(cohort.config(), progress=False)
    assert report.faults == ()
    assert report.facts["model_grid"]["channels"] == 3
    (warning,) = (warning for warning in report.warnings if warning.kind == "volumes-as-channels")
    assert warning.where == "data.image"
    assert warning.reason == "12 files are 4-D and hold 3 volumes each: 'image' becomes 3 channels"
    assert "mapping" in warning.remedy
    named = check_cohort(cohort.config(image={"t1": "T1/{file}.nii.gz"}), progress=False)
    assert "data.image.t1" in {warning.where for warning in named.warnings}


def test_a_row_that_stands_twice_has_the_faults_of_its_files_once(tmp_path):
    cohort = Planted(tmp_path)
    cohort.add("twice")
    cohort.rows.append(cohort.rows[-1])
    cohort.image("twice").write_bytes(b"no scan")
    report = check_cohort(cohort.config(), progress=False)
    assert [fault.kind for fault in report.faults] == ["duplicate-id"] * 2 + ["unreadable"]


def test_pictures_and_arrays(tmp_path):
    rows = ["participant_id\tfile"]
    for index in range(10):
        pixels = _volume(index, (16, 16)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p{index}.png")
        rows.append(f"p{index}\tp{index}.png")
    cut = (tmp_path / "p0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    Image.fromarray(_volume(20, (16, 16, 3)).astype(np.uint8)).save(tmp_path / "rgb.png")
    _save(tmp_path / "volume.nii.gz", _volume(21))
    np.savez(tmp_path / "good.npz", images=_volume(22, (2, 16, 16)))
    archive = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(archive[: len(archive) // 2])
    (tmp_path / "bad_crc.npz").write_bytes(archive[:300] + b"\x00\x01\x02" + archive[303:])
    rows += [f"x{i}\t{name}" for i, name in enumerate(("cut.png", "rgb.png", "volume.nii.gz"))]
    (tmp_path / "t.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {
        "root": str(tmp_path),
        "table": "t.tsv",
        "image": "{file:path}",
        "spatial_dims": 2,
        "intensity": {"kind": "window", "lower": 0, "upper": 255},
    }
    found = {(fault.kind, fault.where) for fault in check_cohort(config, progress=False).faults}
    assert found == {
        ("unreadable", "cut.png"),
        ("wrong-dimensions", "rgb.png"),
        ("wrong-dimensions", "volume.nii.gz"),
    }

    for name in ("cut.npz", "bad_crc.npz"):
        faults = check_cohort(config | {"image": name + "::images[{row}]"}, progress=False).faults
        assert {fault.kind for fault in faults} >= {"unreadable"}
    faults = check_cohort(config | {"image": "good.npz::images[{row}]"}, progress=False).faults
    assert {fault.where for fault in faults if fault.kind == "unreadable"} == {
        f"good.npz::images[{row}]" for row in range(2, 13)
    }


def test_axes_that_coincide_are_a_singular_affine_for_slices_too(tmp_path):
    affine = np.eye(4)
    affine[:3, 1] = [1e20, 1, 0]
    image = nib.Nifti1Image(_volume(1), np.eye(4))
    image.set_sform(affine, code=1)
    nib.save(image, tmp_path / "a.nii.gz")
    assert inspect(str(tmp_path / "a.nii.gz"), "image", 3, IntensityRecipe()).kind == "singular-affine"
    assert inspect(f"{tmp_path}/a.nii.gz::axial[3]", "image", 2, IntensityRecipe()).kind == "singular-affine"
    with pytest.raises(LdmError, match="no inverse"):
        read(tmp_path / "a.nii.gz::axial[3]")


def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    for name in ("a.nii", "a.nii.gz"):
        _save(tmp_path / name, _volume(1))
        _patch(tmp_path / name, DIM, HUGE)
    monkeypatch.setattr(np, "asanyarray", lambda *_: pytest.fail("the voxels were read"))
    for name in ("a.nii", "a.nii.gz"):
        facts = inspect(str(tmp_path / name), "image", 3, IntensityRecipe())
        assert facts.kind == "unreadable"
        assert "claims 32767 x 32767 x 32767 voxels" in facts.reason


def _npy_header(text: str) -> bytes:
    """An ``.npy`` file of format 1.0 whose header reads ``text``."""
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n" + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4",  # tokenize.TokenError
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)) }",  # SyntaxError
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, {2**40})}}",  # OverflowError or MemoryError
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**20}, {2**20})}}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 'x')}",
        "{'descr': ['<f4'], 'fortran_order': False, 'shape': (4, 4)}",
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_damaged_array_headers_are_told(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(_npy_header(header))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", _npy_header(header))
    for ref in ("a.npy", "a.npz::x"):
        facts = inspect(str(tmp_path / ref), "image", 2, IntensityRecipe())
        assert facts.kind == "unreadable"
        assert "damaged" in facts.reason


@pytest.mark.parametrize(("field", "value"), [("flags", 1), ("compression", 99), ("compression", 14)])
def test_archives_that_cannot_be_unpacked_are_told(tmp_path, field, value):
    path = tmp_path / "a.npz"
    np.savez(path, x=_volume(1, (16, 16)))
    local, central = {"flags": (6, 8), "compression": (8, 10)}[field]
    for offset in (local, path.read_bytes().index(b"PK\x01\x02") + central):
        _patch(path, offset, value.to_bytes(2, "little"))
    facts = inspect(f"{path}::x", "image", 2, IntensityRecipe())
    assert facts.kind == "unreadable"
    assert "damaged" in facts.reason


def test_unchanged_files_come_from_the_cache(tmp_path, monkeypatch):
    cohort = Planted(tmp_path / "data")
    cache = tmp_path / "cache"
    first = check_cohort(cohort.config(), cache, progress=False)
    assert first.facts["from_cache"] == 0
    again = check_cohort(cohort.config(), cache, progress=False)
    assert again.facts["from_cache"] == again.facts["files"] == 24
    assert again.cohort == first.cohort

    broken = _volume(1)
    broken[0, 0, 0] = np.inf
    _save(cohort.image("clean05"), broken)
    changed = check_cohort(cohort.config(), cache, progress=False)
    assert changed.facts["from_cache"] == 23
    assert [fault.where for fault in changed.faults] == ["T1/clean05.nii.gz"]

    (cache / "checks.json").write_text("{", encoding="utf-8")
    assert check_cohort(cohort.config(), cache, progress=False).facts["from_cache"] == 0


def test_small_voxels_in_metres_have_a_size(tmp_path):
    affine = np.diag([0.9e-3, 0.9e-3, 0.9e-3, 1.0])
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), affine)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii.gz")
    assert _inspect_header(tmp_path / "a.nii.gz").kind is None
