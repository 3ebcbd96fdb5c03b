"""A predictor learns what is plainly to be seen, with what is missing left out of the loss."""

import math

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from ldm.data.schema import Covariate, CovariateSchema
from ldm.model.predictor import Predictor, Targets
from ldm.training.logging import read_metrics
from ldm.training.predictor import agreement, losses

SCHEMA = CovariateSchema(
    [Covariate("sex", "categorical", levels=("F", "M")), Covariate("age", "continuous", "years", (0.0, 100.0))]
)
TARGETS = Targets(SCHEMA, {"age": (50.0, 10.0)})
ROWS = [{"sex": "M", "age": 70.0}, {"sex": None, "age": 45.0}, {"sex": "F", "age": None}]


def test_losses_are_means_over_what_is_known():
    outputs = torch.tensor([[0.0, math.log(3.0), 1.5], [9.0, -9.0, 0.5], [0.0, 0.0, 9.0]], requires_grad=True)
    terms = losses(TARGETS, outputs, torch.from_numpy(SCHEMA.encode_table(ROWS)))
    assert terms["sex"].item() == pytest.approx((-math.log(0.75) + math.log(2)) / 2)
    assert terms["age"].item() == pytest.approx((0.5 * 0.5**2 + 1.0 - 0.5) / 2)  # errors of 0.5 and of 1
    sum(terms.values()).backward()
    assert outputs.grad[1, :2].tolist() == [0, 0]
    assert outputs.grad[2, 2] == 0
    nobody = losses(TARGETS, outputs, torch.full((3, 2), torch.nan))
    assert {name: term.item() for name, term in nobody.items()} == {"sex": 0, "age": 0}


def test_agreement_is_in_the_unit_and_over_what_is_known():
    outputs = torch.tensor([[0.0, 1.0, 1.5], [9.0, -9.0, 0.5], [0.0, 1.0, 9.0]])
    codes = torch.from_numpy(SCHEMA.encode_table(ROWS))
    assert agreement(TARGETS, outputs, codes) == {"accuracy/sex": 0.5, "mae/age": pytest.approx(7.5)}
    codes[2, 1] = 0.8  # 80 years, 3 standard deviations up
    found = agreement(TARGETS, outputs, codes)
    assert found["r/age"] == pytest.approx(np.corrcoef([1.5, 0.5, 9.0], [2.0, -0.5, 3.0])[0, 1])


COMMON = (
    "data=nifti",
    "data.name=made",
    "data.root=made",
    "data.num_workers=0",
    "data.split.fractions={train: 0.7, valid: 0.3, test: 0}",
    "vae.network.channels=[16,16]",
    "ldm.network.channels=[16,32]",
    "trainer=cpu",
    "trainer.log_every=1",
    "predictor.network.channels=[8,16]",
    "predictor.optimizer.warmup_steps=2",
)


def write_table(folder, columns, rows):
    lines = ["\t".join(map(str, row)) for row in [("participant_id", *columns), *rows]]
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_two_kinds_of_pictures_are_told_apart(ldm, tmp_path):
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "made").mkdir()
    for i in range(40):
        picture, half = rng.normal(20, 10, (16, 16)), 2 + 3 * (i % 2)
        picture[8 - half : 8 + half, 8 - half : 8 + half] += 180
        PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / f"made/s{i}.png")
        rows.append((f"s{i}", ["small", "large", "n/a"][i % 2 if i % 8 < 6 else 2], i))
    write_table(tmp_path / "made", ("kind", "number"), rows)
    settings = (
        *COMMON,
        "data.spatial_dims=2",
        "data.image='{participant_id}.png'",
        "data.intensity={kind: window, lower: 0, upper: 255}",
        "data.covariates={kind: {kind: categorical}, number: {kind: continuous}}",
        "data.augment={flip_axes: [0, 1], brightness: 0.1}",
        "predictor.batch_size=8",
        "predictor.optimizer.lr=3e-3",
        "predictor.targets=[kind]",
    )
    code, text = ldm("train-predictor", *settings, "trainer.max_steps=20", "trainer.val_every=20")
    assert not code, text
    code, text = ldm("train-predictor", *settings, "trainer.max_steps=40", "trainer.val_every=20")
    assert not code, text
    assert "Going on at step 20" in text
    assert "accuracy/kind 1" in text
    run = tmp_path / "runs/made/predictor"
    curves = read_metrics(run / "metrics.jsonl")
    assert [step for step, _ in curves["predictor/val/accuracy/kind"]] == [20, 40]
    assert curves["predictor/train/loss"][-1][1] < 0.2 * curves["predictor/train/loss"][0][1]
    predictor = Predictor.load(run / "model.safetensors")
    assert predictor.targets.schema.names == ("kind",)
    assert predictor.metrics["predictor/val/accuracy/kind"] == 1
    assert predictor.facts["steps"] == 40
    code, text = ldm("train-predictor", *settings, "predictor.targets=[kidn]", "run_dir=other")
    assert code
    assert "no covariate 'kidn'. Did you mean 'kind'?" in text
    code, text = ldm("train-predictor", *settings, "predictor.targets=[number]")
    assert code
    assert "another configuration" in text


@pytest.mark.slow
def test_a_volume_is_read_from_two_channels_in_3d(ldm, tmp_path):
    """The augmentation scales the anatomy by up to a third of its volume; the covariate has to follow."""
    rng, rows = np.random.default_rng(0), []
    grid = np.stack(np.mgrid[:16, :16, :16]) - 7.5
    (tmp_path / "made").mkdir()
    for i in range(40):
        radius, centre = 3 + i / 10, rng.uniform(-0.5, 0.5, (3, 1, 1, 1))
        ball = 100 / (1 + np.exp(2 * (np.linalg.norm(grid - centre, axis=0) - radius)))
        for name, image in (("T1", ball), ("T2", 100 - ball)):
            noisy = nib.Nifti1Image((image + rng.normal(0, 3, ball.shape)).astype(np.float32), np.diag([2, 2, 2, 1]))
            nib.save(noisy, tmp_path / f"made/s{i}_{name}.nii.gz")
        rows.append((f"s{i}", round(4 / 3 * np.pi * (2 * radius) ** 3) if i % 5 else "n/a"))
    write_table(tmp_path / "made", ("ball",), rows)
    code, text = ldm(
        "train-predictor",
        *COMMON,
        "data.image={T1: '{participant_id}_T1.nii.gz', T2: '{participant_id}_T2.nii.gz'}",
        "data.covariates={ball: {kind: continuous, unit: mm3, scales_with: volume}}",
        "data.augment={scale: 0.1}",
        "predictor.batch_size=4",
        "trainer.max_steps=80",
        "trainer.val_every=80",
    )
    assert not code, text
    predictor = Predictor.load(tmp_path / "runs/made/predictor/model.safetensors")
    assert predictor.config["in_channels"] == 2
    assert predictor.metrics["predictor/val/r/ball"] > 0.9
    assert predictor.metrics["predictor/val/mae/ball"] < 0.5 * predictor.targets.moments["ball"][1]
