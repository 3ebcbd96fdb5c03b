"""What is measured on a written sample is the sample, not how it was stored."""

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from omegaconf import OmegaConf

from ldm.commands import evaluate, evaluation_images
from ldm.commands.evaluate import keep_audit, keep_nearest
from ldm.commands.held_out import evenly_first, read_sample
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.evaluation.distances import blurred
from ldm.evaluation.fidelity import ImageSet
from ldm.evaluation.pictures import evenly, pictures
from ldm.model.output import as_written, image_paths, write_image
from ldm.training import figures

RGB = tuple(f"photo_{colour}" for colour in ("red", "green", "blue"))
LAS = np.diag([-2.0, 1.5, 3.0, 1.0])


@pytest.mark.parametrize(
    "recipe", [IntensityRecipe("window", -1000.0, 400.0, (-1.0, 1.0)), IntensityRecipe("percentile")], ids=str
)
def test_a_written_sample_comes_back_with_all_channels_in_the_models_range(tmp_path, recipe):
    reference = Geometry.plan((6, 7, 8), LAS, "RAS", None, (8, 8, 8))  # padded on the way in
    model = SimpleNamespace(
        preprocessing=Preprocessing(3, shape=(8, 8, 8), intensity=recipe, channels=("T1", "T2"), reference=reference)
    )
    image = np.full((2, 8, 8, 8), recipe.range[0], np.float32)
    image[:, 1:7, 1:8] = np.random.default_rng(0).uniform(*recipe.range, (2, 6, 7, 8))
    paths = image_paths(model, tmp_path, "sub-000001")
    write_image(model, image, paths)
    np.testing.assert_allclose(read_sample(model, paths), image, atol=1e-5)


@pytest.mark.parametrize(("channels", "files"), [(RGB, 1), (("T1", "T2", "FLAIR"), 3)], ids=["RGB", "three channels"])
def test_a_written_picture_comes_back_with_all_channels(tmp_path, channels, files):
    recipe = IntensityRecipe("window", 0.0, 255.0, (-1.0, 1.0))
    reference = Geometry.plan((6, 7), shape=(8, 8))  # padded on the way in
    model = SimpleNamespace(preprocessing=Preprocessing(2, None, None, (8, 8), (1, 1), recipe, channels, reference))
    image = np.full((3, 8, 8), -1.0, np.float32)
    image[:, 1:7, 1:] = np.random.default_rng(0).integers(0, 256, (3, 6, 7)) / 127.5 - 1
    paths = image_paths(model, tmp_path, "sub-000001")
    write_image(model, image, paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert len(paths) == files
    assert {PIL.Image.open(path).mode for path in paths} == {"RGB" if files == 1 else "L"}
    np.testing.assert_allclose(read_sample(model, paths), image, atol=1e-5)


@pytest.mark.parametrize(
    ("limits", "step"), [((None, None), 10 / 255), ((-1.0, 3.0), 4 / 255)], ids=["free", "cut off"]
)
def test_written_z_scores_come_back_as_they_were(tmp_path, limits, step):
    recipe = Preprocessing(
        2, None, None, (8, 8), (1, 1), IntensityRecipe("zscore", *limits), ("T1",), Geometry.plan((8, 8))
    )
    model = SimpleNamespace(preprocessing=recipe)
    for number, (low, high) in enumerate([(-1.0, 3.0), (-0.2, 0.1)]):  # a picture of little contrast stays one
        image = np.random.default_rng(number).uniform(low, high, (1, 8, 8)).astype(np.float32)
        paths = image_paths(model, tmp_path, f"sub-{number}")
        write_image(model, image, paths)
        np.testing.assert_allclose(read_sample(model, paths), image, atol=step / 2 + 1e-5)
        np.testing.assert_array_equal(as_written(recipe, image), read_sample(model, paths))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_image_that_was_not_written_is_made_comparable_to_one_that_was(tmp_path, spatial_dims):
    if spatial_dims == 2:
        reference, size = Geometry.plan((6, 7), shape=(8, 8)), (8, 8)
    else:  # files of half the model's spacing, so that writing interpolates
        reference, size = Geometry.plan((12, 14, 16), LAS, "RAS", (4.0, 3.0, 6.0), (8, 8, 8)), (8, 8, 8)
    recipe = IntensityRecipe("window", -1000.0, 400.0, (-1.0, 1.0))
    preprocessing = Preprocessing(
        spatial_dims, shape=size, intensity=recipe, channels=("T1", "T2"), reference=reference
    )
    model = SimpleNamespace(preprocessing=preprocessing)
    image = np.random.default_rng(0).uniform(-1, 1, (2, *size)).astype(np.float32)
    paths = image_paths(model, tmp_path, "sub-000001")
    write_image(model, image, paths)
    written = as_written(preprocessing, image)
    np.testing.assert_allclose(read_sample(model, paths), written, atol=1e-5)
    assert np.abs(written - image).max() > 1e-3  # something was lost


@pytest.fixture
def conditions(monkeypatch):
    """An evaluation of one held-out z-scored volume that files hold at another spacing, rebuilt 0.5 too bright."""
    reference = Geometry.plan((12, 14, 16), LAS, "RAS", (4.0, 3.0, 6.0), (8, 8, 8))
    recipe = Preprocessing(
        3, shape=(8, 8, 8), intensity=IntensityRecipe("zscore"), channels=("T1",), reference=reference
    )
    loaded = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    model = SimpleNamespace(
        preprocessing=recipe, header={}, reconstructs=True, reconstruct=lambda images, rows: images + 0.5
    )
    records = [Record("a", "a", {}, None, {}, "test")]
    monkeypatch.setattr(evaluation_images, "held_out_set", lambda *_: (ImageSet([loaded], [{}], ["a"]), records))
    monkeypatch.setattr(evaluation_images, "generated", lambda setup, real, records: (real, {}))
    monkeypatch.setattr(evaluation_images, "draw_samplers", lambda *_: {})
    config = SimpleNamespace(n=1, n_ref=1, seed=0)
    return SimpleNamespace(model=model, datamodule=None, network=None, config=config, samplers={}, path=None), loaded


def test_real_images_are_measured_as_files_give_them_back_and_the_first_stage_without_files(conditions):
    setup, loaded = conditions
    images, recipe = evaluation_images.drawn_images(setup), setup.model.preprocessing
    written = as_written(recipe, loaded)
    assert np.abs(written - loaded).max() > 0.1
    np.testing.assert_array_equal(images.real.images, [written])
    np.testing.assert_array_equal(images.rebuilt, [as_written(recipe, loaded + 0.5)])
    assert images.value_range == (-5, 5)
    assert images.reconstruction["psnr_mean"] == pytest.approx(20 * np.log10(10 / 0.5), abs=1e-3)


def test_distances_are_of_images_that_went_through_files_once(conditions, monkeypatch):
    setup, loaded = conditions
    given = {}
    monkeypatch.setattr(evaluate, "model_distances", lambda *sets, **more: given.update(more, sets=sets))
    images = evaluation_images.drawn_images(setup)
    evaluate.distances(setup, images)
    _, _, _, real, rebuilt, _ = given["sets"]
    assert real is images.real.images
    assert rebuilt is images.rebuilt
    np.testing.assert_array_equal(list(given["control"]), [as_written(setup.model.preprocessing, blurred(loaded))])


def test_pictures_show_the_same_cases_evenly_from_a_sorted_table(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "mosaic", lambda images, path, *_, **__: shown.update({path.name: images}))
    numbers = [np.full((1, 4, 4), float(k)) for k in range(40)]
    real = ImageSet(numbers, [{}] * 40, list(map(str, range(40))))
    samples = ImageSet([-image for image in numbers], real.rows, real.subjects)
    pictures(
        SimpleNamespace(preprocessing=SimpleNamespace(is_rgb=False, spatial_dims=2)), real, samples, tmp_path, (0, 1)
    )
    cases = [image[0, 0, 0] for image in shown["real.png"]]
    assert len(cases) == 16
    assert (cases[0], cases[-1]) == (0, 37)
    assert [-image[0, 0, 0] for image in shown["samples.png"]] == cases
    assert [image[0, 0, 0] for image in shown["pairs.png"]] == [sign * case for case in cases for sign in (1, -1)]
    assert evenly(3, 16) == [0, 1, 2]


def test_fewer_samples_than_subjects_ask_evenly_from_all():
    names, numbers = evenly_first(3, list("abcdefg"), range(7))
    assert names == list("acebdfg")
    assert numbers == [0, 2, 4, 1, 3, 5, 6]
    assert evenly_first(9, list("abc")) == [list("abc")]


def test_an_audit_of_other_images_comes_without_its_pictures(tmp_path, caplog):
    (tmp_path / "audit/figures").mkdir(parents=True)
    PIL.Image.new("L", (4, 4)).save(tmp_path / "audit/figures/nearest_latents.png")
    path, metrics = tmp_path / "audit/audit.json", {"model_sha256": "a", "sampling": {"guidance_scale": 1.5}}
    config = OmegaConf.create({"audit": str(path), "audit_pictures": True})
    for scale, shown in ((1.5, 1), (4.0, 0)):
        path.write_text(json.dumps({"model_sha256": "a", "protocol": {"sampling": {"guidance_scale": scale}}}))
        (tmp_path / f"{scale}/figures").mkdir(parents=True)
        keep_audit(metrics, config, tmp_path / str(scale))
        assert (tmp_path / f"{scale}/audit.json").is_file()
        assert len(list((tmp_path / f"{scale}/figures").iterdir())) == shown
    assert "drawn otherwise: guidance_scale 4.0 there, 1.5 here" in caplog.text


@pytest.mark.parametrize(("wanted", "kept"), [(True, ["nearest_latents.png"]), (False, [])])
def test_training_scans_come_into_a_report_only_when_asked_for(tmp_path, wanted, kept):
    for folder, name in (
        ("audit", "nearest_latents.png"),
        ("evaluation", "nearest_features.png"),
    ):  # the last is an older one
        (tmp_path / folder / "figures").mkdir(parents=True)
        PIL.Image.new("L", (4, 4)).save(tmp_path / folder / "figures" / name)
    keep_nearest(tmp_path / "audit", tmp_path / "evaluation", wanted)
    assert [path.name for path in (tmp_path / "evaluation/figures").iterdir()] == kept
    keep_nearest(tmp_path / "audit", tmp_path / "audit", wanted)  # both in one folder: the audit's own page needs them
    assert (tmp_path / "audit/figures/nearest_latents.png").is_file()
