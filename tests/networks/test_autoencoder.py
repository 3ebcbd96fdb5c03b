"""The first stage's network: the stem loses nothing, and without it the network is MONAI's."""

import pytest
import torch
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL

from ldm.errors import LdmError
from ldm.networks.autoencoder import AutoencoderKL
from ldm.networks.stem import BlockStem

SMALL = {"channels": (16, 32), "attention_levels": (False, False), "latent_channels": 3}


@pytest.mark.parametrize("kind", ["space_to_depth", "haar"])
@pytest.mark.parametrize("size", [(6, 8), (4, 6, 8)])
def test_stem_is_an_isometry(kind, size):
    stem = BlockStem(len(size), kind)
    x = torch.randn(2, 3, *size)
    y = stem(x)
    assert y.shape == (2, 3 * 2 ** len(size), *(side // 2 for side in size))
    torch.testing.assert_close(stem.inverse(y), x)
    torch.testing.assert_close(y.square().sum(), x.square().sum())


def test_haar_separates_the_block_mean():
    y = BlockStem(3, "haar")(torch.full((1, 1, 4, 4, 4), 3.0))
    torch.testing.assert_close(y[:, 0], torch.full((1, 2, 2, 2), 3.0 * 8**0.5))
    assert y[:, 1:].abs().max() < 1e-5


@pytest.mark.parametrize("size", [(16, 16), (8, 8, 8)])
def test_without_stem_it_is_monais_network(size):
    ours = AutoencoderKL(len(size), stem="none", **SMALL).eval()
    peer = MonaiAutoencoderKL(
        len(size),
        num_res_blocks=1,
        norm_num_groups=16,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        **SMALL,
    ).eval()
    peer.load_state_dict(ours.state_dict())  # same keys, same shapes
    x = torch.rand(1, 1, *size)
    for a, b in zip(ours.encode(x), peer.encode(x), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.decode(ours.encode(x)[0]), peer.reconstruct(x))


@pytest.mark.parametrize(
    ("size", "stem", "factor"), [((16, 16), "auto", 2), ((8, 8, 8), "auto", 4), ((8, 8), "haar", 4)]
)
def test_shapes_follow_the_factor(size, stem, factor):
    network = AutoencoderKL(len(size), in_channels=2, stem=stem, **SMALL)
    assert network.downsampling_factor == factor
    mean, std = network.encode(torch.rand(2, 2, *size))
    assert mean.shape == std.shape == (2, 3, *(side // factor for side in size))
    assert network.decode(mean).shape == (2, 2, *size)


def test_refinement_is_silent_at_the_start():
    network = AutoencoderKL(3, stem="haar", **SMALL)
    z = torch.randn(1, 3, 2, 2, 2)
    with_it = network.decode(z)
    network.refine = None
    torch.testing.assert_close(network.decode(z), with_it)


def test_wrong_sizes_are_named():
    with pytest.raises(LdmError, match=r"norm_num_groups 16"):
        AutoencoderKL(3, channels=(20, 32), attention_levels=(False, False))
    with pytest.raises(LdmError, match="'harr' is unknown.*Did you mean 'haar'"):
        AutoencoderKL(3, stem="harr")
