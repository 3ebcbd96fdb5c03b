"""What the stages promise: whose gradient goes where, what the weights mean, what is counted."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from ldm.errors import LdmError
from ldm.networks.discriminator import Discriminator
from ldm.training.budget import Budget, seconds
from ldm.training.ema import EMA
from ldm.training.fit import check_trainer
from ldm.training.logging import JsonlLogger, read_metrics
from ldm.training.vae import VAE, kl_divergence, psnr

OPTIMIZER = {
    "lr": 1e-3,
    "betas": [0.9, 0.99],
    "weight_decay": 0.0,
    "warmup_steps": 10,
    "schedule": "cosine",
    "clip_norm": 1.0,
    "accumulate": 1,
}
LOSS = {
    "reconstruction": "l1",
    "kl_weight": 0.1,
    "adversarial_weight": 0.5,
    "adversarial_start": 0,
    "adversarial_adaptive": False,
    "perceptual_weight": 0.0,
    "perceptual_weights": None,
    "perceptual_backbone": "resnet10",
}


def vae(**loss):
    torch.manual_seed(0)
    network = {"kind": "autoencoder_kl", "spatial_dims": 2, "in_channels": 1, "channels": [16, 16]}
    discriminator = {"channels": 8, "num_layers_d": 1, "loss": "least_squares", "lr": 1e-4}
    return VAE(network, {**LOSS, **loss}, OPTIMIZER, discriminator, (1, 16, 16))


def test_kl_against_torch_and_its_weight_in_summed_form():
    mean, std = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(mean, std), expected, rtol=1e-4, atol=1e-5)
    # weight x (KL per image element) is summed_kl_weight x (KL summed over the latent, mean over the batch)
    module, x = vae(), torch.rand(2, 1, 16, 16)
    terms = module.loss_terms(x, x, mean, std)
    torch.testing.assert_close(
        module.loss["kl_weight"] * terms["kl"], module.summed_kl_weight * expected.sum((1, 2, 3)).mean()
    )


def test_a_file_says_which_stem_it_has():
    network = {"kind": "autoencoder_kl", "spatial_dims": 3, "in_channels": 1, "channels": [16, 16], "stem": "auto"}
    module = VAE(network, {**LOSS, "adversarial_weight": 0}, OPTIMIZER, {"lr": 1e-4}, (1, 16, 16, 16))
    assert module.config["stem"] == module.network.stem_kind == "space_to_depth"


def test_psnr_of_a_known_error():
    assert psnr(torch.zeros(4), torch.full((4,), 0.1), 1.0) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.zeros(4), torch.full((4,), 0.1), 2.0) == pytest.approx(26.0206, abs=1e-3)


@pytest.mark.parametrize("kind", ["least_squares", "hinge"])
def test_each_adversarial_gradient_stays_where_it_belongs(kind):
    network = Discriminator(2, channels=8, num_layers_d=1, loss=kind)
    fake = torch.rand(2, 1, 16, 16, requires_grad=True)
    network.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    fake.grad = None
    network.discriminator_loss(torch.rand(2, 1, 16, 16), fake).backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_discriminator_learns_to_tell_and_its_raw_score_is_unbounded():
    torch.manual_seed(0)
    network = Discriminator(2, channels=8, num_layers_d=1)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    real, fake = torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16).round()
    for _ in range(60):
        optimizer.zero_grad()
        loss = network.discriminator_loss(real, fake)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert network(fake).min() < 0  # an activation at the output would forbid it


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    module, x = vae(adversarial_adaptive=True), torch.rand(2, 1, 16, 16)
    reconstruction, mean, std = module(x)
    terms = module.loss_terms(x, reconstruction, mean, std)
    norms = module.gradient_norms(terms, module.loss_weights(terms))
    assert norms["adversarial"] == pytest.approx(0.5 * norms["reconstruction"], rel=0.05)


def test_a_perceptual_loss_without_its_file_is_refused():
    with pytest.raises(LdmError, match=r"there is no file nowhere.pth"):
        vae(perceptual_weight=0.1, perceptual_weights="nowhere.pth")


def test_unknown_loss_settings_are_named():
    with pytest.raises(LdmError, match="Did you mean 'kl_weight'"):
        vae(kl_wieght=1)


def test_ema_warms_up_and_its_count_is_state():
    source = nn.Linear(2, 2)
    ema = EMA(source, (0.99, 0.5))
    with torch.no_grad():
        source.weight.add_(1.0)
    start = ema.module.weight.clone()
    ema.update(source)
    rate = 1 - 1 / 10  # (1 + n) / (10 + n) at n = 0
    torch.testing.assert_close(ema.module.weight, start + rate * (source.weight - start))
    other = EMA(nn.Linear(2, 2), (0.99, 0.5))
    other.load_state_dict(ema.state_dict())
    assert int(other.updates) == 1
    for average in (ema, other):
        average.update(source)
    torch.testing.assert_close(other.module.weight, ema.module.weight)
    ema.train()
    assert not ema.averages.training


def test_budget_takes_what_ends_first():
    budget = Budget(100, "01:00")
    budget.load_state_dict({"elapsed": 45.0})
    assert budget.progress(10) == pytest.approx(0.75)
    assert budget.progress(90) == pytest.approx(0.9)
    assert seconds("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    with pytest.raises(LdmError, match="DD:HH:MM:SS"):
        seconds("1h")
    assert seconds(90) == 90
    with pytest.raises(LdmError, match=r"max_time is 216000: YAML takes 1:00:00:00 without quotes"):
        seconds(yaml.safe_load("1:00:00:00"))
    with pytest.raises(LdmError, match="needs an end"):
        Budget(None, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "16-mixed"}, "trainer.precision is '16-mixed'; legal: auto, bf16-mixed, 32-true"),
        ({"val_batches": 0}, "trainer.val_batches is 0; legal: 1 and more"),
        ({"log_every": 0}, "trainer.log_every is 0; legal: 1 and more"),
    ],
)
def test_a_trainer_that_would_train_wrongly_is_refused(setting, message):
    legal = {"max_steps": 1, "max_time": None, "precision": "auto", "val_every": 1, "val_batches": None, "log_every": 1}
    check_trainer(legal)
    with pytest.raises(LdmError, match=message):
        check_trainer({**legal, **setting})


def test_what_is_validated_does_not_depend_on_the_precision_of_training(monkeypatch):
    """An image is like itself, in bfloat16 too."""
    module, x = vae(), 0.7 + 0.02 * torch.rand(2, 1, 16, 16)  # variance next to nothing beside the squared mean
    monkeypatch.setattr(VAE, "trainer", SimpleNamespace(num_val_batches=[1]))
    monkeypatch.setattr(module, "_compressed", lambda batch: x)
    monkeypatch.setattr(module, "forward", lambda image: (image, torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)))
    module.on_validation_epoch_start()
    with torch.autocast("cpu", torch.bfloat16):
        module.validation_step({}, 0)
    assert module.validation["ssim"] == pytest.approx([1, 1], abs=1e-4)


def test_learning_rate_warms_up_and_ends_at_zero():
    module = vae()
    module.budget = Budget(100)
    factors = []
    for step in (0, 9, 50, 100):
        module._step.fill_(step)
        factors.append(module.lr_factor())
    assert factors == pytest.approx([0.1, 0.5 * (1 + math.cos(math.pi * 0.09)), 0.5, 0.0], abs=1e-6)


def test_a_resumed_run_takes_the_learning_rate_that_is_asked_for_now():
    module = vae(adversarial_weight=0.0)
    module.budget = Budget(100)
    weight = next(module.network.parameters())
    module.manual_backward = lambda loss: loss.backward()
    state = None
    for asked in (0.5, 0.25):
        optimizer = module.adamw([weight], asked)
        if state is not None:
            optimizer.load_state_dict(state)
        module.optimizers = lambda optimizer=optimizer: optimizer
        factor = module.lr_factor()
        module.step_optimizers(weight.square().sum(), [module.network])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(asked * factor)
        assert optimizer.param_groups[0]["weight_decay"] == module.settings["weight_decay"]
        module.settings = {**module.settings, "weight_decay": 0.125}
        state = optimizer.state_dict()


def test_a_gradient_that_is_not_finite_is_not_applied():
    module = vae(adversarial_weight=0.0)
    module.budget = Budget(100)
    weight = next(module.network.parameters())
    before = weight.detach().clone()
    module.optimizers = lambda: torch.optim.AdamW(module.network.parameters(), 1.0)
    module.manual_backward = lambda loss: loss.backward()
    module.record_names = lambda rows: [f"sub-{row}" for row in rows]
    loss = (weight - before).abs().sum().sqrt()  # 0, with a slope that is not finite
    module.require_finite(loss.detach(), {}, [3])
    with pytest.raises(LdmError, match=r"gradient of AutoencoderKL is not finite at step 0.*sub-3"):
        module.step_optimizers(loss, [module.network])
    torch.testing.assert_close(weight.detach(), before)


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path):
    JsonlLogger(tmp_path).log_metrics({"loss": 1.0}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"loss": 3.0}, 2)
    logger.log_metrics({"loss": 4.0}, 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == {"loss": [(1, 1.0), (2, 3.0), (3, 4.0)]}


def test_the_perceptual_loss_reads_a_local_file_only(tmp_path):
    from monai.networks.nets import resnet10
    from safetensors.torch import save_file

    from ldm.networks.perceptual import PerceptualLoss

    torch.manual_seed(0)
    peer = resnet10(spatial_dims=2, n_input_channels=1, shortcut_type="B", bias_downsample=False)
    save_file(peer.state_dict(), tmp_path / "resnet10.safetensors")
    module = vae(perceptual_weight=0.1, perceptual_weights=str(tmp_path / "resnet10.safetensors"))
    x = torch.rand(2, 1, 32, 32)
    reconstruction, mean, std = module(x)
    terms = module.loss_terms(x, reconstruction, mean, std)
    assert terms["perceptual"] > 0
    assert float(module.perceptual[0](x, x)) == pytest.approx(0.0, abs=1e-7)
    assert not any("perceptual" in name for name in module.state_dict())
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LdmError, match="does not hold a 3-D resnet18"):
        PerceptualLoss(3, str(tmp_path / "other.safetensors"), "resnet18")
