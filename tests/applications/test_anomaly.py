"""Detection where everything is known: two Gaussian classes, their exact denoiser and their exact classifier."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.applications.anomaly import ROUND_TRIP, DetectionOptions, Detector, anomaly_map, find_healthy, image_scores
from ldm.applications.detection import intensity_maps
from ldm.data.schema import Covariate
from ldm.diffusion import guidance
from ldm.diffusion.continuous import EDMSchedule
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import LdmError
from ldm.latents.space import LatentSpace
from ldm.model.classifier import Classifier, build_classifier
from ldm.networks.autoencoder import IdentityAutoencoder

STD, SHAPE = 0.25, (1, 4, 4)
TARGET = Covariate("diseased", "categorical", levels=("0", "1"))
LESION = np.zeros(SHAPE[1:], bool)
LESION[1:3, 1:3] = True


class TwoGaussians:
    """A model of images that are N(0, STD^2), but N(2, STD^2) in the lesion of the diseased, who are one half."""

    device = torch.device("cpu")
    header = {"condition": {"drop_all_rate": 0.1}, "first_stage": {"kind": "identity"}}  # noqa: RUF012
    schema = SimpleNamespace(names=("diseased",))
    preprocessing = SimpleNamespace(channels=("image",))
    network = SimpleNamespace(conditioners={"covariates": None})
    first_stage, latent_space = IdentityAutoencoder(2), LatentSpace.identity(1)

    def __init__(self, schedule=None):
        self.schedule = schedule or NoiseSchedule(1000, "scaled_linear", 0.0015, 0.0195)
        self.means = torch.stack([torch.zeros(SHAPE), 2.0 * torch.from_numpy(LESION)[None]])  # (2, C, *S)

    def decode(self, x):
        return x

    def encode_condition(self, rows):
        return [row.get("diseased") for row in rows]

    def log_joint(self, x, step):
        """``log p(x_t, class)`` up to what both share, (2, B)."""
        variance = step.alpha**2 * STD**2 + step.sigma**2
        return torch.stack([-(x - step.alpha * m).square().flatten(1).sum(1) / (2 * variance) for m in self.means])

    def log_prob(self, level):
        return lambda x, step: self.log_joint(x, step).log_softmax(0)[int(level)]

    def denoise_many(self, x, step, conditions):
        gain = step.alpha * STD**2 / (step.alpha**2 * STD**2 + step.sigma**2)
        of_class = torch.stack([m + gain * (x - step.alpha * m) for m in self.means])  # (2, B, C, *S)
        found = []
        for condition in conditions:
            share = self.log_joint(x, step).softmax(0) if condition[0] is None else None  # (2, B)
            x0 = (share[..., None, None, None] * of_class).sum(0) if share is not None else of_class[int(condition[0])]
            found.append(Prediction(x0, (x - step.alpha * x0) / step.sigma))
        return found


def detector(model=None):
    model = model or TwoGaussians()
    exact = SimpleNamespace(expect_space_of=lambda model: None, log_prob=model.log_prob)
    return Detector(model, TARGET, "0", exact)


def diseased(n=6):
    rng = np.random.default_rng(0)
    return (rng.normal(0, STD, (n, *SHAPE)) + 2.0 * LESION).astype(np.float32)


@pytest.mark.parametrize("schedule", [None, EDMSchedule()])
def test_guided_decoding_brings_the_diseased_to_the_healthy(schedule):
    """With the exact classifier and s = 1 the way back is that of healthy images alone, and leaves the rest alone."""
    images, found = diseased(), detector(TwoGaussians(schedule))
    level = None if schedule is None else 2.0
    options = DetectionOptions(guide="classifier", level=level, scale=1.0, steps=200)
    healthy, trip = found.counterparts(images, options, [1.0, ROUND_TRIP])
    assert images[..., LESION].mean() > 1.8
    assert np.abs(healthy[..., LESION]).mean() < 2 * STD
    assert np.abs(healthy - images)[..., ~LESION].mean() < 0.03
    assert np.abs(trip - images).mean() < 0.03
    maps = anomaly_map(images, healthy, options)
    assert maps[:, LESION].min() > 3 * maps[:, ~LESION].max()
    well = (images - 2.0 * LESION).astype(np.float32)
    unchanged = anomaly_map(well, found.counterparts(well, options)[0], options)
    assert unchanged.mean() < 0.05
    assert image_scores(maps, options).min() > image_scores(unchanged, options).max()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_an_exact_classifier_guides_as_classifier_free_guidance_does(scale):
    """Bayes: grad log p(healthy | x_t) is the difference of the conditional score and the unconditional one."""
    images, options = diseased(3), {"scale": scale, "steps": 50}
    by_gradient, free = (
        detector().counterparts(images, DetectionOptions(guide=guide, **options))[0] for guide in ("classifier", "free")
    )
    np.testing.assert_allclose(by_gradient, free, atol=2e-3)


def test_the_round_trip_gets_better_with_steps():
    images, errors = diseased(), []
    for steps in (20, 80, 320):
        options = DetectionOptions(steps=steps)
        errors.append(float(np.abs(detector().counterparts(images, options, [ROUND_TRIP])[0] - images).mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_partial_noising_is_that_of_each_image_alone():
    images, options = diseased(4), DetectionOptions(guide="none", steps=20)
    together = detector().counterparts(images, options, seed=3)[0]
    alone = detector().counterparts(images[2:3], options, indices=[2], seed=3)[0]
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)
    assert np.abs(detector().counterparts(images, options, seed=4)[0] - together).max() > 0.1


def test_what_cannot_be_asked_is_refused():
    one = detector()
    for options, message in (
        ({"level": 1000}, "level is 1000; legal: 9 .* to 999"),
        ({"level": 5}, "level is 5; legal: 9"),
        ({"channels": "FLAIR"}, "channels 'FLAIR' is not known; legal: sum, mean, image"),
    ):
        with pytest.raises(LdmError, match=message):
            one.check(DetectionOptions(**options))
    with pytest.raises(LdmError, match="needs a classifier"):
        Detector(TwoGaussians(), TARGET, "0").check(DetectionOptions())
    model = TwoGaussians()
    model.header = {"condition": {"drop_rate": 0, "drop_all_rate": 0}}
    with pytest.raises(LdmError, match="never learned to go without"):
        detector(model).check(DetectionOptions())
    with pytest.raises(LdmError, match="Did you mean 'classifier'"):
        DetectionOptions(guide="clasifier")
    with pytest.raises(LdmError, match="encode_as has no meaning"):
        DetectionOptions(encode_as="1")
    assert find_healthy(TARGET, None) == "0"
    assert find_healthy(Covariate("group", "categorical", levels=("AD", "control")), None) == "control"
    with pytest.raises(LdmError, match="Set healthy=LEVEL"):
        find_healthy(Covariate("group", "categorical", levels=("AD", "MCI")), None)


def test_maps_add_channels_and_smooth_space():
    images, other = np.zeros((1, 2, 5, 5), np.float32), np.zeros((1, 2, 5, 5), np.float32)
    other[0, :, 2, 2] = (0.5, -0.25)
    assert anomaly_map(images, other, DetectionOptions())[0, 2, 2] == pytest.approx(0.75)
    assert anomaly_map(images, other, DetectionOptions(channels="mean"))[0, 2, 2] == pytest.approx(0.375)
    for channels, change, value in (
        ("sum", "brighter", 0.25),
        ("sum", "darker", 0.5),
        ("FLAIR", "both", 0.25),
        ("FLAIR", "darker", 0),
    ):
        options = DetectionOptions(channels=channels, change=change)
        assert anomaly_map(images, other, options, ("T1", "FLAIR"))[0, 2, 2] == pytest.approx(value)
    smooth = anomaly_map(images, other, DetectionOptions(smoothing=1.0))
    assert smooth.sum() == pytest.approx(0.75, rel=0.05)
    assert smooth[0, 2, 2] < 0.2
    for score, value in (("mean", 0.75 / 25), ("max", 0.75)):
        assert image_scores(smooth * 0 + (other != 0)[:, 0] * 0.75, DetectionOptions(score=score))[0] == pytest.approx(
            value
        )


@pytest.mark.parametrize("schedule", [NoiseSchedule(1000, "linear"), EDMSchedule()])
def test_the_classifiers_gradient_is_that_of_finite_differences(schedule):
    config = {
        "latent_shape": [2, 6, 5],
        "num_classes": 2,
        "channels": [8, 8],
        "attention_levels": [False, True],
        "num_head_channels": 8,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    network = build_classifier(config).double().eval()
    classifier = Classifier(network, config, TARGET, {"schedule": schedule.to_dict()})
    step = next(iter(schedule.grid(8).last(3)))
    x = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plain(x, step):
        return Prediction(torch.zeros_like(x), x / step.sigma)

    log_prob, scale = classifier.log_prob("0"), 3.0
    shift = plain(x, step).eps - guidance.classifier(plain, log_prob, scale)(x, step).eps  # s sigma grad log p
    for place in ((0, 0, 2, 2), (0, 1, 5, 4), (1, 0, 0, 1)):
        h, above, below = 1e-5, x.clone(), x.clone()
        above[place] += h
        below[place] -= h
        slope = (log_prob(above, step) - log_prob(below, step)) / (2 * h)  # (B,)
        assert slope[1 - place[0]].abs() < 1e-9  # a sample's own gradient, and nobody else's
        expected = scale * step.sigma * slope[place[0]]
        assert abs(expected) > 1e-6
        assert shift[place].item() == pytest.approx(expected.item(), rel=1e-3)
    total = log_prob(x, step).exp() + classifier.log_prob("1")(x, step).exp()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(LdmError, match="classifier.network: .* norm_num_groups 32"):
        build_classifier({"latent_shape": [1, 8, 8], "num_classes": 2, "channels": [8, 8]})


def test_scaled_intensity_does_not_change_with_the_brightness_of_a_scan():
    image = np.random.default_rng(0).random((1, 2, 8, 8)).astype(np.float32)
    one, other = (intensity_maps(x, 1, DetectionOptions()) for x in (image, 0.5 * image + 0.1))
    np.testing.assert_allclose(other["intensity_scaled"], one["intensity_scaled"], atol=1e-4)
    np.testing.assert_allclose(other["intensity"], 0.5 * one["intensity"] + 0.1, atol=1e-6)
    bright = image[0, 1] > image[0, 1].mean()
    assert one["intensity_scaled"][0][bright].mean() == pytest.approx(0, abs=1e-5)
    assert (
        intensity_maps(np.ones((1, 1, 4, 4)), 0, DetectionOptions())["intensity_scaled"].tolist()
        == np.zeros((1, 4, 4)).tolist()
    )
