"""A GAN file: one is enough to draw, each sample has noise of its own, and what it cannot do is refused."""

import numpy as np
import pytest
import torch
from monai.networks.blocks import Convolution

from ldm.conditioning.base import COVARIATES
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.model.gan import GAN
from ldm.model.load import load_generative
from ldm.networks.gan import Encoder, Generator, ImageDiscriminator, UpBlock, minibatch_spread
from tests.model.test_predictor import predictor
from tests.model.test_transfer import model as diffusion_model

AGE = Covariate("age", "continuous", "years", (40.0, 80.0))
KIND = Covariate("kind", "categorical", levels=("a", "b", "c"))
ROWS = [{"age": 50.0, "kind": "a"}, {"age": 70.0}, {}, {"kind": "c"}, {"age": 41.0, "kind": "b"}]


def gan(method="lsgan", spatial_dims=2, schema=(AGE, KIND), **network):
    torch.manual_seed(0)
    size = (12, 8, 10)[:spatial_dims]
    header = {
        "cohort": "test",
        "split_sha256": "0" * 64,
        "method": method,
        "network": {
            "spatial_dims": spatial_dims,
            "out_channels": 1,
            "image_size": size,
            "latent_dim": 6,
            "channels": [8, 8],
            "norm_num_groups": 4,
            "value_range": [-1.0, 2.0],
            **network,
        },
        "encoder": {"channels": [8, 8], "norm_num_groups": 4},
        "condition": {"mode": "adaptive_norm", "dim": 8, "drop_rate": 0.1, "drop_all_rate": 0.1},
        "seed": 0,
    }
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if spatial_dims == 3 else None
    orientation = "RAS" if spatial_dims == 3 else None
    recipe = Preprocessing(
        spatial_dims,
        orientation=orientation,
        shape=size,
        multiple=(1,) * spatial_dims,
        intensity=IntensityRecipe("window", 0, 255, (-1.0, 2.0)),
        channels=("image",),
        reference=Geometry.plan(size, affine, orientation, None, size),
    )
    return GAN(header, recipe, CovariateSchema(schema)).eval()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("method", "network"),
    [
        ("lsgan", {"stem": "none"}),
        ("lsgan", {"stem": "haar"}),
        ("vaegan", {"stem": "space_to_depth"}),
        ("lsgan", {"stem": "space_to_depth", "refine_channels": 0}),
    ],
)
def test_a_saved_gan_draws_the_same_whatever_the_batch(tmp_path, method, network, spatial_dims):
    made = gan(method, spatial_dims, **network)
    made.save(tmp_path / "model.safetensors")
    loaded = load_generative(tmp_path / "model.safetensors")
    assert isinstance(loaded, GAN)
    options = {"seed": 3, "precision": "float32"}
    drawn = next(made.sample_batches(ROWS, range(5), batch_size=5, **options)).images
    assert drawn.shape == (5, 1, *(12, 8, 10)[:spatial_dims])
    assert -1 <= drawn.min() < drawn.max() <= 2
    assert (next(loaded.sample_batches(ROWS, range(5), batch_size=5, **options)).images == drawn).all()
    batches = list(loaded.sample_batches(ROWS[::-1], range(4, -1, -1), batch_size=2, **options))
    np.testing.assert_allclose(np.concatenate([b.images for b in batches])[::-1], drawn, atol=1e-5)
    other = next(made.sample_batches(ROWS[:1], [0], 4, precision="float32")).images
    assert np.abs(other[0] - drawn[0]).max() > 1e-3  # another seed
    asked = next(made.sample_batches([ROWS[4]], [0], **options)).images
    assert np.abs(asked[0] - drawn[0]).max() > 1e-3  # the same noise, other covariates


def test_what_is_not_asked_falls_to_a_null_that_no_value_gives():
    made = gan()
    embedded = made.network.embed(made.condition([{}, {"kind": "a"}, {"kind": "b"}, {"age": 60.0}]))
    assert torch.cdist(embedded, embedded).fill_diagonal_(1).min() > 1e-3
    none = gan(schema=())
    assert none.network.embed(none.condition([{}])) is None
    assert none.sample(n=2).images.shape == (2, 1, 12, 8)
    assert none.condition_in_words() == "nothing"


def test_a_vaegan_reconstructs_each_image_by_itself_and_an_lsgan_cannot():
    made, x = gan("vaegan"), torch.rand(3, 1, 12, 8)
    assert made.reconstructs
    together = made.reconstruct(x, ROWS[:3])
    alone = torch.cat([made.reconstruct(one[None], [row]) for one, row in zip(x, ROWS[:3], strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4
    assert not gan().reconstructs
    with pytest.raises(LdmError, match="LSGAN has no encoder"):
        gan().reconstruct(x, ROWS[:3])


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_doubling_leaves_no_checkerboard(spatial_dims):
    """Equal features give equal features away from the border; a transposed convolution gives a pattern."""
    torch.manual_seed(0)
    x, style = torch.ones(1, 8, *(6,) * spatial_dims), torch.randn(1, 4)
    inside = (..., *(slice(2, -2),) * spatial_dims)
    block = UpBlock(spatial_dims, 8, 8, 4, groups=8)
    up = torch.nn.functional.interpolate(x, scale_factor=2)
    assert block.conv(up)[inside].std(dim=tuple(range(2, 2 + spatial_dims))).max() < 1e-6
    assert block(x, style)[inside].std(dim=tuple(range(2, 2 + spatial_dims))).max() < 1e-4
    transposed = Convolution(spatial_dims, 8, 8, 2, 3, is_transposed=True, conv_only=True)
    assert transposed(x)[inside].std(dim=tuple(range(2, 2 + spatial_dims))).max() > 1e-2


def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    network = ImageDiscriminator(2, 1, (16, 16), channels=(8, 8), hidden=8, embedding_dim=4)
    for _ in range(30):  # power iterations
        network(torch.rand(2, 1, 16, 16), torch.rand(2, 4))
    network.eval()
    layers = [one for one in network.modules() if isinstance(one, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 5
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    plain = ImageDiscriminator(2, 1, (16, 16), channels=(8,), norm="group")
    assert any(isinstance(one, torch.nn.GroupNorm) for one in plain.modules())
    bare = ImageDiscriminator(2, 1, (16, 16), channels=(8,), norm="none")
    assert not any(isinstance(one, torch.nn.GroupNorm) or hasattr(one, "parametrizations") for one in bare.modules())


def test_a_discriminator_that_compares_images_sees_when_all_are_the_same():
    """The spread against numpy, group by group; a batch of one image repeated is told from one of many."""
    rows = torch.rand(5, 3)
    expected = [rows[:2].numpy().std(0).mean()] * 2 + [rows[2:4].numpy().std(0).mean()] * 2 + [0.0]
    assert minibatch_spread(rows, 2)[:, 0].tolist() == pytest.approx(expected, abs=2e-4)
    same = rows[:1].repeat(4, 1).requires_grad_()
    minibatch_spread(same, 4).sum().backward()
    assert same.grad.abs().max() == 0

    torch.manual_seed(0)
    network = ImageDiscriminator(2, 1, (8, 8), channels=(4,), hidden=4, norm="group", minibatch_std=4)
    x = torch.rand(4, 1, 8, 8)
    assert (network(x)[:1] - network(x[:1].repeat(4, 1, 1, 1))[:1]).abs() > 1e-4
    alone = ImageDiscriminator(2, 1, (8, 8), channels=(4,), hidden=4, norm="group")
    torch.testing.assert_close(alone(x)[:1], alone(x[:1]))
    with pytest.raises(LdmError, match="gan.discriminator.minibatch_std is 1; legal: 0 for none, or 2 and more"):
        ImageDiscriminator(2, 1, (8, 8), channels=(4,), minibatch_std=1)
    with pytest.raises(LdmError, match="gan.discriminator.norm 'spectrl' is unknown.*Did you mean 'spectral'"):
        ImageDiscriminator(2, 1, (8, 8), channels=(4,), norm="spectrl")


def test_a_condition_changes_the_score_by_its_inner_product_with_the_image():
    torch.manual_seed(0)
    network = ImageDiscriminator(2, 1, (8, 8), channels=(4,), hidden=4, embedding_dim=3, norm="group")
    x, e = torch.rand(2, 1, 8, 8), torch.randn(2, 3)
    zero, one, double = (network(x, factor * e) for factor in (0, 1, 2))
    torch.testing.assert_close(network(x), zero)
    torch.testing.assert_close(double - zero, 2 * (one - zero))
    assert (one - zero).abs().min() > 1e-4


def test_what_is_not_legal_is_named(tmp_path):
    made = gan()
    for option in ({"num_inference_steps": 5}, {"guidance_scale": 2.0}):
        with pytest.raises(LdmError, match=f"{next(iter(option))}: the LSGAN draws in one network call"):
            made.sample(ROWS[0], **option)
    with pytest.raises(LdmError, match="not conditioned on 'mask'"):
        made.sample(ROWS[0], mask=np.zeros((12, 8)))
    with pytest.raises(LdmError, match="Did you mean 'age'"):
        made.sample({"aeg": 50.0})
    with pytest.raises(LdmError, match=f"^There is no model file {tmp_path / 'none.safetensors'}"):
        GAN.load(tmp_path / "none.safetensors")
    with pytest.raises(LdmError, match="gan.method 'lsgann' is unknown.*Did you mean 'lsgan'"):
        gan("lsgann")
    with pytest.raises(LdmError, match="gan.network.latentdim is not a setting"):
        gan(latentdim=3)
    with pytest.raises(LdmError, match="channels is .8, 6.; every level needs a multiple of norm_num_groups, 8"):
        Generator(2, 1, (8, 8), channels=(8, 6))
    with pytest.raises(LdmError, match="image of 8x4 can be halved 2 times"):
        Encoder(2, 1, (8, 4), channels=(8, 8, 8))
    predictor().save(tmp_path / "predictor.safetensors")
    with pytest.raises(LdmError, match="kind 'predictor', which draws no images; legal: latent_diffusion, gan"):
        load_generative(tmp_path / "predictor.safetensors")
    diffusion_model([AGE], "concat").save(tmp_path / "ldm.safetensors")
    assert load_generative(tmp_path / "ldm.safetensors").what == "diffusion model"
    with pytest.raises(LdmError, match="kind 'latent_diffusion', expected 'gan'"):
        GAN.load(tmp_path / "ldm.safetensors")


def test_continuous_covariates_are_z_scored():
    made = gan()
    codes = torch.tensor([[0.1, 0], [0.2, 1], [0.3, 2], [torch.nan, 0]])
    covariates = made.network.conditioners[COVARIATES]
    covariates.fit(codes)
    assert covariates.tokens[0].centre.item() == pytest.approx(0.2)
    assert covariates.tokens[0].spread.item() == pytest.approx(0.1)


@pytest.mark.parametrize("stem", ["space_to_depth", "haar"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_stem_starts_without_a_checkerboard(spatial_dims, stem):
    torch.manual_seed(0)
    size = (16, 8, 8)[:spatial_dims]
    generator = Generator(spatial_dims, 2, size, 6, (8, 8), norm_num_groups=4, stem=stem)
    x = generator(torch.randn(3, 6))
    for axis in range(2, x.ndim):  # blocks of two voxels along each axis
        pairs = x.unflatten(axis, (-1, 2))
        torch.testing.assert_close(pairs.select(axis + 1, 0), pairs.select(axis + 1, 1))
    assert x.std() > 0.01


def test_covariates_that_training_never_hid_have_to_be_asked_for():
    made = gan()
    made.sample(n=1)  # of a file that does not tell, as ever
    made.header["learned_nulls"] = ["kind"]
    made.sample({"age": 50.0}, n=1)
    with pytest.raises(LdmError, match=r"go without age: ask.*gan\.condition\.drop_rate above 0"):
        made.sample({"kind": "a"}, n=1)
