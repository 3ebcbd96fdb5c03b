"""What trains whom in a GAN: closed forms of the losses, whose gradient goes where, and one step of each."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from ldm.commands.train_gan import panels, run_identity
from ldm.conditioning.base import COVARIATES
from ldm.errors import LdmError
from ldm.training.budget import Budget
from ldm.training.gan import MODULES, discriminator_loss, generator_loss, gradient_penalty
from tests.model.test_gan_model import gan
from tests.training.test_stages import OPTIMIZER

DISCRIMINATOR = {"channels": [8, 8], "hidden": 8, "norm": "spectral", "lr": 1e-3}
LOSS = {
    "lsgan": {"adversarial_weight": 1.0, "r1_weight": 0.0, "r1_every": 1},
    "vaegan": {
        "adversarial_weight": 0.5,
        "r1_weight": 4.0,
        "r1_every": 1,
        "l1_weight": 2.0,
        "features_weight": 3.0,
        "kl_weight": 0.1,
        "feature_level": 1,
    },
}
BOTH = pytest.mark.parametrize("method", ["lsgan", "vaegan"])


def module(method, spatial_dims=2, loss=None, **options):
    return MODULES[method](gan(method, spatial_dims), OPTIMIZER, DISCRIMINATOR, loss or LOSS[method], 0.9, **options)


def batch(spatial_dims=2, n=4):
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.rand(n, generator=generator), torch.arange(n) % 3.0], dim=1)
    size = (12, 8, 10)[:spatial_dims]
    return {"image": torch.rand(n, 1, *size, generator=generator), "covariates": codes, "index": torch.arange(n)}


def terms_of(made, spatial_dims=2):
    data = batch(spatial_dims)
    streams = torch.Generator().manual_seed(2)
    draws = {name: torch.randn(4, 6, generator=streams) for name in ("z", "posterior")}
    return made.loss_terms(data["image"], {COVARIATES: data["covariates"]}, draws)


def test_least_squares_against_closed_forms():
    real, fake, other = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (2 + 2))
    assert discriminator_loss(real, fake, other).item() == pytest.approx(0.5 * (2 + (2 + 1) / 2))
    assert generator_loss(fake).item() == pytest.approx(0.5 * 1)
    assert discriminator_loss(torch.ones(3), torch.zeros(3)) == generator_loss(torch.ones(3)) == 0


def test_the_gradient_penalty_is_half_the_squared_slope():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    images = torch.rand(5, 1, 2, 2, requires_grad=True)
    penalty = gradient_penalty((weight * images).sum((1, 2, 3)), images)  # slope 5 everywhere
    assert penalty.item() == pytest.approx(12.5)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())  # and it can be trained on


def test_the_penalty_trains_the_discriminator_alone():
    made = module("vaegan")
    terms, scores = terms_of(made)
    assert "r1" not in scores
    torch.testing.assert_close(made.of_discriminator(terms), terms["discriminator"] + 4 * terms["r1"])
    terms["r1"].backward(retain_graph=True)
    assert all(p.grad is None for p in made.network.parameters())
    assert made.discriminator.network.trunk.levels[0].conv.parametrizations.weight.original.grad.abs().sum() > 0
    assert "r1" not in terms_of(module("lsgan"))[0]


def test_real_images_and_fakes_are_compared_in_groups_of_one_size(monkeypatch):
    """A discriminator that sees how much images differ would else tell them apart by the size of a group."""
    made, sizes = module("vaegan"), []
    monkeypatch.setattr(made.discriminator.network.trunk, "forward", spied(made.discriminator.network.trunk, sizes))
    terms_of(made)
    assert set(sizes) == {4}


def spied(trunk, sizes):
    """Its forward pass, which notes how many images it is given."""
    forward = trunk.forward

    def run(x, *arguments):
        sizes.append(len(x))
        return forward(x, *arguments)

    return run


def test_a_penalty_of_every_third_step_counts_three_times():
    """So that over three steps it weighs as much as one at every step."""
    made = module("lsgan", loss={**LOSS["lsgan"], "r1_weight": 4.0, "r1_every": 3})
    penalised = []
    for step in range(7):
        made._step.fill_(step)
        terms, _ = terms_of(made)
        if "r1" in terms:
            penalised.append(step)
            torch.testing.assert_close(made.of_discriminator(terms), terms["discriminator"] + 12 * terms["r1"])
        else:
            assert made.of_discriminator(terms) == terms["discriminator"]
    assert penalised == [0, 3, 6]


@BOTH
def test_each_gradient_stays_where_it_belongs(method):
    made = module(method)
    terms, _ = terms_of(made)
    terms["discriminator"].backward(retain_graph=True)
    assert all(p.grad is None for p in made.network.parameters())
    assert all(p.grad is not None for p in made.discriminator.parameters())
    made.zero_grad(set_to_none=True)
    made.weighted(terms).backward()
    assert all(p.grad is None for p in made.discriminator.parameters())
    missing = [name for name, p in made.network.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad is None for p in made.ema.parameters())


def test_the_encoder_is_not_told_to_fool_the_discriminator():
    made = module("vaegan")
    terms, scores = terms_of(made)
    assert set(scores) == {"real", "reconstruction", "sample"}
    assert [len(score) for score in scores.values()] == [4] * 3
    terms["adversarial"].backward(retain_graph=True)
    assert all(p.grad is None for p in made.network.encoder.parameters())
    assert made.network.generator.start.weight.grad.abs().sum() > 0
    for name in ("l1", "features", "kl"):
        made.zero_grad(set_to_none=True)
        terms[name].backward(retain_graph=True)
        assert made.network.encoder.head.weight.grad.abs().sum() > 0, name
        assert (made.network.generator.start.weight.grad is None) == (name == "kl")


def test_the_terms_of_a_vaegan_are_what_they_are_called():
    made = module("vaegan")
    made.discriminator.eval()  # no power iterations between the two
    terms, _ = terms_of(made)
    data, streams = batch(), torch.Generator().manual_seed(2)
    z, posterior = (torch.randn(4, 6, generator=streams) for _ in range(2))
    condition = {COVARIATES: data["covariates"]}
    embedding = made.network.embed(condition)
    mean, std = made.network.encoder(data["image"], embedding)
    rebuilt = made.network.generator(mean + std * posterior, embedding)
    sample = made.network.generator(z, embedding)
    torch.testing.assert_close(terms["l1"], (rebuilt - data["image"]).abs().mean())
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum() / data["image"].numel()
    torch.testing.assert_close(terms["kl"], kl)
    seen = [made.discriminator.network.trunk(x)[1] for x in (rebuilt, data["image"])]
    torch.testing.assert_close(terms["features"], F.mse_loss(*seen))
    scores = [made.discriminator(x, condition) for x in (data["image"], rebuilt, sample)]
    torch.testing.assert_close(terms["adversarial"], (generator_loss(scores[1]) + generator_loss(scores[2])) / 2)
    torch.testing.assert_close(terms["discriminator"], discriminator_loss(*scores))
    total = 0.5 * terms["adversarial"] + 2 * terms["l1"] + 3 * terms["features"] + 0.1 * terms["kl"]
    torch.testing.assert_close(made.weighted(terms), total)


@BOTH
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_step_moves_both_networks_and_the_average(method, spatial_dims, monkeypatch):
    made = module(method, spatial_dims)
    made.budget = Budget(100)
    optimizers = made.configure_optimizers()
    monkeypatch.setattr(type(made), "trainer", type("T", (), {"world_size": 1, "global_rank": 0, "loggers": []})())
    made.optimizers = lambda: optimizers
    made.manual_backward = lambda loss: loss.backward()
    before = [{name: p.detach().clone() for name, p in one.named_parameters()} for one in networks(made)]
    made.training_step(batch(spatial_dims), 0)
    assert made.step == 1
    for old, network in zip(before, networks(made), strict=True):
        still = [name for name, p in network.named_parameters() if torch.equal(p, old[name])]
        assert not [name for name in still if "null" not in name and "embed" not in name], still
    made.eval()
    made.on_validation_epoch_start()
    made.validation_step(batch(spatial_dims), 0)
    made.on_validation_epoch_end()
    expected = {"gan/val/score/real", "gan/val/score/sample", "gan/val/pooled_kid", "gan/train/loss"}
    expected |= {"gan/val/psnr", "gan/val/kl"} if method == "vaegan" else set()
    assert expected <= set(made.latest)
    assert all(np.isfinite(value) for value in made.latest.values())
    assert len(made.validation["panels"]) == (4 if method == "vaegan" else 0)


def test_a_run_goes_on_with_other_learning_rates_and_not_with_another_loss_or_network():
    asked = {**gan("lsgan").header, "loss": LOSS["lsgan"], "ema_decay": 0.9, "split_sha256": "0" * 64}
    made = gan("lsgan")
    made.header = asked
    before = run_identity(made, DISCRIMINATOR)
    assert run_identity(made, {**DISCRIMINATOR, "lr": 9.0}) == before
    assert run_identity(made, {**DISCRIMINATOR, "hidden": 9}) != before
    made.header = {**asked, "loss": {**LOSS["lsgan"], "r1_weight": 1.0}}
    assert run_identity(made, DISCRIMINATOR) != before


def test_panels_show_subjects_from_all_over_a_sorted_table():
    valid = [SimpleNamespace(covariates={"kind": kind}) for kind in "aaabbbccc"]
    datamodule = SimpleNamespace(cohort=SimpleNamespace(split=lambda _: valid), preprocessing=None, schema=None)
    config = OmegaConf.create({"run_dir": "run", "gan": {"val_samples": 3}, "data": {}})
    (panel,) = panels(config, datamodule, gan("lsgan"))
    assert [row["kind"] for row in panel.rows] == ["a", "b", "c"]


def networks(made):
    return made.network, made.discriminator, made.model.network


def test_a_loss_that_is_not_finite_is_named(monkeypatch):
    made, data = module("lsgan"), batch()
    monkeypatch.setattr(type(made), "trainer", type("T", (), {"world_size": 1, "global_rank": 0})())
    data["image"][1] = torch.nan
    said = r"not finite at step 0: adversarial .*, discriminator nan. Records.*0, 1, 2, 3"
    with pytest.raises(LdmError, match=said):
        made.training_step(data, 0)


def test_settings_that_are_not_legal_are_named():
    with pytest.raises(LdmError, match="gan.loss.l1_weigth is not a setting. Did you mean 'l1_weight'"):
        module("vaegan", loss={**LOSS["vaegan"], "l1_weigth": 1.0})
    with pytest.raises(LdmError, match="gan.loss.l1_weight is not a setting"):
        module("lsgan", loss={**LOSS["lsgan"], "l1_weight": 1.0})
    with pytest.raises(LdmError, match="gan.loss.r1_every must be a whole number of at least 1, got 0"):
        module("lsgan", loss={**LOSS["lsgan"], "r1_every": 0})
    with pytest.raises(LdmError, match="feature_level is 2; the discriminator has levels 0 to 1"):
        module("vaegan", loss={**LOSS["vaegan"], "feature_level": 2})
