"""Every data configuration reads the layout that its card in ``data/`` describes, and trains on it."""

import csv
import json

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from tests.conftest import TINY

pytestmark = pytest.mark.slow

AGE = "data.covariates={age: {kind: continuous, unit: years}, sex: {kind: categorical}}"
CLASSES = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")


def volume(path, values, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


def scan(path, rng, shape=(20, 24, 16), affine=(-2.0, 2.0, 2.0), dtype=np.int16, peak=900):
    """A noisy box in the dark, so that no two files are alike."""
    values = rng.integers(0, peak // 20, shape)
    values[4:-4, 4:-4, 4:-4] = rng.integers(peak // 2, peak, [side - 8 for side in shape])
    volume(path, values.astype(dtype), np.diag([*affine, 1.0]))


def picture(path, rng, shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def person(number):
    return {"age": 40 + number, "sex": "FM"[number % 2]}


# layouts: each fills a folder and returns what to say beside data=NAME data.root=FOLDER -------------------------------


def bids(root, rng):
    names = [f"sub-{number:02}" for number in range(1, 13)]
    for name in names:
        scan(root / name / "anat" / f"{name}_T1w.nii.gz", rng)
    table(root / "participants.tsv", [{"participant_id": name, **person(i)} for i, name in enumerate(names)])
    (root / "dataset_description.json").write_text(json.dumps({"Name": "test", "BIDSVersion": "1.9.0"}))
    return [AGE]


def bids_sessions(root, rng):
    rows = []
    for number in range(1, 11):
        for session in ("ses-01", "ses-02")[: 1 + number % 2]:
            name = f"sub-{number:02}"
            scan(root / name / session / "anat" / f"{name}_{session}_T1w.nii.gz", rng)
            rows.append({"participant_id": name, "session_id": session, **person(number)})
    table(root / "sessions.tsv", rows)
    return [AGE]


def ixi_2mm(root, rng):
    rows = []
    for i in range(12):
        name = f"IXI{12 + i:03}-HH-{1211 + i}"
        scan(root / f"T1/{name}_T1.nii.gz", rng, affine=(2.0, 2.0, 2.0), dtype=np.uint8, peak=220)
        regions = rng.choice([0, 1, 4, 35, 40, 51, 207], (20, 24, 16)).astype(np.uint8)
        volume(root / f"seg/{name}_dlmuse.nii.gz", regions, np.diag([2.0, 2.0, 2.0, 1.0]))
        rows.append(
            {"participant_id": name, **(person(i) if i != 5 else {"age": "n/a", "sex": "n/a"})}
            | {"split": "valid" if i > 9 else "train", "ventricles_ml": 14.5 + i, "brain_ml": 1100 + 10 * i}
            | {"mni_volume_factor": 1.3 + i / 100}
        )
    table(root / "participants.tsv", rows)
    return []


def mednist(root, rng):
    for name in CLASSES:
        for number in range(10):
            picture(root / f"images64/{name}/{number:06}.jpeg", rng, (24, 24))
    PIL.Image.new("L", (24, 24), 7).save(root / "images64/HeadCT/000010.jpeg")  # constant, as one of the source's is
    return ["data.download=true"]


def mednist48_lecture(root, rng):
    arrays = {"class_names": np.array(CLASSES)}
    for split, count in (("train", 12), ("valid", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 24, 24), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 6
        arrays[f"{split}_files"] = np.array([f"{CLASSES[i % 6]}/{split}{i:06}.jpeg" for i in range(count)])
    arrays["train_images"][5] = 7
    np.savez_compressed(root / "mednist48_lecture.npz", **arrays)
    return ["data.download=true"]


def msd_hippocampus(root, rng):
    for number in range(1, 13):
        shape = (16 + number % 3, 20 + number % 4, 16)
        scan(root / f"imagesTr/hippocampus_{number:03}.nii.gz", rng, shape, (1.0, 1.0, 1.0), np.float32, 100 * number)
        labels = np.zeros(shape, np.uint8)
        labels[5:9, 6 : 8 + number % 4, 5:9], labels[9:12, 6 : 8 + number % 5, 5:9] = 1, 2
        volume(root / f"labelsTr/hippocampus_{number:03}.nii.gz", labels, np.eye(4))
    return ["data.download=true"]


def oasis_midslices(root, rng):
    rows = []
    for i in range(12):
        name = f"OAS1_{i + 1:04}_MR1"
        for plane, shape in (("axial", (24, 20)), ("coronal", (20, 20)), ("sagittal", (20, 24))):
            picture(root / plane / f"{name}.jpg", rng, shape)
        rows.append({"participant_id": name, "sex": "FM"[i % 2], "age": 60 + i, "CDR": ("0", "0.5", "1")[i % 3]})
    table(root / "participants.tsv", rows)
    return []


def nifti(root, rng):
    rows = [{"participant_id": f"p{i}", **person(i)} for i in range(12)]
    for row in rows:
        scan(root / "images" / f"{row['participant_id']}.nii.gz", rng)
    table(root / "participants.tsv", rows)
    return [AGE]


def brats(root, rng, prefix="BraTS2021", suffix=".nii.gz"):
    for number in range(12):
        name = f"{prefix}_{number:03}"
        for sequence in ("t1", "t1ce", "t2", "flair"):
            scan(root / name / f"{name}_{sequence}{suffix}", rng, affine=(-1.0, -1.0, 1.0))
        labels = rng.choice([0, 1, 2, 4], (20, 24, 16)).astype(np.uint8)
        volume(root / name / f"{name}_seg{suffix}", labels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    return []


def brats_2020(root, rng):
    return brats(root, rng, "BraTS20_Training", ".nii")


LAYOUTS = (
    bids,
    bids_sessions,
    brats,
    brats_2020,
    ixi_2mm,
    mednist,
    mednist48_lecture,
    msd_hippocampus,
    oasis_midslices,
    nifti,
)
CONSTANT = ("mednist", "mednist48_lecture")  # one constant picture is left out


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_data_configuration_is_checked_and_takes_a_step(ldm, tmp_path, layout):
    name, root = layout.__name__, tmp_path / "data"
    root.mkdir()
    settings = (f"data={name}", f"data.root={root}", *layout(root, np.random.default_rng(0)), *TINY)
    code, text = ldm("check", *settings)
    assert not code, text
    assert ("Left out 1 records" if name in CONSTANT else "No faults") in text
    report = json.loads((tmp_path / f"runs/{name}/check/check.json").read_text())
    assert report["facts"]["splits"]["train"] >= 6
    assert report["facts"]["splits"]["valid"] >= 1
    code, text = ldm("train-vae", *settings, "trainer.max_steps=1")
    assert not code, text
    assert "PSNR" in text


@pytest.mark.parametrize("lacking", ["t1", "t1ce", "t2", "flair", "seg"])
def test_a_patient_without_one_of_the_sequences_is_refused_by_name(ldm, tmp_path, lacking):
    brats(tmp_path, np.random.default_rng(0))
    (tmp_path / f"BraTS2021_004/BraTS2021_004_{lacking}.nii.gz").unlink()
    code, text = ldm("check", "data=brats", f"data.root={tmp_path}", *TINY)
    assert code
    assert "missing-file" in text
    assert f"BraTS2021_004_{lacking}.nii.gz" in text.replace("\n", "").replace(" ", "")
