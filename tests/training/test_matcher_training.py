"""A matcher learns to recognise a scan in another view, and says what it was trained on."""

import math
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from ldm.errors import LdmError
from ldm.model.matcher import Matcher, build_matcher
from ldm.training.logging import read_metrics
from ldm.training.matcher import nt_xent, recognised
from ldm.training.views import Views
from tests.training.test_predictor_training import COMMON, write_table


def test_the_loss_is_that_of_the_paper_but_for_scans_of_one_subject():
    angles = torch.tensor([[0.0, 1.0, 2.0], [0.2, 0.9, 2.5]])
    z = torch.stack([angles.cos(), angles.sin()], -1)  # (2, 3, 2)
    flat, tau = z.flatten(0, 1), 0.5

    def mean_over_views(hide):
        terms = []
        for i in range(6):
            logits = [float(flat[i] @ flat[j]) / tau for j in range(6) if j != i and (i % 3, j % 3) not in hide]
            terms.append(math.log(sum(map(math.exp, logits))) - float(flat[i] @ flat[(i + 3) % 6]) / tau)
        return np.mean(terms)

    assert nt_xent(z, torch.tensor([0, 1, 2]), tau).item() == pytest.approx(mean_over_views(set()), abs=1e-5)
    same = nt_xent(z, torch.tensor([0, 7, 7]), tau).item()
    assert same == pytest.approx(mean_over_views({(1, 2), (2, 1)}), abs=1e-5)
    assert nt_xent(z[:, :1], torch.tensor([0]), tau).item() == 0  # a batch of one has nobody to be told from
    assert recognised(z, torch.tensor([0, 1, 2])) == 1
    assert recognised(z.flip(1)[[0, 0]].roll(1, 0), torch.tensor([0, 1, 2])) == 1
    assert recognised(torch.stack([z[0], z[1].roll(1, 0)]), torch.tensor([0, 1, 2])) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(z, torch.tensor([0, 7, 7]), tau).item() == same


@pytest.mark.parametrize(("shape", "value_range"), [((1, 12, 10), (-1.0, 1.0)), ((2, 8, 10, 6), None)], ids=str)
def test_a_view_is_another_picture_of_the_same_and_repeats_with_its_seed(shape, value_range):
    image, other = torch.rand(shape), torch.rand(shape)
    draw = lambda seed, views: views(image, other, torch.Generator().manual_seed(seed), None, value_range)  # noqa: E731
    one, again, two = (draw(seed, Views()) for seed in (1, 1, 2))
    assert one.shape == image.shape
    assert torch.equal(one, again)
    assert not torch.allclose(one, two, atol=0.05)
    nothing = Views((), **{name: 0 for name in asdict(Views()) if name != "flip_axes"})
    torch.testing.assert_close(draw(1, nothing), image)
    with pytest.raises(LdmError, match="Did you mean 'noise'"):
        Views.from_config({"nois": 0.1})
    with pytest.raises(LdmError, match=r"views.blend: 1.5 must be below 1"):
        Views(blend=1.5)


def write_persons(folder, count=40):
    """Pictures of 16 x 16, a random pattern each, and their table."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pattern = np.kron(rng.uniform(20, 235, (4, 4)), np.ones((4, 4)))
        PIL.Image.fromarray(pattern.astype(np.uint8)).save(folder / f"s{i}.png")
    write_table(folder, ("number",), [(f"s{i}", i) for i in range(count)])


PERSONS = (
    *COMMON,
    "data.spatial_dims=2",
    "data.image='{participant_id}.png'",
    "data.intensity={kind: window, lower: 0, upper: 255}",
    "data.covariates={number: {kind: continuous}}",
    "matcher.network={channels: [16, 32], out_channels: 16}",
    "matcher.batch_size=14",
    "matcher.optimizer={lr: 3e-3, warmup_steps: 2}",
    "matcher.views={rotate: 0, scale: 0, blur: 0.5, bias: 0.1, gamma: 0.2, brightness: 0.1, noise: 0.03, blend: 0.1}",
)


def test_patterns_are_recognised_in_another_view():
    torch.manual_seed(0)
    patterns = torch.rand(16, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)  # (16, 1, 16, 16)
    views, generator = Views(scale=0.03, rotate=3, blur=0.5), torch.Generator().manual_seed(0)
    network = build_matcher({"spatial_dims": 2, "in_channels": 1, "out_channels": 16, "channels": [16, 32]})
    optimizer, subject = torch.optim.AdamW(network.parameters(), 3e-3), torch.arange(16)

    def embedded():
        pairs = [[views(one, one, generator) for one in patterns] for _ in range(2)]
        z = network(torch.stack([torch.stack(images) for images in pairs]).flatten(0, 1))
        return F.normalize(z, dim=1).unflatten(0, (2, 16))  # (2, 16, E)

    before = recognised(embedded(), subject)
    for _ in range(40):
        optimizer.zero_grad()
        nt_xent(embedded(), subject, 0.1).backward()
        optimizer.step()
    after = np.mean([recognised(embedded(), subject) for _ in range(3)])
    assert after > 0.8, (before, after)
    assert before < 0.6


@pytest.mark.slow
def test_training_goes_on_and_says_what_it_was(ldm, tmp_path):
    write_persons(tmp_path / "made")
    for steps in (2, 4):
        code, text = ldm("train-matcher", *PERSONS, f"trainer.max_steps={steps}", "trainer.val_every=2")
        assert not code, text
    assert "Going on at step 2" in text
    run = tmp_path / "runs/made/matcher"
    curves = read_metrics(run / "metrics.jsonl")
    assert [step for step, _ in curves["matcher/val/recognised"]] == [2, 4]
    assert len(curves["matcher/train/loss"]) == 4
    matcher = Matcher.load(run / "model.safetensors")
    assert 0 <= matcher.metrics["matcher/val/recognised"] <= 1
    assert matcher.facts["steps"] == 4
    assert matcher.views["rotate"] == 0
    torch.testing.assert_close(matcher(torch.rand(3, 1, 16, 16)).norm(dim=1), torch.ones(3))
    with pytest.raises(LdmError, match="batches of 2-D images with 1 channels"):
        matcher(torch.rand(1, 1, 4, 4, 4))
    code, text = ldm("train-matcher", *PERSONS, "matcher.views.blend=0.2")
    assert code
    assert "another configuration" in text
    code, text = ldm("train-matcher", *PERSONS, "matcher.batch_size=1", "run_dir=other")
    assert code
    assert "matcher.batch_size is 1" in text


@pytest.mark.slow
def test_a_matcher_may_look_at_means_of_blocks(ldm, tmp_path):
    write_persons(tmp_path / "made")
    code, text = ldm("train-matcher", *PERSONS, "matcher.pool=2", "trainer.max_steps=2", "trainer.val_every=2")
    assert not code, text
    matcher = Matcher.load(tmp_path / "runs/made/matcher/model.safetensors")
    assert matcher.pool == 2
    images = torch.rand(2, 1, 17, 16)  # an odd side too
    swapped = images.unflatten(3, (8, 2)).flip(4).flatten(3)  # other voxels, the same means
    torch.testing.assert_close(matcher(images), matcher(swapped))
    assert (matcher(images) - matcher(images.flip(3))).abs().max() > 1e-4
    code, text = ldm("train-matcher", *PERSONS, "trainer.max_steps=4", "trainer.val_every=2")
    assert code
    assert "another configuration" in text
    code, text = ldm("train-matcher", *PERSONS, "matcher.pool=0", "run_dir=other")
    assert code
    assert "matcher.pool must be a whole number of at least 1" in text
