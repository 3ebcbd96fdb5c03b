"""Presets of published models: they compose, have the published sizes, and take a training step.

Everything happens on the meta device, where tensors have a shape and no memory: two of the networks would not fit
otherwise. Loss and optimizer are those of the training modules.
"""

import json
from pathlib import Path

import pytest
import torch

from ldm.commands.run import plain
from tests.commands.meta import composed, step_of_first_stage, step_of_second_stage, untrained

MANIFEST = Path(__file__).parents[1] / "model" / "brain_160_manifest.json"
CLASSES = "+data.covariates.class.levels=[cat,dog,horse]"

#: experiment and further overrides -> image channels, latent shape, million parameters of the U-Net
PRESETS = {
    ("ldm_256/unconditional",): (3, (3, 64, 64), 274.06),
    ("ldm_256/class_conditional", CLASSES): (3, (3, 64, 64), 414.71),  # with cross-attention
    ("ldm_256/mask_conditional", "+data.label_names.sky=1", "+data.label_names.sea=[2,3]"): (3, (3, 64, 64), 215.23),
    ("ldm_256/text_conditional", CLASSES): (3, (4, 32, 32), 872.30),
    ("brain_160/released",): (1, (3, 20, 28, 20), 553.17),
}


@pytest.fixture(scope="module", params=PRESETS, ids=lambda preset: preset[0])
def preset(request, tmp_path_factory):
    """Configuration, image shape, and an untrained model on the meta device."""
    experiment, *overrides = request.param
    if experiment == "ldm_256/text_conditional":
        overrides.append(f"ldm.conditioners.text.vocabulary={vocabulary(tmp_path_factory.mktemp('bert'))}")
    config = composed(experiment, *overrides)
    model, image_shape = untrained(config, PRESETS[request.param][0])
    return config, image_shape, model, PRESETS[request.param]


def vocabulary(folder):
    """A file with as many tokens as BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "picture", "of", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words + [f"word{i}" for i in range(len(words), 30522)]))
    return folder / "vocab.txt"


def millions(network):
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def test_the_sizes_are_the_published_ones(preset):
    _, _, model, (_, latent_shape, parameters) = preset
    assert model.latent_shape == latent_shape
    assert millions(model.network.denoiser) == pytest.approx(parameters, abs=0.005)


def test_the_second_stage_takes_a_step(preset, no_autocast, monkeypatch):
    config, _, model, _ = preset
    losses, module = step_of_second_stage(config, model, monkeypatch)
    assert losses.shape == (2,)
    assert all(parameter.grad is not None for parameter in module.network.parameters())


def test_the_first_stage_takes_a_step(preset, no_autocast):
    config, image_shape, _, _ = preset
    reconstruction, terms, module = step_of_first_stage(config, image_shape)
    assert reconstruction.shape == (1, *image_shape)
    assert set(terms) == {"reconstruction", "kl", "adversarial", "discriminator"}
    for trained in (module.network, module.discriminator):
        assert all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize("preset", [("ldm_256/unconditional",)], indirect=True)
def test_the_table_of_the_published_model_is_what_is_configured(preset):
    config, _, model, _ = preset
    ldm = plain(config.ldm)
    channels = [224 * factor for factor in (1, 2, 3, 4)]
    assert ldm["network"]["channels"] == ldm["network"]["num_head_channels"] == channels  # one head a level
    assert ldm["network"]["attention_levels"] == [False, True, True, True]
    assert (ldm["optimizer"]["lr"], ldm["batch_size"], ldm["max_steps"]) == (9.6e-5, 48, 410_000)
    assert (model.schedule.num_train_timesteps, model.prediction_type) == (1000, "epsilon")
    betas = (model.schedule.beta_schedule, model.schedule.beta_start, model.schedule.beta_end)
    assert betas == ("scaled_linear", 0.0015, 0.0195)
    assert model.latent_shape == (3, 64, 64)


@pytest.mark.parametrize("preset", [("ldm_256/text_conditional", CLASSES)], indirect=True)
def test_the_text_model_has_the_published_parameters(preset):
    """1.45 B: U-Net, text encoder and, which ours is not trained with, the encoder's layer that guesses words."""
    _, _, model, _ = preset
    text = model.network.conditioners["text"]
    guesses = 1280 * 30522 + 30522
    assert millions(text.encoder) == pytest.approx(542.90, abs=0.005)
    assert millions(text.encoder) + guesses / 1e6 == pytest.approx(582, abs=0.5)
    assert millions(model.network) == pytest.approx(1416.84, abs=0.005)
    assert millions(model.network) + guesses / 1e6 == pytest.approx(1450, abs=10)
    words = text.encode(None, {"class": "cat"}, ())
    assert words[:8].tolist() == [2, 4, 5, 6, 4, 7, 3, 0]  # [CLS] a picture of a cat [SEP] [PAD]
    assert len(words) == 77


@pytest.mark.parametrize("preset", [("brain_160/released",)], indirect=True)
def test_the_brain_model_has_the_released_parameters(preset):
    """Every name and shape of MONAI's own classes, and no other."""
    manifest = json.loads(MANIFEST.read_text())
    _, _, model, _ = preset
    for name, network in {"autoencoder": model.first_stage, "diffusion": model.network.denoiser.unet}.items():
        assert {key: list(value.shape) for key, value in network.state_dict().items()} == manifest[name]
    assert millions(model.first_stage) == pytest.approx(13.77, abs=0.005)


@pytest.mark.parametrize("preset", [("brain_160/released",)], indirect=True)
def test_the_brain_model_is_told_the_released_codes(preset):
    """Order and ranges of the released model: sex (male is 1), age, ventricles, brain; planes and context alike."""
    from ldm.conditioning.covariates import build_conditioner

    config, _, model, _ = preset
    conditioner = build_conditioner([2, 0, 0, 0], plain(config.ldm.condition), 1)
    low = {"sex": "F", "age": 44, "ventricles_mm3": 6995.68, "brain_normalised_mm3": 1144240}
    high = {"sex": "M", "age": 82, "ventricles_mm3": 171375, "brain_normalised_mm3": 1793910}
    middle = {"sex": "M", "age": 63, "ventricles_mm3": 6995.68, "brain_normalised_mm3": 1793910}
    condition = conditioner(torch.from_numpy(model.schema.encode_table([low, high, middle])))
    expected = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [1, 0.5, 0, 1]])
    torch.testing.assert_close(condition.planes, expected)
    torch.testing.assert_close(condition.context, expected[:, None])
