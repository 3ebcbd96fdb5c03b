"""Inception-v3 and DINOv2 as feature networks: the networks, what becomes of an image, and files that are hostile."""

import json
import pickle
import sys
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.features import check_features, extract, find_features
from ldm.evaluation.picture_features import IMAGENET_MEAN, IMAGENET_STD, PLANES, PictureFeatures
from ldm.networks.inception import Inception

GREY = Preprocessing(2, None, intensity=IntensityRecipe("window", 0, 255), channels=("image",))
RGB = replace(GREY, channels=("red", "green", "blue"))
VOLUMES = Preprocessing(3, channels=("T1w", "FLAIR"))


def photograph(height, width):
    """(3, H, W) uint8, the same every time: waves of several lengths."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3 + y / 7), np.cos(x * y / 60), np.sin(y / 2) * np.cos(x / 5)]
    return torch.from_numpy(np.rint(127.5 + 127.5 * np.stack(waves)).astype(np.uint8))


def model_range(pictures, low=0.0, high=1.0):
    return pictures.float() / 255 * (high - low) + low


# inception ----------------------------------------------------------------------------------------------


def inception_weights():
    """A state dict like that of the published file, with weights of its own that keep activations alive."""
    rng, tensors = np.random.default_rng(0), {}
    for name, own in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = own
        elif name.endswith(("running_var", "bn.weight")):
            tensors[name] = torch.from_numpy(rng.uniform(0.5, 2, own.shape)).float()
        elif own.ndim == 1:
            tensors[name] = torch.from_numpy(0.1 * rng.standard_normal(own.shape)).float()
        else:
            deviation = np.sqrt(2 / np.prod(own.shape[1:]))
            tensors[name] = torch.from_numpy(deviation * rng.standard_normal(own.shape)).float()
    return {**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(inception_weights(), path)
    return path


def test_inception_gives_the_features_of_torch_fidelity(inception_file):
    network = find_features({"kind": "inception", "path": str(inception_file)}, preprocessing=RGB)
    features = network(model_range(photograph(40, 56))[None])
    assert features.shape == (1, 2048)
    # Of FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these weights and this picture, on a CPU.
    expected = torch.tensor([553.1116, 926.5883, 1240.4479, 26.63296, 1947.3329, 999.1880])
    torch.testing.assert_close(features[0, ::400], expected, rtol=2e-4, atol=0)
    identity = network.identity
    assert {name: identity[name] for name in ("name", "kind", "spatial_dims", "shown", "resize", "planes")} == {
        "name": str(inception_file),
        "kind": "inception",
        "spatial_dims": 2,
        "shown": "0 to 1 as 0 to 255, rounded; red, green and blue",
        "resize": "299 x 299, bilinear as in TensorFlow 1",
        "planes": "the picture itself",
    }
    assert len(identity["sha256"]) == 64
    assert json.loads(json.dumps(identity)) == identity
    check_features(network, RGB, "test", "ours")


def test_inception_does_without_the_classifier_and_not_without_a_layer(tmp_path):
    weights = inception_weights()
    plain = {name: x for name, x in weights.items() if not name.startswith("fc.") and "num_batches" not in name}
    torch.save(plain, tmp_path / "plain.pth")
    find_features({"kind": "inception", "path": tmp_path / "plain.pth"}, preprocessing=GREY)
    del plain["Mixed_7c.branch1x1.conv.weight"]
    torch.save(plain, tmp_path / "cut.pth")
    with pytest.raises(LdmError, match="is not the Inception-v3.*\\n.*missing: Mixed_7c.branch1x1.conv.weight"):
        find_features({"kind": "inception", "path": tmp_path / "cut.pth"}, preprocessing=GREY)


# dinov2 -------------------------------------------------------------------------------------------------


@pytest.fixture
def dinov2_folder(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, layerscale_value=0.5
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_dinov2_gives_the_class_token_of_transformers(dinov2_folder):
    recipe = replace(RGB, intensity=IntensityRecipe("window", 0, 255, (-1.0, 1.0)))
    network = find_features({"kind": "dinov2", "path": dinov2_folder}, preprocessing=recipe)
    picture = photograph(300, 250)
    features = network(model_range(picture, -1, 1)[None])
    resized = [PIL.Image.fromarray(x).resize((224, 224), PIL.Image.BICUBIC) for x in picture.float().numpy()]
    x = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).clamp(0, 255) / 255
    x = (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=x[None]).pooler_output
    torch.testing.assert_close(features, expected, atol=2e-4, rtol=1e-4)
    assert network.identity["kind"] == "dinov2"
    assert network.identity["resize"] == "224 x 224, bicubic with antialiasing"


@pytest.mark.parametrize("recipe", [GREY, VOLUMES], ids=["pictures", "volumes"])
def test_an_image_has_the_same_features_whatever_is_in_its_batch(dinov2_folder, recipe):
    network = find_features({"kind": "dinov2", "path": dinov2_folder}, preprocessing=recipe)
    check_features(network, recipe, "test", "ours")
    shape = (len(recipe.channels), *[12, 10, 8][: recipe.spatial_dims])
    stack = list(np.random.default_rng(0).random((5, *shape), np.float32))
    together, alone = extract(network, stack, batch_size=4), extract(network, stack[::-1], batch_size=1)[::-1]
    assert together.shape == (5, 24 * len(recipe.channels))
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together.std(0).max() > 1e-3


def test_what_is_no_dinov2_is_named(dinov2_folder, monkeypatch):
    config = {"kind": "dinov2", "path": dinov2_folder}
    written = json.loads((dinov2_folder / "config.json").read_text())
    (dinov2_folder / "config.json").write_text(json.dumps(written | {"num_hidden_layers": 3}))
    with pytest.raises(LdmError, match="model.safetensors lacks: .*layer.2"):
        find_features(config, preprocessing=GREY)
    more = Dinov2Config(**{**written, "num_hidden_layers": written["num_hidden_layers"] + 1})
    Dinov2Model(more).save_pretrained(dinov2_folder / "more")
    (dinov2_folder / "more/config.json").write_text(json.dumps(written))
    with pytest.raises(LdmError, match="has, unlike its config.json: encoder.layer"):
        find_features({**config, "path": dinov2_folder / "more"}, preprocessing=GREY)
    (dinov2_folder / "config.json").write_text(json.dumps(written | {"hidden_size": 48}))
    with pytest.raises(LdmError, match="cannot be read as a DINOv2"):
        find_features(config, preprocessing=GREY)
    (dinov2_folder / "config.json").write_text(json.dumps(written | {"model_type": "vit"}))
    with pytest.raises(LdmError, match="config.json describes 'vit'; legal: a dinov2"):
        find_features(config, preprocessing=GREY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LdmError, match="pip install -e '.\\[features\\]'"):
        find_features(config, preprocessing=GREY)


# what becomes of an image -------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Mean, smallest and largest value of a picture, to tell which it was."""

    kind, resize, trained_on = "brightness", "none", "nothing"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        assert pictures.shape[1] == 3
        x = self.scale * pictures.float().flatten(1)
        return torch.stack([x.mean(1), x.amin(1), x.amax(1)], 1)


def test_a_volume_is_the_mean_of_three_slices_across_each_axis_and_channels_stand_side_by_side():
    network = PictureFeatures(Brightness(), "none", VOLUMES)
    stored = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 12, 4))  # (B, C, D, H, W)
    x = np.moveaxis(stored, (2, 3, 4), (0, 1, 2))  # (D, H, W, B, C)
    slices = [*x[[2, 4, 6]], *np.moveaxis(x, 1, 0)[[3, 6, 9]], *np.moveaxis(x, 2, 0)[[1, 2, 3]]]
    expected = np.mean([[s.mean((0, 1)), s.min((0, 1)), s.max((0, 1))] for s in slices], 0)  # (F, B, C)
    features = network(model_range(torch.from_numpy(stored)))
    np.testing.assert_allclose(features, np.moveaxis(expected, 0, 2).reshape(2, -1), rtol=1e-5)
    assert network.identity["planes"] == PLANES
    assert network.identity["spatial_dims"] == 3


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (IntensityRecipe("percentile", range=(-1.0, 1.0)), (-1, 1)),
        (IntensityRecipe("zscore", -2, 4), (-2, 4)),
    ],
)
def test_the_range_of_the_recipe_is_shown_from_black_to_white(recipe, expected):
    low, high = expected
    network = PictureFeatures(Brightness(), "none", replace(GREY, intensity=recipe))
    image = torch.tensor([low - 1, low, high, high + 1], dtype=torch.float32).view(1, 1, 2, 2)
    assert network(image).tolist() == [[127.5, 0, 255]]
    assert f"{low:g} to {high:g} as 0 to 255" in network.identity["shown"]


# files --------------------------------------------------------------------------------------------------


class Hostile:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_hostile_file_is_refused_and_not_executed(tmp_path, dinov2_folder, save):
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    content = {"Conv2d_1a_3x3.conv.weight": Hostile(trace)}
    torch.save(content, path) if save == "torch" else path.write_bytes(pickle.dumps(content))
    (dinov2_folder / "model.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(LdmError, match="is not a file of plain tensors"):
        find_features({"kind": "inception", "path": path}, preprocessing=GREY)
    with pytest.raises(LdmError, match="cannot be read as a DINOv2"):
        find_features({"kind": "dinov2", "path": dinov2_folder}, preprocessing=GREY)
    assert not trace.exists()


def test_a_configuration_cannot_name_other_files_or_code(tmp_path, dinov2_folder):
    trace, path = tmp_path / "trace", dinov2_folder / "config.json"
    torch.save({"embeddings.cls_token": Hostile(trace)}, dinov2_folder / "pytorch_model.bin")
    (dinov2_folder / "trap.py").write_text(f"open({str(trace)!r}, 'w')\n")
    elsewhere = {"auto_map": {"AutoModel": "trap.Trap"}, "transformers_weights": "pytorch_model.bin"}
    path.write_text(json.dumps(json.loads(path.read_text()) | elsewhere | {"attn_implementation": "owner/kernel"}))
    assert find_features({"kind": "dinov2", "path": dinov2_folder}, preprocessing=GREY) is not None
    assert not trace.exists()


def test_weights_that_are_not_there_are_no_error(tmp_path, dinov2_folder, caplog):
    assert find_features({"kind": "inception", "path": tmp_path / "none.pth"}, preprocessing=GREY) is None
    assert "pt_inception-2015-12-05-6726825d.pth" in caplog.text
    (dinov2_folder / "model.safetensors").unlink()
    assert find_features({"kind": "dinov2", "path": dinov2_folder}, preprocessing=GREY) is None
    assert "Download config.json and model.safetensors of a DINOv2" in caplog.text


def test_two_folders_need_a_network_that_knows_how_files_become_images(dinov2_folder):
    with pytest.raises(LdmError, match="'dinov2' does not say how files become images.*features.kind=predictor"):
        find_features({"kind": "dinov2", "path": dinov2_folder})
