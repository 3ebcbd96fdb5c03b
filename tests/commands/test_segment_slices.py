"""Slices with masks as in data=lgg_slices: training, Dice, uncertainty, and a peer in the same table."""

import csv
import json

import nibabel as nib
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from ldm.data.images import read
from ldm.model.file import read_header

pytestmark = pytest.mark.slow

SIDE, SLICES = 32, 4
RUN = "runs/lgg_segmentation/lgg_slices"
MODEL = f"{RUN}/ldm/model.safetensors"
SMALL = (
    "trainer=cpu",
    "trainer.log_every=20",
    "data.num_workers=0",
    "data.augment={flip_axes: [], scale: 0, shift: 0, rotate: 0, gamma: 0, brightness: 0}",
)
DIFFUSION = (
    "experiment=lgg_segmentation/diffusion",
    "ldm.network.channels=[16,32]",
    "ldm.network.attention_levels=[false,false]",
    "ldm.network.num_head_channels=16",
    "ldm.latents.variants=1",
    "ldm.optimizer.lr=2e-3",
    "ldm.optimizer.warmup_steps=5",
    "ldm.ema_decays=[0.95]",
    "ldm.val_samples=4",
    "ldm.val_steps=4",
    "ldm.keep_best=true",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sixteen patients; a bright square in FLAIR is the tumour, and one slice of each has none."""
    folder, rng = tmp_path_factory.mktemp("lgg"), np.random.default_rng(0)
    images, masks, rows = [], [], []
    for patient in range(16):
        for index in range(SLICES):
            image, mask = rng.integers(5, 60, (3, SIDE, SIDE)), np.zeros((SIDE, SIDE), np.uint8)
            if index:
                (top, left), side = 2 * rng.integers(2, 8, 2), 2 * rng.integers(4, 7)
                mask[top : top + side, left : left + side] = 1
                image[1] += 150 * mask
            name = f"P{patient:02}"
            rows.append({"slice_id": f"{name}_{index}", "participant_id": name, "diseased": int(mask.any())})
            rows[-1]["split"] = "valid" if patient >= 13 else "train"
            images.append(image)
            masks.append(mask)
    packed = np.packbits(np.array(masks), axis=-1)
    np.savez_compressed(folder / "slices128.npz", images=np.array(images, np.uint8), masks=packed)
    with (folder / "slices.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_slices(ldm, root, tmp_path):
    data = (f"data.root={root}", *SMALL)
    code, text = ldm("train-ldm", *DIFFUSION, *data, "trainer.max_steps=80", "trainer.val_every=80")
    assert not code, text
    lines = [json.loads(line) for line in (tmp_path / RUN / "ldm/metrics.jsonl").read_text().splitlines()]
    scores = [line["ldm/val/dice"] for line in lines if "ldm/val/dice" in line]
    assert scores[-1] > 0.5
    assert read_header(f"{RUN}/ldm/model-best.safetensors")["metrics"] == pytest.approx({"ldm/val/dice": max(scores)})

    code, text = ldm("train-segmenter", "experiment=lgg_segmentation/peer", *data, "trainer.max_steps=2")
    assert not code, text
    peer = ("experiment=lgg_segmentation/peer", *data, f"model={RUN}/segmenter/model.safetensors")
    code, text = ldm("segment", *peer, "members=3", "evaluate=true", "out=peer")
    assert not code, text
    found = json.loads((tmp_path / "peer/metrics.json").read_text())
    assert (found["protocol"]["kind"], found["protocol"]["members"]) == ("dropout", 3)

    asked = (
        "segment",
        *DIFFUSION,
        *data,
        "members=3",
        "steps=4",
        "evaluate=true",
        "out=ours",
        "beside={dropout: peer}",
    )
    code, text = ldm(*asked)
    assert not code, text
    metrics = json.loads((tmp_path / "ours/metrics.json").read_text())
    assert [one["subject"] for one in metrics["patients"]] == ["P13", "P14", "P15"]  # of the table's validation split
    assert metrics["protocol"]["images"] == 3 * SLICES
    scores = metrics["summary"]["classes"]["tumour"]
    assert 0.5 < scores["dice"]["value"] <= scores["ceiling"]["value"] == 1  # squares lie on the coarser grid
    assert scores["dice"]["n"] == 3
    low, high = scores["dice"]["interval"]
    assert low <= scores["dice"]["value"] <= high
    assert metrics["protocol"]["split"] == "test"  # the valid ones are left for testing
    difference = metrics["differences"]["dropout"]["tumour"]["value"]
    assert difference == pytest.approx(scores["dice"]["value"] - found["summary"]["classes"]["tumour"]["dice"]["value"])
    report = (tmp_path / "ours/report.html").read_text()
    assert "dropout, tumour: Dice" in report
    assert "diffusion, tumour: Dice" in report

    code, text = ldm(*asked[:-1], "beside={diffusion: peer}")
    assert code
    assert "give the other another name" in text

    # members but the first see the images changed
    code, text = ldm(
        "segment", *DIFFUSION, *data, "members=2", "steps=4", "out=changed", "augment={flip_axes: [0, 1], rotate: 10}"
    )
    assert not code, text
    changed, plain = (
        np.stack(
            [np.load(path)["members"][:2] for path in sorted((tmp_path / folder).glob("*.npz"))], 1
        )  # (2, N, H, W)
        for folder in ("changed", "ours")
    )
    np.testing.assert_array_equal(changed[0], plain[0])
    assert (changed[1] != plain[1]).any()
    assert json.loads((tmp_path / "changed/provenance.json").read_text())["augment"]["rotate"] == 10

    # what is written is what was measured, at the size of the slices
    _check_files(tmp_path / "ours", root, metrics)

    # the same command goes on, and draws the same
    before = (tmp_path / "ours/P13_1.npz").read_bytes()
    for name in ("P13_1.npz", "P13_1_dseg.png", "P13_1_volumes.json"):
        (tmp_path / "ours" / name).unlink()
    code, text = ldm(*asked)
    assert not code, text
    again, first = (np.load(path) for path in (tmp_path / "ours/P13_1.npz", _saved(tmp_path, before)))
    np.testing.assert_allclose(again["mean"], first["mean"], atol=1e-4)
    code, text = ldm("segment", *DIFFUSION, *data, "data.split.seed=5", "out=other")
    assert code
    assert "trained on another split" in text


def _check_files(out, root, metrics):
    archive = np.load(root / "slices128.npz")
    masks = np.unpackbits(archive["masks"], axis=-1)[13 * SLICES : 14 * SLICES]
    found = np.stack([np.asarray(PIL.Image.open(out / f"P13_{index}_dseg.png")) for index in range(SLICES)])
    assert found.shape == masks.shape
    dice = 2 * (found & masks).sum() / (found.sum() + masks.sum())
    assert metrics["patients"][0]["classes"]["tumour"]["dice"] == pytest.approx(dice)
    arrays = np.load(out / "P13_1.npz")
    assert {name: arrays[name].shape for name in arrays} == {
        "mean": (1, SIDE, SIDE),
        "variance": (SIDE, SIDE),
        "entropy": (SIDE, SIDE),
        "members": (3, SIDE, SIDE),
    }
    table = pd.read_csv(out / "volumes.tsv", sep="\t").set_index("participant_id")
    assert table.loc["P13_1", "volume"] == found[1].sum()
    assert set(table["unit"]) == {"pixels"}


def _saved(folder, content):
    (folder / "before.npz").write_bytes(content)
    return folder / "before.npz"


def test_slices_of_volumes_come_back_as_volumes(ldm, tmp_path):
    """Patients as of BraTS, stored LPS with voxels of 1 x 1 x 2 mm; slices 2 to 5 of 8 are segmented."""
    rng, affine = np.random.default_rng(0), np.diag([-1.0, -1, 2, 1])
    for number in range(4):
        folder = tmp_path / f"brats/BraTS2021_{number:05}"
        folder.mkdir(parents=True)
        for suffix in ("t1", "t1ce", "t2", "flair"):
            volume = nib.Nifti1Image(rng.integers(1, 900, (16, 20, 8)).astype(np.int16), affine)
            nib.save(volume, folder / f"{folder.name}_{suffix}.nii.gz")
        labels = nib.Nifti1Image(rng.choice(np.uint8([0, 1, 2, 4]), (16, 20, 8)), affine)
        nib.save(labels, folder / f"{folder.name}_seg.nii.gz")
    settings = ("data=brats", "data.root=brats", "data.spatial_dims=2", "data.slices={range: [2, 6]}", *SMALL)
    settings = (*settings, "segmenter.network.dropout=0.2", "data.name=brats", "data.shape=[16,32]")
    code, text = ldm("train-segmenter", *settings, "trainer.max_steps=1")
    assert not code, text
    asked = ("segment", *settings, "model=runs/brats/segmenter/model.safetensors", "members=3", "split=all", "out=out")
    code, text = ldm(*asked)
    assert not code, text
    name = "BraTS2021_00002"
    stacked = {part: nib.load(f"out/stacked/{name}_{part}.nii.gz") for part in ("dseg", "members", "mean", "variance")}
    assert [image.shape[3:] for image in stacked.values()] == [(), (3,), (), ()]  # one class
    assert [one.header.get_intent()[0] for one in stacked.values()] == ["label", "label", "none", "none"]
    found = np.asarray(stacked["dseg"].dataobj)
    assert found.any()
    np.testing.assert_allclose(stacked["dseg"].affine, affine)
    assert not found[..., [0, 1, 6, 7]].any()  # not asked for
    for index in range(2, 6):
        picture = np.asarray(PIL.Image.open(f"out/{name}_axial{index:03}_dseg.png"))
        np.testing.assert_array_equal(read(f"out/stacked/{name}_dseg.nii.gz::axial[{index}]").array[0], picture)
    slices = pd.read_csv("out/volumes.tsv", sep="\t")
    table = pd.read_csv("out/stacked/volumes.tsv", sep="\t").set_index("participant_id")
    assert len(table) == 4
    assert set(slices["unit"]) == {"mm3"}
    of_volume = slices["participant_id"].str.startswith(name)
    assert slices[of_volume]["volume"].sum() == pytest.approx(table.loc[name, "volume"], rel=1e-4)
    assert table.loc[name, "volume"] == pytest.approx(2 * (found > 0).sum(), rel=1e-5)  # mm3
    assert table["low"].isna().all()  # members of dropout are drawn slice by slice
    variance = np.asarray(stacked["variance"].dataobj)
    assert np.isnan(variance).all((0, 1)).tolist() == [True, True, False, False, False, False, True, True]
