"""Tables, templates, expressions, splits: from a configuration to records, never outside the root."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from ldm.data import prepare
from ldm.data.checks import check_cohort
from ldm.data.cohort import Cohort
from ldm.data.cohort_config import DEFAULTS, complete_config
from ldm.data.draft import split_subjects
from ldm.data.expressions import parse
from ldm.data.table import read_table
from ldm.data.templates import EscapeError, Template
from ldm.errors import LdmError

PROJECT = Path(__file__).parents[2]
CONF = PROJECT / "conf" / "data"
FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def _table(root: Path, text: str, name: str = "participants.tsv") -> dict:
    (root / name).write_text(text.replace("|", "\t" if name.endswith(".tsv") else ","), encoding="utf-8")
    return {"root": str(root), "table": name, "image": "{participant_id}.nii.gz"}


def _subjects(n: int) -> str:
    return "participant_id|age\n" + "".join(f"s{i:02}|{40 + i}\n" for i in range(n))


# expressions and templates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ventricles_ml * factor * 1000", 24000.0),
        ("ventricles_ml / factor", 20 / 1.2),
        ("(left + right) * 2 - 1", 15.0),
        ("1 - left - right / 2e0", -4.5),
        ("`age at scan` * 2", 100.0),
        ("age at scan", 50.0),
    ],
)
def test_expression_is_arithmetic_on_columns(text, value):
    row = {"ventricles_ml": 20.0, "factor": 1.2, "left": 3.0, "right": 5.0, "age at scan": 50.0}
    assert parse(text, row, "key")(row.get) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "age.__class__",
        "age[0]",
        "age ** 9",
        "lambda: age",
        "(age",
        "age age",
        "",
        "-age",
        "1__0 * age",
        "(" * 150,
        "age" + " + age" * 100,
    ],
)
def test_expression_runs_no_code(text):
    with pytest.raises(LdmError):
        parse(text, ["age", "os"], "data.covariates.x.column")


def test_expression_names_the_nearest_column():
    with pytest.raises(LdmError, match=r"no column 'agee'.*Did you mean 'age'"):
        parse("agee * 2", ["age"], "key")


@pytest.mark.parametrize(
    "value", ["../secret", "..", "/etc/passwd", "a/b", "a\\b", "x::images[0]", "a\x00b", "a\nb", "C:/x"]
)
def test_template_value_stays_below_the_root(value):
    with pytest.raises(EscapeError):
        Template.parse("{participant_id}/x.nii.gz", "data.image").format({"participant_id": value})


@pytest.mark.parametrize("value", ["../x", "a/../../x", "/etc/passwd", "~/x"])
def test_path_column_stays_below_the_root(value):
    with pytest.raises(EscapeError):
        Template.parse("{file:path}", "data.image").format({"file": value})


def test_two_harmless_values_cannot_add_up_to_an_escape():
    with pytest.raises(EscapeError):
        Template.parse("{a}{b}/x", "data.image").format({"a": ".", "b": "."})


@pytest.mark.parametrize(
    "text",
    [
        "../{x}",
        "/data/{x}",
        "{x.__class__}",
        "{x[0]}",
        "{x!r}",
        "{x:>10}",
        "{}",
        "{x",
        "a/../../{x}",
        "C:/{x}",
    ],
)
def test_template_has_no_code_and_no_way_out(text):
    with pytest.raises(LdmError):
        Template.parse(text, "data.image").require(["x"])


def test_template_forms_and_files(tmp_path):
    for name in ("CXR/1.jpeg", "CXR/2.jpeg", "Hand/1.jpeg", "Hand/._1.jpeg", "Hand/notes.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    row = {"file": "CXR/000025.jpeg", "class": "CXR"}
    assert Template.parse("images/{file:path}", "k").format(row) == "images/CXR/000025.jpeg"
    assert Template.parse("{class}_{file:stem}", "k").format(row) == "CXR_000025"
    template = Template.parse("images/{class}/{name}.jpeg", "k")
    assert template.files(tmp_path) == ["images/CXR/1.jpeg", "images/CXR/2.jpeg", "images/Hand/1.jpeg"]
    assert template.row_of("images/CXR/2.jpeg") == {"class": "CXR", "name": "2"}
    assert Template.parse("images/{file:path}.jpeg", "k").files(tmp_path) == template.files(tmp_path)
    twice = Template.parse("images/{class}/{class}.jpeg", "k")
    assert twice.files(tmp_path) == []


# tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "a,b\n1,2\n", "one column"),
        ("t.csv", "a,a\n1,2\n", "stands twice"),
        ("t.csv", "a,b\n1,2,3\n", "cannot be read as a table .*; give every line as many cells as the header"),
        ("t.csv", 'a,b\n1,"2\n3,4\n', "cannot be read as a table .*; close the quotation mark"),
        ("t.csv", "a,b\n", "no rows"),
        ("t.csv", "", "cannot be read as a table .*; it needs a header line"),
        ("t.csv", b"a,b\n\xff\xfe,1\n", "cannot be read as a table .*; save it as UTF-8 text"),
        ("t.txt", "x", r"a table is a \.tsv or \.csv file, not '\.txt'$"),
        ("t.xlsx", "x", r"a table is a \.tsv or \.csv file, not '\.xlsx'; export the sheet as \.tsv or \.csv"),
    ],
)
def test_unusable_table_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LdmError, match=message):
        read_table(tmp_path / name)


def test_table_is_read_as_text_with_lines_and_missing_values(tmp_path):
    (tmp_path / "t.csv").write_text("\ufeffid,age\n007,n/a\n\n 1e3 ,NaN\n,5\n", encoding="utf-8")
    table = read_table(tmp_path / "t.csv")
    assert table.columns == ("id", "age")
    assert [row["id"] for row in table.rows] == ["007", "1e3", None]
    assert [row["age"] for row in table.rows] == [None, None, "5"]
    assert table.places == ("t.csv:2", "t.csv:4", "t.csv:5")
    assert [row["row"] for row in table.rows] == ["0", "1", "2"]


# configuration ----------------------------------------------------------------------------------------


def test_base_file_and_defaults_name_the_same_keys():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("base", overrides=["name=x", "root=x", "image=x"])
    assert set(config) == set(DEFAULTS)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base"))
def test_every_data_set_composes(name, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = complete_config(compose(name, overrides=[f"root={tmp_path}"]))
    assert config["name"] == name


def test_a_covariate_that_is_null_is_left_out():
    config = complete_config({"root": "x", "image": "x", "covariates": {"age": None, "sex": {"kind": "categorical"}}})
    assert list(config["covariates"]) == ["sex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covariate": {}}, "Did you mean 'covariates'"),
        ({"faults": "ignore"}, "Legal: stop, leave_out"),
        ({"spatial_dims": 4}, "Legal: 2, 3"),
        ({"missing_covariate": "nul"}, "Did you mean 'null'"),
        ({"split": {"colum": "x"}}, "Did you mean 'column'"),
        ({"split": {"fractions": {"train": 0.8, "valid": 0.8}}}, "sum to 1"),
        ({"root": None}, "data.root is not set"),
        ({"root": "/nowhere/at/all"}, "there is no folder"),
        ({"root": "/nowhere", "name": "msd_hippocampus"}, "data.download=true"),
        ({"root": "/nowhere", "name": "ixi_2mm", "download": True}, "cannot be fetched"),
        ({"id": "participant"}, "Did you mean 'participant_id'"),
        ({"covariates": {"agee": {"kind": "continuous"}}}, "Did you mean 'age'"),
        ({"split": {"column": "group"}}, "no column 'group'"),
        ({"image": "{file}.nii.gz"}, "no column 'file'"),
    ],
)
def test_misspelt_configuration_is_named(tmp_path, change, message):
    with pytest.raises(LdmError, match=message):
        Cohort.from_config(_table(tmp_path, _subjects(10)) | change)


# cohorts ----------------------------------------------------------------------------------------------


def test_records_hold_references_and_typed_covariates(tmp_path):
    text = "participant_id|session|age|sex|v|f\na|1|50|F|2|1.5\na|2|51|F|n/a|1\n"
    text += "".join(f"s{i}|1|{60 + i}|{'FM'[i % 2]}|{1 + i}|1\n" for i in range(8))
    config = _table(tmp_path, text, "participants.csv") | {
        "id": "{participant_id}_{session}",
        "image": {"t1": "{participant_id}/{session}_T1.nii.gz", "flair": "flair.npz::x[{row}]"},
        "labels": "{participant_id}/seg.nii.gz",
        "covariates": {
            "age": {"kind": "continuous", "range": [0, 100]},
            "sex": {"kind": "categorical", "levels": ["M", "F"]},
            "volume": {"kind": "continuous", "column": "v * f * 1000", "range": [0, 1e4]},
        },
        "split": {"seed": 1, "fractions": {"train": 0.4, "valid": 0.3, "test": 0.3}},
    }
    cohort = Cohort.from_config(config)
    assert cohort.channels == ("t1", "flair")
    first, second = cohort.records[:2]
    assert (first.id, first.subject, first.place) == ("a_1", "a", "participants.csv:2")
    assert first.images == {"t1": f"{tmp_path}/a/1_T1.nii.gz", "flair": f"{tmp_path}/flair.npz::x[0]"}
    assert first.labels == f"{tmp_path}/a/seg.nii.gz"
    assert first.covariates == {"age": 50.0, "sex": "F", "volume": 3000.0}
    assert second.covariates["volume"] is None
    assert first.split == second.split


def test_rows_come_from_file_names_without_a_table(tmp_path):
    for name in [f"{kind}/{i}" for kind in ("CXR", "Hand") for i in range(10)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").touch()
    config = {
        "root": str(tmp_path),
        "image": "{class}/{name}.png",
        "id": "{class}_{name}",
        "subject": "{class}_{name}",
        "covariates": {"class": {"kind": "categorical"}},
    }
    cohort = Cohort.from_config(config)
    assert len(cohort.records) == 20
    assert cohort.records[0].covariates == {"class": "CXR"}
    with pytest.raises(LdmError, match="no file below"):
        Cohort.from_config(config | {"image": "{class}/{name}.jpg"})


@pytest.mark.parametrize(("policy", "count"), [("null", 20), (None, 20), ("drop", 19), ("error", None)])
def test_missing_covariate_policy(tmp_path, policy, count):
    config = _table(tmp_path, _subjects(19) + "s19|n/a\n") | {
        "covariates": {"age": {"kind": "continuous"}},
        "missing_covariate": policy,
    }
    if count is None:
        with pytest.raises(LdmError, match=r"participants\.tsv:21 +'s19' has no age"):
            Cohort.from_config(config)
    else:
        assert len(Cohort.from_config(config).records) == count


def test_split_is_by_subject_reproducible_and_stable_when_subjects_are_added():
    subjects = [f"sub-{i:03}" for i in range(100)]
    splits = split_subjects(subjects, 0, FRACTIONS)
    assert [list(splits.values()).count(name) for name in ("train", "valid", "test")] == [80, 10, 10]
    assert split_subjects(reversed(subjects), 0, FRACTIONS) == splits
    assert split_subjects(subjects, 1, FRACTIONS) != splits
    more = split_subjects([*subjects, *(f"new-{i}" for i in range(10))], 0, FRACTIONS)
    assert sum(more[subject] != splits[subject] for subject in subjects) <= 4
    assert set(split_subjects(["a", "b", "c"], 0, FRACTIONS).values()) == {"train", "valid", "test"}


def test_split_column_and_hash(tmp_path):
    words = ["train"] * 6 + ["Training", "val", "valid", "validation"]
    text = "participant_id|group\n" + "".join(f"s{i}|{word}\n" for i, word in enumerate(words))
    cohort = Cohort.from_config(_table(tmp_path, text) | {"split": {"column": "group"}})
    assert [len(cohort.split(name)) for name in ("train", "valid", "test")] == [7, 3, 0]
    lines = sorted(f"s{i}\t{'train' if i < 7 else 'valid'}\n" for i in range(10))
    assert cohort.split_hash == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert cohort.seed is None
    with pytest.raises(LdmError, match="Legal: train, valid, test"):
        cohort.split("val")


def test_distribution_counts_a_subject_once(tmp_path):
    text = "participant_id|session|age|split\n"
    text += "".join(f"long|{i}|80|train\n" for i in range(50))
    text += "".join(f"s{i}|1|{40 + i % 10}|{'train' if i < 19 else 'valid'}\n" for i in range(20))
    config = _table(tmp_path, text) | {
        "id": "{participant_id}_{session}",
        "covariates": {"age": {"kind": "continuous"}},
        "split": {"column": "split"},
    }
    assert max(Cohort.from_config(config).distribution().quantiles["age"]) < 60


# public sets ------------------------------------------------------------------------------------------


def _hippocampus(root: Path, tmp_path: Path) -> Path:
    """The real set where it is at hand, otherwise a made one of the same layout and its table."""
    shared = Path(os.environ.get("LDM_TEST_DATA", PROJECT.parent / "shared" / "data")) / "hippocampus_msd"
    if shared.is_dir():
        return shared
    rng = np.random.default_rng(0)
    for index in range(12):
        labels = np.zeros((12, 14, 12), dtype=np.uint8)
        labels[3 : 5 + index % 4, 4:9, 4:8], labels[8:10, 4:9, 4 : 6 + index % 3] = 1, 2
        volume = labels * 100 + rng.normal(50, 5, labels.shape)
        for folder, array in (("imagesTr", volume.astype(np.float32)), ("labelsTr", labels)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / folder / f"hippocampus_{index:03}.nii.gz")
    prepare.hippocampus_table(root, root / "participants.tsv")
    return root


def test_hippocampus_set_passes_and_its_table_can_be_made(tmp_path):
    root = _hippocampus(tmp_path / "made", tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        report = check_cohort(compose("msd_hippocampus", overrides=[f"root={root}"]), tmp_path, progress=False)
    report.raise_for_policy()
    assert report.cohort.schema.names == ("anterior_mm3", "posterior_mm3")
    record = report.cohort.records[0]
    labels = nib.load(record.labels).get_fdata()
    assert record.covariates == {
        "anterior_mm3": float((labels == 1).sum()),
        "posterior_mm3": float((labels == 2).sum()),
    }


def test_mednist_tables_are_made_without_copies(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("CXR", "Hand"):
        folder = tmp_path / "images64" / kind
        folder.mkdir(parents=True)
        for index in range(12):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{index:06}.jpeg")
        (folder / "000099.jpeg").write_bytes((folder / "000003.jpeg").read_bytes())
    prepare.mednist_table(tmp_path / "images64", tmp_path / "mednist64_1000pc.csv")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        report = check_cohort(compose("mednist", overrides=[f"root={tmp_path}"]), progress=False)
    assert not report.faults
    assert len(report.cohort.records) == 24
    assert [warning.kind for warning in report.warnings] == ["file-without-row"] * 2


def test_array_file_gets_its_table(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["AbdomenCT", "CXR"])}
    for split, count in (("train", 8), ("valid", 3), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8) % 2
        arrays[f"{split}_files"] = np.array([f"{i}.jpeg" for i in range(count)])
    np.savez(tmp_path / "mednist48_lecture.npz", **arrays)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("mednist48_lecture", overrides=[f"root={tmp_path}", "download=true"])
    report = check_cohort(config, progress=False)
    assert not report.faults
    assert [len(report.cohort.split(name)) for name in ("train", "valid", "test")] == [8, 3, 3]
    assert report.cohort.split("valid")[1].covariates == {"class": "CXR"}
