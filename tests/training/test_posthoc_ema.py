"""Power-function averages, and one of any length from the snapshots of two (Karras et al. 2023)."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm.errors import LdmError
from ldm.model.file import read_header, read_tensors, write_model
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.training.ema import PowerEMA
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.power_profile import WIDEST, coefficients, exponent_of, products, width_of
from ldm.training.snapshots import KIND, PosthocEMA, find_snapshots, reconstruct

STEPS, EVERY, WIDTHS = 300, 15, (0.05, 0.10)


def direct(values, gamma):
    """The mean of values (n, ...) weighted with the profile integrated over each step."""
    edges = np.linspace(0, 1, len(values) + 1) ** (gamma + 1)
    return np.tensordot(np.diff(edges), values, 1)


@pytest.fixture(scope="module")
def walk():
    """Weights that drift and jitter, (STEPS, 5), as a training's do."""
    rng = np.random.default_rng(0)
    drift = np.log1p(np.arange(STEPS))[:, None] * rng.normal(size=5)
    return drift + rng.normal(0, 0.2, (STEPS, 5)) + rng.normal(0, 0.05, (STEPS, 5)).cumsum(0)


@pytest.fixture(scope="module")
def folder(walk, tmp_path_factory):
    """Snapshots of two widths over the walk."""
    folder, module = tmp_path_factory.mktemp("snapshots"), nn.Linear(5, 1, bias=False).double()
    averages = PowerEMA(module, WIDTHS)
    for step, weights in enumerate(walk, 1):
        module.weight.data[:] = torch.from_numpy(weights)
        averages.update(module)
        if step % EVERY == 0:
            for sigma_rel, average in zip(WIDTHS, averages.averages, strict=True):
                tensors = {"weight": average.weight.data}
                write_model(
                    folder / f"{step}-{sigma_rel}.safetensors",
                    tensors,
                    {"kind": KIND, "sigma_rel": sigma_rel, "step": step},
                )
    return folder


def test_widths_and_exponents_belong_together():
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)  # the paper's
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)
    for sigma_rel in (0.01, 0.07, 0.25, WIDEST):
        assert width_of(exponent_of(sigma_rel)) == pytest.approx(sigma_rel)
    gamma, s = exponent_of(0.1), (np.arange(100_000) + 0.5) / 100_000
    profile = (gamma + 1) * s**gamma / len(s)
    mean = (profile * s).sum()
    assert math.sqrt((profile * (s - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(LdmError, match="sigma_rel is 0.3; legal: more than 0, at most 0.2887"):
        exponent_of(0.3)


def test_the_running_average_is_the_weighted_mean(walk, folder):
    for snapshot in find_snapshots(folder):
        expected = direct(walk[: snapshot.step], exponent_of(snapshot.sigma_rel))
        np.testing.assert_allclose(read_tensors(snapshot.path)["weight"][0], expected, rtol=1e-10, atol=1e-12)


def test_the_start_counts_nothing():
    module = nn.Linear(2, 1)
    averages = PowerEMA(module, WIDTHS)
    module.weight.data.fill_(3.0)
    averages.update(module)
    for average in averages.averages:
        assert torch.equal(average.weight, module.weight)


def test_inner_products_are_integrals():
    times, gammas = (10.0, 7.0), (2.0, 0.5)
    s = (np.arange(200_000) + 0.5) / 20_000
    profiles = [(g + 1) * s**g / t ** (g + 1) * (s <= t) for t, g in zip(times, gammas, strict=True)]
    expected = [[(p * q).sum() / 20_000 for q in profiles] for p in profiles]
    np.testing.assert_allclose(products(times, gammas, times, gammas), expected, rtol=1e-4)


@pytest.mark.parametrize("count", [3, 100])
def test_a_stored_average_is_itself(count):
    times = [1000.0 * (i + 1) for i in range(count)] * 2
    gammas = [exponent_of(width) for width in WIDTHS for _ in range(count)]
    for index in (0, count - 1, 2 * count - 1):
        factors, left = coefficients(times, gammas, times[index], gammas[index])
        np.testing.assert_allclose(factors, np.eye(2 * count)[index], atol=1e-4)
        assert left < 1e-6


def test_a_stored_snapshot_comes_back(folder):
    for snapshot in find_snapshots(folder):
        tensors, left = reconstruct(find_snapshots(folder), snapshot.sigma_rel, snapshot.step)
        torch.testing.assert_close(tensors["weight"], read_tensors(snapshot.path)["weight"].float())
        assert left < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
@pytest.mark.parametrize("step", [STEPS, STEPS - 2 * EVERY])
def test_other_lengths_are_near_the_weighted_mean(walk, folder, sigma_rel, step):
    """Far nearer than the stored widths are to it."""
    expected = direct(walk[:step], exponent_of(sigma_rel))
    tensors, left = reconstruct(find_snapshots(folder), sigma_rel, step)
    error = np.linalg.norm(tensors["weight"][0].numpy() - expected)
    stored = min(np.linalg.norm(direct(walk[:step], exponent_of(width)) - expected) for width in WIDTHS)
    assert left < 0.05
    assert error < 0.2 * stored


def test_weights_that_do_not_change_come_out_as_they_are():
    for sigma_rel in (0.02, 0.25):  # beyond the snapshots'
        factors, left = coefficients([50, 100, 50, 100], [17.0, 17.0, 7.0, 7.0], 100, exponent_of(sigma_rel))
        assert factors.sum() == pytest.approx(1)
        assert left > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_rels": [0.05], "every": 0}, "every is 0; legal: a positive number"),
        ({"sigma_rels": [0.05, 0.05], "every": 1}, "one or more different widths"),
        ({"sigma_rels": [0.5]}, "sigma_rel is 0.5"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(LdmError, match=message):
        PosthocEMA(**settings)


@pytest.mark.slow
def test_an_interrupted_run_leaves_the_same_snapshots(ldm, tiny, tmp_path, monkeypatch):
    """Stopped behind the snapshot of step 4, with the state of step 3 on disk; then a length of its own."""
    original, stop = LatentDiffusion.training_step, None

    def training_step(self, batch, batch_index):
        if self.step == stop:
            raise RuntimeError("as if the power had failed")
        original(self, batch, batch_index)

    settings = (*tiny, "trainer.precision=32-true", "trainer.max_steps=7", "trainer.val_every=3")
    on = "ldm.posthoc_ema.every=2"
    code, text = ldm("train-vae", *settings, "trainer.max_steps=1")
    assert "PSNR" in text, text
    monkeypatch.setattr(LatentDiffusion, "training_step", training_step)
    code, text = ldm("train-ldm", *settings, on, "run_dir=whole")
    assert not code, text
    stop = 5
    code, text = ldm("train-ldm", *settings, on, "run_dir=stopped")
    assert code, text
    taken = tmp_path / "stopped/ema_snapshots"
    assert {snapshot.step for snapshot in find_snapshots(taken)} == {2, 4}
    (taken / "step00000004-sigma_rel0.05.safetensors").rename(taken / "step00000099-sigma_rel0.05.safetensors")
    stop = None
    code, text = ldm("train-ldm", *settings, on, "run_dir=stopped")
    assert not code, text
    assert "Going on at step 3" in text
    whole, resumed = (find_snapshots(tmp_path / run / "ema_snapshots") for run in ("whole", "stopped"))
    assert [(one.step, one.sigma_rel) for one in whole] == [(step, width) for step in (2, 4, 6, 7) for width in WIDTHS]
    assert [one.path.name for one in resumed] == [one.path.name for one in whole]
    for one, other in zip(whole, resumed, strict=True):
        assert read_header(one.path)["tensors_sha256"] == read_header(other.path)["tensors_sha256"]

    code, text = ldm("ema", *tiny, "run_dir=whole", "sigma_rel=[0.05,0.08]")
    assert not code, text
    plain, stored, between = (
        LatentDiffusionModel.load(tmp_path / "whole" / f"model{name}.safetensors")
        for name in ("", "-sigma_rel0.05", "-sigma_rel0.08")
    )
    expected = read_tensors(tmp_path / "whole/ema_snapshots/step00000007-sigma_rel0.05.safetensors")
    for name, parameter in stored.network.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=1e-4, atol=1e-6)
    assert between.header["posthoc_ema"]["sigma_rel"] == 0.08
    assert between.header["tensors_sha256"] not in (plain.header["tensors_sha256"], stored.header["tensors_sha256"])
    assert np.isfinite(between.sample(n=1, num_inference_steps=1).images).all()
    code, text = ldm("ema", *tiny, "run_dir=whole", "sigma_rel=0.08", "step=5")
    assert "step is 5; there are snapshots of 2, 4, 6, 7" in text


def test_a_run_without_snapshots_says_how_to_keep_them(ldm, tiny, tmp_path):
    from tests.model.test_transfer import AGE, model

    model([AGE], "concat").save(tmp_path / "run/model.safetensors")
    code, text = ldm("ema", *tiny, "run_dir=run", "sigma_rel=0.08")
    assert code
    assert "ldm.posthoc_ema.every=<steps>" in text
