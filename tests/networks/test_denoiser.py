"""The denoiser and its conditions: nulls, any subset, and that a condition reaches the output."""

import copy

import pytest
import torch

from ldm.conditioning.base import Conditioners
from ldm.conditioning.covariates import MODES, CovariateConditioner
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.network import ConditionalDenoiser
from ldm.networks.denoiser import Denoiser, loses_means, positions

SCHEMA = CovariateSchema(
    [
        Covariate("age", "continuous", "years", (40.0, 80.0)),
        Covariate("sex", "categorical", levels=("F", "M")),
        Covariate("site", "categorical", levels=("a", "b", "c")),
    ]
)


def network(mode, size=(4, 4, 4), **settings):
    torch.manual_seed(0)
    header = {
        "denoiser": {
            "channels": [16, 32],
            "num_res_blocks": 1,
            "attention_levels": [False, True],
            "norm_num_groups": 16,
            "num_head_channels": 16,
            **settings,
        },
        "condition": {"mode": mode, "dim": 8, "drop_rate": 0.1, "drop_all_rate": 0.1},
        "latent_shape": [3, *size],
    }
    return ConditionalDenoiser(header, SCHEMA)


def awake(module):
    """MONAI and we start many layers at zero; give every parameter a value, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 8), (4, 4, 4)])
def test_every_covariate_and_every_null_reaches_the_output(mode, size):
    net = awake(network(mode, size))
    x, t = torch.randn(1, 3, *size), torch.tensor([500])
    base = torch.tensor([[0.2, 0.0, 1.0]])
    with torch.no_grad():
        reference = net(x, t, {"covariates": base})
        assert reference.shape == x.shape
        for k, other in enumerate((0.9, 1.0, 2.0)):
            for value in (other, torch.nan):
                changed = base.clone()
                changed[0, k] = value
                assert (net(x, t, {"covariates": changed}) - reference).abs().max() > 1e-5, (mode, k, value)


def test_missing_covariates_have_nulls_of_their_own():
    conditioner = awake(CovariateConditioner([0, 2, 3], "cross_attention", dim=8))
    tokens = conditioner(torch.full((1, 3), torch.nan)).context[0]
    assert torch.isfinite(tokens).all()
    assert not torch.allclose(tokens[0], tokens[1])


def test_dropping_is_per_sample_and_per_covariate():
    conditioners = Conditioners({"covariates": CovariateConditioner([0, 0, 0], "concat", drop_rate=0.3)}, 0.2)
    uniforms = torch.rand(20000, conditioners.num_uniforms, generator=torch.Generator().manual_seed(0))
    hidden = conditioners.drop({"covariates": torch.zeros(20000, 3)}, uniforms)["covariates"].isnan()
    expected = 1 - 0.7 * 0.8
    assert hidden.float().mean(0).sub(expected).abs().max() < 0.02
    assert abs(float(hidden.all(1).float().mean()) - (0.2 + 0.8 * 0.3**3)) < 0.02
    # given that not all are hidden, one being hidden says nothing about the next
    rest = hidden[uniforms[:, 3] >= 0.2].float()
    assert abs(float(torch.corrcoef(rest.T)[0, 1])) < 0.03


def test_published_hybrid_has_the_planes_again_as_one_token():
    conditioning = CovariateConditioner([0, 2, 0, 0], "hybrid")(torch.rand(2, 4).round(decimals=1))
    torch.testing.assert_close(conditioning.context[:, 0], conditioning.planes)


def test_a_latent_that_cannot_be_halved_is_refused():
    with pytest.raises(LdmError, match="5x4x4 cannot be halved 1 times.*multiple of 2"):
        network("concat", (5, 4, 4))


def test_an_unknown_setting_is_named():
    with pytest.raises(LdmError, match=r"ldm.network.num_resblocks.*Did you mean 'num_res_blocks'"):
        network("concat", num_resblocks=2)


def test_positions_tell_places_apart():
    with_it, without = (awake(network("concat", position_frequencies=n)) for n in (2, 0))
    # circular padding takes away what zero padding tells about the border, leaving only the position planes
    for net in (with_it, without):
        for module in net.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]
    x, t, values = torch.zeros(1, 3, 4, 4, 4), torch.tensor([500]), {"covariates": torch.full((1, 3), 0.5)}
    with torch.no_grad():
        assert without(x, t, values).std((2, 3, 4)).max() < 1e-5
        assert with_it(x, t, values).std((2, 3, 4)).max() > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (4, 4, 8)])
def test_patches_are_the_unet_on_rearranged_blocks(size):
    torch.manual_seed(0)
    settings = {
        "channels": (16,),
        "num_res_blocks": 1,
        "attention_levels": (False,),
        "norm_num_groups": 16,
        "num_head_channels": 16,
    }
    net = awake(Denoiser(len(size), 2, plane_channels=1, patch_size=2, position_frequencies=2, **settings))
    x, t, planes = torch.randn(3, 2, *size), torch.tensor([500, 20, 3]), torch.randn(3, 1, *size)

    def blocks(image):  # (B, C, D, H, W) -> (B, 8 C, D/2, H/2, W/2), by hand
        for axis in range(len(size)):
            image = image.unflatten(2 + 2 * axis, (-1, 2))
        halves = [2 + 2 * axis for axis in range(len(size))]
        return image.permute(0, 1, *(h + 1 for h in halves), *halves).flatten(1, 1 + len(size))

    where = positions([side // 2 for side in size], 2, x.device).expand(3, -1, *(side // 2 for side in size))
    with torch.no_grad():
        expected = net.unet(torch.cat([blocks(x), where, blocks(planes)], dim=1), t)
        torch.testing.assert_close(blocks(net(x, t, planes=planes)), expected)
    assert net.downsampling_factor == 2


def test_a_patch_size_of_three_is_refused():
    with pytest.raises(LdmError, match="ldm.network.patch_size 3 is not legal; legal: 1, 2"):
        network("concat", patch_size=3)


@pytest.mark.parametrize("mode", ["concat", "adaptive_norm"])
def test_dropout_leaves_out_features_in_training_alone(mode):
    without, dropping = (awake(network(mode, dropout=share)) for share in (0.0, 0.5))
    assert dropping.state_dict().keys() == without.state_dict().keys()  # weights of elsewhere fit
    x, t, values = torch.randn(1, 3, 4, 4, 4), torch.tensor([500]), {"covariates": torch.full((1, 3), 0.5)}
    with torch.no_grad():
        torch.testing.assert_close(dropping(x, t, values), without(x, t, values))
        first, second = (copy.deepcopy(dropping).train()(x, t, values) for _ in range(2))
    assert (first - second).abs().max() > 0.01
    with pytest.raises(LdmError, match="ldm.network.dropout 1.5 is not legal"):
        network(mode, dropout=1.5)


def test_padding_is_no_token():
    torch.manual_seed(0)
    settings = {"channels": (16, 32), "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 16}
    net = awake(Denoiser(2, 3, context_dim=8, context_padding=True, num_head_channels=16, **settings))
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([500, 20]), torch.randn(2, 2, 8)
    padded = torch.cat([tokens, torch.full((2, 3, 8), torch.nan)], dim=1)  # (2, 5, 8)
    with torch.no_grad():
        expected = net(x, t, context=tokens)
        torch.testing.assert_close(net(x, t, context=padded), expected)
        assert (net(x, t, context=padded.nan_to_num()) - expected).abs().max() > 1e-4  # zeros are tokens


def explained_mean(groups):
    """Share of the variance of the noise's mean that a linear map of the last features can tell, on noise alone."""
    torch.manual_seed(0)
    denoiser = Denoiser(
        2, 1, channels=(16, 32), num_res_blocks=1, attention_levels=(False, False), norm_num_groups=groups
    )
    noise = torch.randn(400, 1, 8, 8)
    seen = []
    denoiser.unet.out[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((2, 3))))
    with torch.no_grad():
        denoiser(noise, torch.full((400,), 999))
    features = torch.cat([seen[0], torch.ones(400, 1)], 1).double()  # (400, 17)
    means = noise.mean((1, 2, 3)).double()
    weights = torch.linalg.lstsq(features[:200], means[:200, None]).solution
    error = means[200:] - (features[200:] @ weights)[:, 0]
    return float(1 - error.square().mean() / means[200:].var())


def test_a_group_of_one_channel_loses_what_a_prediction_of_noise_needs():
    assert explained_mean(4) > 0.7
    assert explained_mean(16) < 0.5
    assert loses_means((16, 32), 16)
    assert not loses_means((16, 32), 8)
