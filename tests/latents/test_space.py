"""The latent space and the posterior cache."""

import numpy as np
import pytest
import torch

from ldm.data.augmentation import Augmentation
from ldm.data.labels import LabelClasses
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError
from ldm.latents.cache import CacheItem, PosteriorCache, StaleCacheError, write_cache
from ldm.latents.encode import CohortEncoder
from ldm.latents.space import LatentSpace
from ldm.networks.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.networks.frozen import freeze

KEY = {"first_stage": "abc", "preprocessing": "def", "dtype": "float32"}


def posteriors(count=200):
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([5.0, -300.0]).reshape(1, 2, 1, 1) + torch.tensor([0.5, 30.0]).reshape(
        1, 2, 1, 1
    ) * torch.randn(count, 2, 4, 4, generator=generator)
    return mean, torch.tensor([0.7, 1.0]).reshape(1, 2, 1, 1).expand_as(mean)


def test_a_scaled_draw_has_zero_mean_and_unit_std():
    mean, std = posteriors()
    space = LatentSpace.fit([(mean[:50], std[:50]), (mean[50:], std[50:])])
    draw = space.draw(mean, std, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))
    assert draw.mean((0, 2, 3)).abs().max() < 0.05
    assert (draw.std((0, 2, 3)) - 1).abs().max() < 0.05
    # posterior noise belongs to the statistics: channel 0 has std sqrt(0.5^2 + 0.7^2)
    assert abs(float(space.std[0]) - (0.25 + 0.49) ** 0.5) < 0.02
    torch.testing.assert_close(space.to_raw(space.to_scaled(mean)), mean, rtol=1e-4, atol=1e-3)


def test_statistics_are_accumulated_in_double_precision():
    far = 1e5 + torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    space = LatentSpace.fit((part, torch.zeros_like(part)) for part in far.split(8))
    assert abs(float(space.std[0]) - float(far.double().std())) < 0.01


def test_a_collapsed_channel_is_refused():
    mean = torch.randn(4, 2, 3, 3)
    mean[:, 1] = 2.0
    with pytest.raises(LdmError, match=r"channel\(s\) 1 are constant"):
        LatentSpace.fit([(mean, torch.zeros_like(mean))])


def items(start=0, count=5):
    for i in range(start, count):
        yield CacheItem(torch.full((2, 3, 3), float(i)), torch.full((2, 3, 3), 0.5), np.array([i / 10, np.nan]), i, 0)


def test_cache_returns_what_was_written(tmp_path):
    write_cache(tmp_path / "c", KEY, items, 5, (2, 3, 3), dtype="float32")
    cache = PosteriorCache(tmp_path / "c", KEY)
    assert len(cache) == 5
    assert cache.latent_shape == (2, 3, 3)
    assert cache[3]["row"] == 3
    assert float(cache[3]["mean"][0, 0, 0]) == 3.0
    assert cache[3]["covariates"][0] == pytest.approx(0.3)
    assert torch.isnan(cache[3]["covariates"][1])


@pytest.mark.parametrize("name", KEY)
def test_cache_refuses_what_it_was_not_made_from(tmp_path, name):
    write_cache(tmp_path / "c", KEY, items, 5, (2, 3, 3), dtype="float32")
    with pytest.raises(StaleCacheError, match=f"{name} is {KEY[name]}, expected other"):
        PosteriorCache(tmp_path / "c", {**KEY, name: "other"})


def test_an_interrupted_cache_goes_on_where_it_stopped(tmp_path):
    def killed(start):
        for item in items(start):
            if item.row == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "c", KEY, killed, 5, (2, 3, 3), dtype="float32", every=1)
    assert not (tmp_path / "c").exists()
    starts = []

    def resumed(start):
        starts.append(start)
        yield from items(start)

    write_cache(tmp_path / "c", KEY, resumed, 5, (2, 3, 3), dtype="float32", every=1)
    assert starts == [3]
    assert [float(PosteriorCache(tmp_path / "c", KEY)[i]["mean"][0, 0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]


def test_latents_too_large_for_the_dtype_are_refused(tmp_path):
    def huge(start):
        yield CacheItem(torch.full((2, 3, 3), 1e6), torch.ones(2, 3, 3), np.array([0.0]), 7, 0)

    with pytest.raises(LdmError, match="record 7 is not finite in float16"):
        write_cache(tmp_path / "c", KEY, huge, 1, (2, 3, 3), dtype="float16")


class Ball(torch.utils.data.Dataset):
    """Balls whose volume in voxels is their covariate, with the ball as label."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        axes = torch.meshgrid(*[torch.arange(32.0) - 15.5] * 3, indexing="ij")
        ball = (sum(axis**2 for axis in axes) < (7 + i) ** 2).float()
        volume = float(ball.sum())
        return {"image": ball[None], "covariates": torch.tensor([volume / 4000]), "index": i, "labels": 9 * ball.byte()}


def test_variants_correct_covariates_and_carry_labels():
    schema = CovariateSchema([Covariate("volume", "continuous", "mm3", (0.0, 4000.0), scales_with="volume")])
    encoder = CohortEncoder(
        freeze(IdentityAutoencoder(3)),
        Ball(),
        schema,
        Augmentation(scale=0.3),
        variants=4,
        label_classes=LabelClasses.from_config({"ball": 9}),
    )
    found = list(encoder.items())
    assert [item.variant for item in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    for item in found:
        asked = float(schema.decode(item.covariates)["volume"])
        assert float(item.mean.sum()) == pytest.approx(asked, rel=0.03)  # the image follows
        # and so do the labels, to the nearest voxel
        assert float(item.planes["labels"][1].sum()) == pytest.approx(asked, rel=0.1)
    assert len({round(float(item.covariates[0]), 4) for item in found}) == 8
    again = list(encoder.items(start=5))
    torch.testing.assert_close(again[0].mean, found[5].mean)  # resumed: the same random numbers


def test_frozen_means_frozen():
    network = freeze(AutoencoderKL(2, channels=(16, 32)))
    parent = torch.nn.Sequential(network)
    parent.train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
