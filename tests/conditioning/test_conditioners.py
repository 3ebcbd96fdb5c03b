"""Conditioners in one list: each with its null and drop rate, merged, and refused where they do not fit."""

import numpy as np
import pytest
import torch

from ldm.conditioning.base import Conditioners
from ldm.conditioning.build import complete, with_defaults
from ldm.conditioning.covariates import MODES
from ldm.conditioning.planes import space_to_depth
from ldm.errors import LdmError
from ldm.model.network import ConditionalDenoiser
from tests.networks.test_denoiser import SCHEMA, awake

CONFIG = {
    "mask": {"drop_rate": 0.3},
    "image": {"channels": ["T2"], "drop_rate": 0.5},
    "text": {"caption": "a [{age:.0f}-year-old ]{sex:woman|man}", "dim": 16, "num_heads": 2, "max_tokens": 12},
}
LABELS = {"csf": 1, "grey": [2, 3]}
SIZE = (4, 4)


def described(config=CONFIG, factor=2):
    return complete(config, SCHEMA, LABELS, ("T1", "T2"), factor, label_values={0, 1, 2, 9})


def network(mode="adaptive_norm", config=CONFIG, drop_all=0.2):
    torch.manual_seed(0)
    header = {
        "denoiser": {
            "channels": [16, 32],
            "num_res_blocks": 1,
            "attention_levels": [False, True],
            "norm_num_groups": 16,
            "num_head_channels": 16,
        },
        "condition": {"mode": mode, "dim": 8, "drop_rate": 0.1, "drop_all_rate": drop_all},
        "conditioners": described(config),
        "latent_shape": [3, *SIZE],
    }
    return awake(ConditionalDenoiser(header, SCHEMA))


def condition(net, text="a 70-year-old woman"):
    generator = torch.Generator().manual_seed(0)
    return {
        "covariates": torch.tensor([[0.2, 0.0, 1.0]]),
        "mask": torch.rand(1, 3, *SIZE, generator=generator),
        "image": torch.rand(1, 4, *SIZE, generator=generator),
        "text": net.conditioners["text"].encode(text, {}, SIZE)[None],
    }


@pytest.mark.parametrize("way", ["concat", "spade"])
@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_every_conditioner_and_every_null_reaches_the_output(mode, way):
    net = network(mode, {**CONFIG, "mask": {"mode": way}})
    x, t, base = torch.randn(1, 3, *SIZE), torch.tensor([500]), condition(net)
    other = {**condition(net, "a man"), "mask": base["mask"].flip(1), "image": 1 - base["image"]}
    with torch.no_grad():
        reference = net(x, t, base)
        for name in net.conditioners:
            blank = net.conditioners.without(base, name)
            changed = [blank] if name == "covariates" else [blank, {**base, name: other[name]}]
            for one in changed:
                output = net(x, t, one)
                assert torch.isfinite(output).all()
                assert (output - reference).abs().max() > 1e-5, (mode, name)
        nothing = net(x, t, net.conditioners.null(base))
        torch.testing.assert_close(nothing, net(x, t, net.conditioners.null(other)))


def test_dropping_is_per_sample_and_per_conditioner():
    conditioners = network().conditioners
    count = 20000
    uniforms = torch.rand(count, conditioners.num_uniforms, generator=torch.Generator().manual_seed(0))
    given = {
        "covariates": torch.zeros(count, 3),
        "mask": torch.zeros(count, 3, 1, 1),
        "image": torch.zeros(count, 4, 1, 1),
        "text": torch.zeros(count, 12, dtype=torch.long),
    }
    dropped = conditioners.drop(given, uniforms)
    hidden = {name: value.isnan().flatten(1) for name, value in dropped.items() if name != "text"}
    hidden["text"] = dropped["text"] == -1
    for name, rate in {"mask": 0.3, "image": 0.5, "text": 0.1}.items():
        assert (hidden[name].all(1) == hidden[name].any(1)).all()
        assert float(hidden[name][:, 0].float().mean()) == pytest.approx(1 - 0.8 * (1 - rate), abs=0.02)
    every = torch.cat(list(hidden.values()), dim=1).all(1)
    assert float(every.float().mean()) == pytest.approx(0.2, abs=0.01)
    rest = torch.stack([hidden[name][~every, 0].float() for name in hidden])
    off_diagonal = torch.corrcoef(rest) - torch.eye(len(rest))
    assert off_diagonal.abs().max() < 0.03


def test_padding_is_not_attended_to():
    net = network()
    x, t, base = torch.randn(1, 3, *SIZE), torch.tensor([500]), condition(net)
    text = net.conditioners["text"]
    with torch.no_grad():
        reference = net(x, t, base)
        text.encoder.embed.weight[text.padding] += 10
        text.encoder.positions.weight[int((base["text"] != text.padding).sum()) :] += 10
        torch.testing.assert_close(net(x, t, base), reference)
    net(x, t, base).square().sum().backward()
    gradient = text.encoder.embed.weight.grad
    assert torch.isfinite(gradient).all()
    assert not gradient[text.padding].any()
    assert gradient[base["text"][0, 1]].any()


def test_a_mask_is_the_share_of_each_class_and_an_image_keeps_every_voxel():
    net = network()
    labels = np.zeros((8, 8), np.uint8)
    labels[:4, :2], labels[4:, 0], labels[7, 7] = 1, 3, 2
    shares = net.conditioners["mask"].encode(labels, {}, SIZE)
    torch.testing.assert_close(shares.sum(0), torch.ones(SIZE))
    assert shares[1, :2, 0].tolist() == [1, 1]
    assert shares[2, 2:, 0].tolist() == [0.5, 0.5]
    assert shares[2, 3, 3] == 0.25
    labels[7, 7] = 9  # no class, but the cohort has it: background, as in training
    assert net.conditioners["mask"].encode(labels, {}, SIZE)[0, 3, 3] == 1
    image = torch.randn(1, 8, 8)
    planes = net.conditioners["image"].encode(image.numpy(), {}, SIZE)
    torch.testing.assert_close(planes, space_to_depth(image, SIZE))
    torch.testing.assert_close(planes[:, 1, 2].sort().values, image[0, 2:4, 4:6].flatten().sort().values)


def test_what_does_not_fit_is_refused_by_name():
    net = network()
    x, t, base = torch.randn(1, 3, *SIZE), torch.tensor([500]), condition(net)
    for name, value, message in (
        ("mask", torch.zeros(1, 2, *SIZE), r"mask: expected \(B, 3, \*S\), a plane for each of background, csf, grey"),
        ("text", torch.zeros(1, 9, dtype=torch.long), r"text: expected \(B, 12\) tokens, got \(1, 9\)"),
    ):
        with pytest.raises(LdmError, match=message):
            net(x, t, {**base, name: value})
    with pytest.raises(LdmError, match="lacks image; legal: covariates, mask, image, text"):
        net(x, t, {name: value for name, value in base.items() if name != "image"})
    mask, image, text = (net.conditioners[name] for name in ("mask", "image", "text"))
    with pytest.raises(
        LdmError, match=r"value\(s\) 7 are unknown; legal: 0 background, 9 background, 1 csf, 2 grey, 3 grey"
    ):
        mask.encode(np.full((8, 8), 7), {}, SIZE)
    with pytest.raises(LdmError, match=r"\(8, 6\) is not on the model's grid; legal: \(8, 8\)"):
        mask.encode(np.zeros((8, 6)), {}, SIZE)
    with pytest.raises(LdmError, match=r"1 channel\(s\) \(T2\)"):
        image.encode(np.zeros((2, 8, 8)), {}, SIZE)
    with pytest.raises(LdmError, match="13 tokens.*at most 12"):
        text.encode("a " * 11, {}, SIZE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"msak": {}}, "msak is no conditioner.*Did you mean 'mask'"),
        ({"mask": {"droprate": 0.1}}, "mask.droprate is not a setting. Did you mean 'drop_rate'"),
        ({"mask": {"mode": "control"}}, "mask.mode is 'control'; legal: concat, spade. A control is asked for by"),
        ({"mask": {"drop_rate": 2}}, "mask.drop_rate is a probability, got 2; legal: 0 to 1"),
        ({"image": {}}, "image.channels: name the channels"),
        ({"image": {"channels": ["t2"]}}, "no channel 't2' in data.image; legal: T1, T2. Did you mean 'T2'"),
        ({"image": {"channels": ["T1", "T2"]}}, "leave one of T1, T2 to be generated"),
        ({"text": {}}, "text.caption: say how"),
        ({"text": {"caption": "{aeg}"}}, "Did you mean 'age'"),
    ],
)
def test_a_setting_that_is_not_legal_is_named(config, message):
    with pytest.raises(LdmError, match=message):
        described(config)


def test_defaults_and_sizes():
    assert with_defaults({"mask": None}) == {"mask": {"mode": "concat", "drop_rate": 0.1}}
    with pytest.raises(LdmError, match="num_heads is 3; legal: a divisor of dim, which is 16"):
        network(config={"text": {**CONFIG["text"], "num_heads": 3}})
    assert Conditioners({}).num_uniforms == 1
