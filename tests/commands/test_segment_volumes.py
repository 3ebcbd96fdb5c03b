"""Segmentation by diffusion of volumes, from training to the written ensemble, through the command line."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from ldm.model.latent_diffusion import LatentDiffusionModel

pytestmark = pytest.mark.slow

SCAN = "{participant_id}/anat/{participant_id}_T1w.nii.gz"
MODEL = "runs/simulated/ldm/model.safetensors"
FAST = ("members=2", "steps=2", "trainer=cpu")


def test_volumes(ldm, tiny, tmp_path, cohort_root):
    tiny = [item for item in tiny if not item.startswith(("vae.", "ldm.condition."))]
    image = f"data.image={{T1: '{SCAN}', T2: '{SCAN}'}}"
    tiny = [*tiny, image, "vae=identity", "ldm=segmentation", "ldm.val_members=2"]
    code, text = ldm("train-ldm", *tiny, "trainer.max_steps=2", "trainer.val_every=2")
    assert not code, text
    model = LatentDiffusionModel.load(MODEL)
    assert model.preprocessing.channels == model.classes.names == ("csf", "grey_matter", "white_matter", "ventricles")
    assert model.latent_space.mean.tolist() == [0] * 4
    assert model.latent_space.std.tolist() == [1] * 4
    assert model.network.conditioners["image"].images == ("T1", "T2")
    assert model.defaults.options == {"clip": [-1, 1]}
    assert model.unlearned == ["image"]  # though covariates, which it is not given, would be hidden
    records = [json.loads(line) for line in (tmp_path / "runs/simulated/ldm/metrics.jsonl").read_text().splitlines()]
    assert any("ldm/val/dice/ventricles" in record for record in records)
    assert list((tmp_path / "runs/simulated/ldm/figures").glob("segmentation_*.png"))

    person = next(cohort_root.glob("sub-*"))
    scan = person / "anat" / f"{person.name}_T1w.nii.gz"
    both = f"images={{T1: '{scan}', T2: '{scan}'}}"
    code, text = ldm("segment", f"model={MODEL}", both, "out=found", *FAST)
    assert not code, text
    stored, written = nib.load(scan), {p.name: nib.load(p) for p in (tmp_path / "found").glob("*.nii.gz")}
    shapes = {name.removeprefix("sub-000001_").removesuffix(".nii.gz"): x.shape for name, x in written.items()}
    assert shapes == {
        "dseg": stored.shape,
        "variance": stored.shape,
        "entropy": stored.shape,
        "mean": (*stored.shape, 4),
        "members": (*stored.shape, 2),
    }
    assert all(np.allclose(one.affine, stored.affine) for one in written.values())
    labels = [name for name, one in written.items() if one.header.get_intent()[0] == "label"]
    assert sorted(labels) == ["sub-000001_dseg.nii.gz", "sub-000001_members.nii.gz"]
    dseg = np.asarray(written["sub-000001_dseg.nii.gz"].dataobj)
    table = pd.read_csv(tmp_path / "found/volumes.tsv", sep="\t")
    assert table["class"].tolist() == list(model.classes.names)
    assert table["volume"].tolist() == pytest.approx([float((dseg == v).sum()) * 8**3 for v in (1, 2, 3, 4)], rel=1e-4)
    assert (table["low"] <= table["high"]).all()
    assert (tmp_path / "found/panel.png").is_file()

    code, text = ldm("segment", f"model={MODEL}", both, "out=found", "members=3", "steps=2", "trainer=cpu")
    assert code
    assert "results of another request (members differ)" in text
    code, text = ldm("segment", f"model={MODEL}", f"images={{T1: '{scan}'}}", "out=refused", *FAST)
    assert code
    assert "'sub-000001' lacks T2; this model is given T1, T2, all of them" in text
    labels = scan.with_name(f"{person.name}_dseg.nii.gz")
    seg = np.asarray(nib.load(labels).dataobj).astype(np.uint8)
    nib.save(nib.Nifti1Image(seg + 7 * (seg == 4).astype(np.uint8), stored.affine), tmp_path / "strange.nii.gz")
    nib.save(nib.Nifti1Image(seg[:-2], stored.affine), tmp_path / "small.nii.gz")
    for truth, message in (
        ("strange", "label value(s) 11 are unknown; legal: 0 background, 1 csf"),
        ("small", "one grid"),
    ):
        code, text = ldm("segment", f"model={MODEL}", both, f"labels={truth}.nii.gz", "evaluate=true", "out=no", *FAST)
        assert code
        assert message in text, text
    code, text = ldm("evaluate", *tiny, "n=2")
    assert code
    assert "ldm segment evaluate=true" in text


def test_label_maps_are_generated_in_the_latents_of_a_first_stage_of_masks(ldm, tiny, tmp_path, cohort_root):
    tiny = [item for item in tiny if not item.startswith("ldm.condition.")]
    tiny = [*tiny, "ldm=segmentation", "ldm.val_members=2", "trainer.max_steps=2", "trainer.val_every=2"]
    for verb in ("train-vae", "train-ldm"):
        code, text = ldm(verb, *tiny)
        assert not code, text
    model = LatentDiffusionModel.load(MODEL)
    assert model.header["first_stage"]["in_channels"] == len(model.classes.names) == 4
    assert model.preprocessing.value_range == (-1.0, 1.0)
    assert "clip" not in (model.defaults.options or {})  # latents go beyond the range of masks
    assert tuple(model.latent_shape[1:]) != tuple(model.preprocessing.shape)
    scan = next(cohort_root.glob("sub-*/anat/*_T1w.nii.gz"))
    code, text = ldm("segment", f"model={MODEL}", f"images={scan}", "out=found", *FAST)
    assert not code, text
    dseg = nib.load("found/sub-000001_dseg.nii.gz")
    assert dseg.shape == nib.load(scan).shape
    assert set(np.unique(np.asarray(dseg.dataobj))) <= set(range(5))
    code, text = ldm("train-ldm", *tiny, "ldm=covariates", "run_dir=other")
    assert code
    assert "prepared otherwise" in text
