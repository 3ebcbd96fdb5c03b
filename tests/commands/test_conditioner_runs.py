"""Label maps, captions and other channels as conditions, from the command line to the written samples."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from ldm.model.latent_diffusion import LatentDiffusionModel
from tests.conditioning.bert_folder import bert_tensors, write_bert

pytestmark = pytest.mark.slow

CAPTION = "MRI of a [{age:.0f}-year-old ]{sex:woman|man}[ with {ventricles_mm3<30000:small|large} ventricles]"
TEXT = f"{{caption: '{CAPTION}', dim: 16, num_heads: 2, num_layers: 1, max_tokens: 24}}"
STEPS = ("trainer.max_steps=2", "trainer.val_every=2")
FAST = ("steps=2", "batch_size=2")


def test_covariates_mask_and_text_together(ldm, tiny, tmp_path, cohort_root):
    code, text = ldm("train-vae", *tiny, "trainer.max_steps=1")
    assert not code, text
    conditioners = f"ldm.conditioners={{mask: {{drop_rate: 0.2}}, text: {TEXT}}}"
    code, text = ldm("train-ldm", *tiny, *STEPS, conditioners)
    assert not code, text
    assert "Captions such as: MRI of a" in text
    path = "runs/simulated/ldm/model.safetensors"
    assert set(LatentDiffusionModel.load(path).network.conditioners) == {"covariates", "mask", "text"}

    people = pd.read_csv(cohort_root / "participants.tsv", sep="\t").head(2)
    people[["participant_id", "age"]].to_csv(tmp_path / "asked.tsv", sep="\t", index=False)
    mask = f"mask='{cohort_root}/{{participant_id}}/anat/{{participant_id}}_dseg.nii.gz'"
    asked = (
        "sample",
        *tiny,
        *FAST,
        "covariates=asked.tsv",
        mask,
        "out=drawn",
        "guidance_scale={mask: 2.0, brain_mm3: 1.5}",
    )
    code, text = ldm(*asked, "text='MRI of a 60-year-old man'")
    assert not code, text
    table = pd.read_csv(tmp_path / "drawn/participants.tsv", sep="\t")
    assert table["text"].tolist() == ["MRI of a 60-year-old man"] * 2
    assert table["mask"].str.contains("dseg").all()
    record = json.loads((tmp_path / "drawn/provenance.json").read_text())
    assert len(record["files_sha256"]) == 2
    code, text = ldm(*asked)
    assert code
    assert "results of another request (inputs differ)" in text

    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 9, np.uint8), np.eye(4)), tmp_path / "nine.nii.gz")
    for arguments, message in (
        (("mask=nine.nii.gz",), "label value(s) 9 are unknown; legal: 0 background, 1 csf"),
        (("image=nine.nii.gz",), "not conditioned on 'image'; legal beside covariates: mask, text"),
        (("mask=none.nii.gz",), "There is no file none.nii.gz"),
        ((f"text='{'a ' * 30}'",), "32 tokens"),
    ):
        code, text = ldm("sample", *tiny, *FAST, "n=1", "out=refused", *arguments)
        assert code
        assert message in text, text
    code, text = ldm("evaluate", *tiny, "n=2", "steps=2", "repeats=1")
    assert not code, text


def test_a_text_encoder_that_comes_with_weights(ldm, tiny, tmp_path):
    folder = write_bert(tmp_path / "bert")
    code, text = ldm("train-vae", *tiny, "trainer.max_steps=1")
    assert not code, text
    caption = "a [{age:.0f}-year-old ]{sex:woman|man}"
    train = (
        "train-ldm",
        *tiny,
        f"ldm.conditioners={{text: {{caption: '{caption}', encoder: {folder}, max_tokens: 16}}}}",
    )
    code, text = ldm(*train, *STEPS)
    assert not code, text
    state = torch.load("runs/simulated/ldm/last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if ".text.encoder." in name]
    code, text = ldm(*train, "trainer.max_steps=3", "trainer.val_every=2")
    assert not code, text
    assert "Going on at step 2" in text
    network = LatentDiffusionModel.load("runs/simulated/ldm/model.safetensors").network
    wanted = bert_tensors()
    for name, value in network.conditioners["text"].encoder.state_dict().items():
        assert (value == wanted[name]).all()
    write_bert(folder, bert_tensors(seed=1))
    code, text = ldm(*train, "trainer.max_steps=4")
    assert code
    assert "text_encoder_sha256 is" in text
    (folder / "vocab.txt").unlink()
    code, text = ldm(*train, "trainer.max_steps=4")
    assert code
    assert "there is no" in text
    assert "vocab.txt" in text
    code, text = ldm("sample", *tiny, *FAST, "n=2", "text='a 60-year-old man'", "out=drawn")
    assert not code, text


def test_one_channel_from_another(ldm, tiny, tmp_path, cohort_root):
    scan = "'{participant_id}/anat/{participant_id}_T1w.nii.gz'"
    code, text = ldm("train-vae", *tiny, f"data.image={{T1: {scan}}}", "trainer.max_steps=1")
    assert not code, text
    both = f"data.image={{T1: {scan}, T2: {scan}}}"
    code, text = ldm("train-predictor", *tiny, f"data.image={{T1: {scan}}}", "trainer.max_steps=1")
    assert not code, text
    measured = (both, "data.instrument=[{kind: predictor, path: runs/simulated/predictor/model.safetensors}]")
    code, text = ldm("train-ldm", *tiny, *measured, *STEPS, "ldm.conditioners={image: {channels: [T2]}}")
    assert not code, text
    code, text = ldm("evaluate", *tiny, *measured, *FAST, "n=2", "repeats=0")
    assert not code, text
    metrics = json.loads((tmp_path / "runs/simulated/evaluation/metrics.json").read_text())
    assert metrics["fidelity"]["sex"]["instrument"] == "predictor"
    first = next(cohort_root.glob("sub-*"))
    image = f"image={{T2: '{first}/anat/{first.name}_T1w.nii.gz'}}"
    code, text = ldm("sample", *tiny, *FAST, "n=1", image, "out=drawn")
    assert not code, text
    assert nib.load(tmp_path / "drawn/sub-000001.nii.gz").ndim == 3
    code, text = ldm("train-ldm", *tiny, both, "run_dir=other")
    assert code
    assert "channels: ['T1', 'T2'] now, ['T1'] for the first stage" in text
