"""Peers of the diffusion model: networks as an ensemble, by the same functions."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.applications.segmentation import in_file_space, in_order, telling, volumes
from ldm.applications.segmentation_sources import DiffusionSource, NetworkSource
from ldm.data.augmentation import Augmentation
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.metrics.segmentation import dice
from ldm.model.ensemble import Ensemble, Views
from ldm.model.segmenter import Segmenter, build_segmenter

CLASSES = LabelClasses.from_config({"tumour": 1})


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    config = {"spatial_dims": 2, "in_channels": 2, "out_channels": 2, "channels": [8, 16], "num_res_units": 1}
    config["dropout"] = dropout
    recipe = Preprocessing(2, None, None, (16, 16), (1, 1), channels=("T1", "FLAIR"), reference=Geometry.plan((16, 16)))
    return Segmenter(build_segmenter(config).eval(), config, CLASSES, recipe, facts={"split_sha256": "s"})


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((2, 16, 16)).astype(np.float32)


def test_several_networks_are_a_deep_ensemble(image):
    first, second = network(0), network(1)
    source = NetworkSource([first, second], ["a", "b"])
    (ensemble,) = source.ensembles([image], ["one"])
    assert (source.facts["kind"], ensemble.probabilities.shape) == ("deep ensemble", (2, 2, 16, 16))
    np.testing.assert_allclose(ensemble.probabilities[1], second.probabilities(image[None])[0])
    deeper = replace(second, preprocessing=replace(second.preprocessing, multiple=(4, 4)))
    assert NetworkSource([first, deeper], ["a", "b"]).members == 2  # 16 x 16 fits both
    other = replace(second, facts={"split_sha256": "t"})
    with pytest.raises(LdmError, match="same classes, images, preprocessing and split"):
        NetworkSource([first, other], ["a", "b"])
    assert source.unnamed is None  # as of older files
    knowing, otherwise = (replace(second, facts={**second.facts, "unnamed": values}) for values in ([2], []))
    assert NetworkSource([first, knowing], ["a", "b"]).unnamed == (2,)
    with pytest.raises(LdmError, match="same label values that are background"):
        NetworkSource([knowing, otherwise], ["a", "b"])
    for members in (1, 5):
        with pytest.raises(LdmError, match=f"members is {members}; legal: 2, one of each network, without augment"):
            NetworkSource([first, second], ["a", "b"], members)
    with pytest.raises(LdmError, match="members is 1; legal: 2 or more, one of each network"):
        NetworkSource([first, second], ["a", "b"], 1, augmentation=Augmentation(flip_axes=(0,)))


class Constant:
    """A diffusion model whose every map is "inside" to the same degree, and that remembers whom it drew."""

    def __init__(self, value, steps=20, **header):
        self.value, self.steps, self.numbers, self.classes = value, steps, [], CLASSES
        self.header = {"conditioners": {"image": {"channels": ["T1", "FLAIR"]}}, "target": {"unnamed": []}}
        self.header |= {"split_sha256": "s", "tensors_sha256": str(value), **header}
        self.input_preprocessing = network(0).preprocessing

    def settings(self, options):
        return SimpleNamespace(num_inference_steps=options.get("num_inference_steps", self.steps))

    def sample_batches(self, rows, numbers, seed, batch_size, precision, inputs, **options):
        self.numbers += numbers
        assert len(rows) == len(numbers) == len(inputs["image"])
        yield SimpleNamespace(images=np.full((len(rows), 1, 16, 16), self.value, np.float32))


def test_several_diffusion_models_draw_the_members_in_turn(image):
    first, second = Constant(-1), Constant(0.5)
    source = DiffusionSource([first, second], members=5)
    ensembles = source.ensembles([image, image], ["one", "other"])
    inside = np.stack([one.probabilities[:, 1] for one in ensembles])  # (2, 5, 16, 16)
    np.testing.assert_allclose(inside[..., 0, 0], [[0, 0.75, 0, 0.75, 0]] * 2)
    assert [len(one.numbers) for one in (first, second)] == [6, 4]
    assert not set(first.numbers) & set(second.numbers)  # no noise twice
    assert source.facts["model_sha256"] == ["-1", "0.5"]
    assert not source.joint

    assert [DiffusionSource([first] * count).members for count in (1, 7)] == [5, 7]
    for other, message in (
        (Constant(0, split_sha256="t"), "same classes, images, preprocessing and split"),
        (Constant(0, steps=10), "same sampling settings"),
    ):
        with pytest.raises(LdmError, match=f"those of an ensemble need the {message}"):
            DiffusionSource([first, other])
    with pytest.raises(LdmError, match="members is 1; legal: 2 or more, one of each model"):
        DiffusionSource([first, second], members=1)


def test_dropout_draws_members_by_name_and_seed(image):
    source = NetworkSource([network(0, 0.5)], ["a"], members=3)
    one, again, other = (source.ensembles([image], [name])[0].probabilities for name in ("one", "one", "other"))
    reseeded = NetworkSource(source.segmenters, ["a"], 3, seed=1).ensembles([image], ["one"])[0].probabilities
    assert np.abs(one - reseeded).max() > 1e-3
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one[0] - one[1]).max() > 1e-3
    more = NetworkSource(source.segmenters, ["a"], members=5).ensembles([image], ["one"])[0].probabilities
    np.testing.assert_array_equal(more[:3], one)  # the same however many are drawn
    plain = source.segmenters[0].probabilities(np.stack([image, image]))
    np.testing.assert_allclose(plain[0], plain[1], atol=1e-6)  # off again


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_memory_is_that_of_one_member(image, dropout, monkeypatch):
    one, batches = network(0, dropout), []
    monkeypatch.setattr(one.network, "forward", lambda x: batches.append(len(x)) or torch.cat([x, x], 1)[:, :2])
    NetworkSource([one] if dropout else [one] * 4, ["a"] * 4, members=4).ensembles([image], ["one"])
    assert batches == [1] * 4


def test_images_go_where_the_network_is(image, monkeypatch):
    """The meta device stands for a GPU: what is not brought to it is refused."""
    one, seen = network(0), []
    one.network.to("meta")
    monkeypatch.setattr("ldm.model.segmenter.autocast", lambda device: contextlib.nullcontext())  # meta has none
    monkeypatch.setattr(one.network, "forward", lambda x: seen.append(x.device.type) or torch.zeros(1, 2, 16, 16))
    one.probabilities(image[None])
    one.segment(image)
    assert seen == ["meta", "meta"]


def test_a_subject_without_an_image_is_named():
    source = NetworkSource([network(0)], ["a"])
    record = Record("p1", "p1", {"FLAIR": "b.png", "T1": "a.png"}, None, {}, "test")
    assert list(in_order(record, source).images) == ["T1", "FLAIR"]
    with pytest.raises(LdmError, match="'p1' lacks FLAIR"):
        in_order(replace(record, images={"T1": "a.png"}), source)
    with pytest.raises(LdmError, match="'FLAR' is no image that this model is given. Did you mean 'FLAIR'"):
        in_order(replace(record, images={**record.images, "FLAR": "c.png"}), source)


def test_volumes_are_of_the_files_voxels():
    """A model grid of 2 mm in files of 1 mm: 8 of its voxels are 64 of the file's, 64 mm3; members 0 and 16 voxels."""
    way = Geometry.plan((8, 8, 8), np.eye(4), "RAS", 2.0)
    inside = np.zeros((2, 4, 4, 4), np.float32)
    inside[0, :2, :2, :4] = 1.0  # 16 voxels, probability 1 of the first member
    inside[:, :2, :2, :2] = [[[[1.0]]], [[[0.4]]]]  # mean 0.7; the second member is below one half
    result = in_file_space(Ensemble(np.stack([1 - inside, inside], axis=1)), way)
    assert result.labels.shape == (8, 8, 8)
    (row,) = volumes(result, CLASSES)
    assert (row["volume"], row["members_mean"], row["unit"]) == (64.0, 64.0, "mm3")
    assert (row["low"], row["high"]) == pytest.approx((0.025 * 128, 0.975 * 128))
    single = in_file_space(Ensemble(np.stack([1 - inside, inside], axis=1)[:1]), way)
    assert [volumes(single, CLASSES)[0][end] for end in ("low", "high")] == [None, None]


@pytest.mark.parametrize(
    ("volumes_found", "shown"),
    [
        ([0, 0, 5, 0, 9, 1, 0, 0], [4, 2, 5, 0, 1, 3]),
        ([0, *range(1, 13)], [12, 10, 8, 6, 4, 2]),
        ([0, 0], [0, 1]),
    ],
)
def test_the_panel_shows_where_something_was_found(tmp_path, volumes_found, shown):
    records = [Record(str(k), str(k), {}, None, {}, "test", str(k)) for k in range(len(volumes_found))]
    for record, volume in zip(records, volumes_found, strict=True):
        (tmp_path / f"{record.id}_volumes.json").write_text(json.dumps([{"members_mean": volume}, {"members_mean": 0}]))
    assert [int(record.id) for record in telling(tmp_path, records)] == shown


AUGMENTED = Augmentation(flip_axes=(0, 1), scale=0.2, shift=2, rotate=30, brightness=0.2)


def disc():
    """A smooth bright disc in two channels, and the probability of one that knows it by its brightness."""
    y, x = np.meshgrid(np.arange(48), np.arange(48), indexing="ij")
    bright = np.exp(-((y - 20) ** 2 + (x - 27) ** 2) / 72)
    return np.stack([bright, bright]).astype(np.float32)


def knowing(dropout=0.0):
    """A network that takes what is brighter than a half of the brightest."""
    made = network(0, dropout)

    def probabilities(images, dropout=False):
        inside = (images[:, 0] > images[:, 0].max() / 2).astype(np.float32)  # (B, *S)
        return np.stack([1 - inside, inside], 1)

    return SimpleNamespace(
        **{name: getattr(made, name) for name in vars(made)}, probabilities=probabilities, device=made.device
    )


@pytest.mark.parametrize(
    ("networks", "dropout", "kind"), [(1, 0.0, "network"), (1, 0.5, "dropout"), (3, 0.0, "deep ensemble")]
)
def test_members_see_changed_images_and_answer_where_the_image_was(networks, dropout, kind):
    image = disc()
    source = NetworkSource([knowing(dropout)] * networks, ["a"] * networks, 3, augmentation=AUGMENTED)
    assert (source.facts["kind"], source.facts["augment"]["rotate"]) == (kind, 30)
    assert source.joint == (kind != "dropout")  # dropout is drawn for each image anew
    (ensemble,) = source.ensembles([image], ["one"])
    truth = image[0] > 0.5
    np.testing.assert_array_equal(ensemble.probabilities[0, 1], truth)  # the first sees the image as it is
    np.testing.assert_allclose(ensemble.probabilities.sum(1), 1, atol=1e-5)
    for member in (1, 2):
        assert np.abs(source.views.seen(image, member) - image).max() > 0.2
        assert dice(ensemble.member_labels[member] > 0, truth) > 0.95
    again = NetworkSource([knowing(dropout)] * networks, ["a"] * networks, 3, augmentation=AUGMENTED)
    np.testing.assert_array_equal(again.ensembles([image], ["one"])[0].probabilities, ensemble.probabilities)


@pytest.mark.parametrize(
    ("members", "augmentation", "intensity", "message"),
    [
        (1, AUGMENTED, {}, "first member sees the image as it is; legal: members of 2 or more"),
        (3, Augmentation(), {}, "augment changes nothing"),
        (3, Augmentation(gamma=0.1), {"kind": "zscore"}, r"augment\.gamma: z-scored images have no range"),
        (3, Augmentation((0, 2)), {}, r"^augment\.flip_axes: \[0, 2\] must lie in 0\.\.1"),
    ],
)
def test_views_that_tell_nothing_are_refused(members, augmentation, intensity, message):
    made = network(0)
    made = replace(made, preprocessing=replace(made.preprocessing, intensity=IntensityRecipe(**intensity)))
    with pytest.raises(LdmError, match=message):
        NetworkSource([made], ["a"], members, augmentation=augmentation)


def test_what_a_view_does_not_reach_is_what_the_first_member_says():
    """Two classes that reach the ends of a volume with thick slices."""
    affine = np.diag([1.0, 1, 5, 1])
    recipe = Preprocessing(3, None, None, (32, 32, 8), reference=Geometry.plan((32, 32, 8), affine))
    views = Views(Augmentation((0,), scale=0.1, shift=3, rotate=10), recipe)
    truth = np.zeros((3, 32, 32, 8), np.float32)  # (K + 1, *S)
    truth[1, 8:16, 10:22], truth[2, 16:24, 10:22] = 1, 1
    truth[0] = 1 - truth[1:].sum(0)
    members = np.stack([views.seen(truth, member) for member in range(4)])  # what a perfect network says of each view
    members[:, 0] = 1 - members[:, 1:].sum(1)
    back = views.back(members)
    np.testing.assert_allclose(back.sum(1), 1, atol=1e-4)
    found = (back.argmax(1) == np.arange(3)[:, None, None, None, None]).sum((2, 3, 4))  # (K + 1, M)
    np.testing.assert_allclose(found[1:], np.broadcast_to(truth[1:].sum((1, 2, 3))[:, None], (2, 4)), rtol=0.06)
    assert (views.seen(truth, 1) != Views(views.augmentation, recipe, seed=1).seen(truth, 1)).any()
