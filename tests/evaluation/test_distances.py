"""Distances with their protocol: rows against one reference, feature networks, folders, the report."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from monai.networks.nets import resnet10
from safetensors.torch import save_file

from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.distances import (
    CONTROL,
    FLOOR,
    FURTHER,
    PRIOR,
    RECONSTRUCTED,
    SAMPLES,
    blurred,
    compare,
    model_distances,
    principal_directions,
)
from ldm.evaluation.features import MedicalNetFeatures, check_features, extract, find_features
from ldm.evaluation.folders import (
    SYNTHETIC,
    evenly_over_subjects,
    folder_distances,
    halves_by_subject,
    image_references,
    read_all,
    subject_of,
)
from ldm.evaluation.goals import NOT_MEASURED, realism
from tests.model.test_predictor import predictor
from tests.model.test_transfer import AGE, model

RECIPE = Preprocessing(
    2, None, None, (8, 8), (1, 1), IntensityRecipe("window", 0, 255), ("image",), Geometry.plan((8, 8), shape=(8, 8))
)


class Texture:
    """Mean, standard deviation and roughness of an image as features; everything a feature network has."""

    def __init__(self, preprocessing=RECIPE):
        self.preprocessing = preprocessing
        self.identity = {
            "name": "texture",
            "sha256": "0" * 64,
            "kind": "fake",
            "spatial_dims": 2,
            "trained_on": {"cohort": "test", "split_sha256": "ours"},
        }

    def __call__(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images.diff(dim=2).abs().mean((1, 2, 3))], 1)


def images(n, seed, size=8, level=0.5, channels=1):
    rng = np.random.default_rng(seed)
    levels = level + 0.1 * rng.standard_normal((n, 1, 1, 1))
    return list((levels + 0.1 * rng.standard_normal((n, channels, size, size))).clip(0, 1).astype(np.float32))


# protocol -----------------------------------------------------------------------------------------------


def evaluated(made, held_out=24, drawn=20, training_subjects=40, network=None, **options):
    """Distances of a model whose reconstructions are perfect and whose samples are too bright."""
    train = [{"image": torch.from_numpy(np.concatenate([1 - x, x]))} for x in images(40, 1)]
    records = [SimpleNamespace(subject=f"sub-{i % training_subjects}") for i in range(len(train))]
    datamodule = SimpleNamespace(
        dataset={"train": train}.get,
        cohort=SimpleNamespace(split={"train": records}.get),
        preprocessing=SimpleNamespace(channels=("other", "a")),
    )  # the model generates the second channel only
    made.preprocessing = replace(made.preprocessing, reference=RECIPE.reference)
    real, control = images(held_out, 2), map(blurred, images(held_out, 2))
    sets = real, real, images(drawn, 3, level=0.8), control
    return model_distances(network or Texture(), made, datamodule, *sets, **options)


def autoencoder_model():
    first_stage = {
        "kind": "autoencoder_kl",
        "spatial_dims": 2,
        "channels": [8, 8],
        "latent_channels": 1,
        "norm_num_groups": 4,
    }
    return model([AGE], "concat", channels=1, first_stage=first_stage, latent_shape=[1, 4, 4])


def test_every_row_is_measured_at_the_same_n_against_the_training_split():
    result = evaluated(autoencoder_model(), n_ref=30)
    rows, protocol = result["rows"], result["protocol"]
    assert list(rows) == [FLOOR, CONTROL, RECONSTRUCTED, PRIOR, SAMPLES]
    assert {row["n"] for row in rows.values()} == {20} == {protocol["n"]}
    assert protocol["reference"] == {"images": "training split", "n": 30, "of": 40}
    assert protocol["available"] == {"held-out images": 24, "samples": 20}
    assert protocol["features"]["sha256"] == "0" * 64
    assert protocol["image_size"] == [1, 8, 8]
    assert protocol["value_range"] == [0, 1]
    assert rows[RECONSTRUCTED] == rows[FLOOR]  # the same images here
    low, high = rows[FLOOR]["frechet_ratio_interval"]
    assert low < 1 < high
    assert rows[FLOOR]["density"] > 0.6
    assert result["control_is_worse"]
    for bad in (CONTROL, PRIOR, SAMPLES):
        assert rows[bad]["frechet_ratio"] > 3, bad
        assert rows[bad]["kid_interval"][0] > rows[FLOOR]["kid"], bad
    for row in rows.values():
        assert row["frechet_interval"][0] <= row["frechet"] <= row["frechet_interval"][1]
    assert json.loads(json.dumps(result)) == result
    assert evaluated(autoencoder_model(), n_ref=30) == result
    assert evaluated(autoencoder_model(), n_ref=30, seed=1)["rows"] != rows


def test_what_files_gave_back_is_not_rounded_again():
    class Watching(Texture):
        def __call__(self, images):
            seen.extend(images.numpy())
            return super().__call__(images)

    seen = []
    evaluated(model([AGE], "concat", channels=1), network=Watching())
    first = images(24, 2)[0]  # a held-out image, whose values are not those of 8 bits
    assert any((image == first).all() for image in seen)


def test_further_seeds_are_rows_and_their_spread_is_said():
    drawn = {1: images(20, 4, level=0.8), 2: images(20, 5, level=0.8)}
    result = evaluated(autoencoder_model(), further=drawn)
    names = [SAMPLES, FURTHER.format(1), FURTHER.format(2)]
    assert [name for name in result["rows"] if name in names] == names
    for metric in ("frechet", "kid", "frechet_ratio"):
        values = [result["rows"][name][metric] for name in names]
        assert result["seeds"][metric] == {
            "values": values,
            "mean": pytest.approx(np.mean(values)),
            "std": pytest.approx(np.std(values, ddof=1)),
        }
    assert len(set(values)) == 3
    assert "seeds" not in evaluated(autoencoder_model())


def test_a_metric_that_ranks_a_control_above_real_images_is_named():
    rng = np.random.default_rng(0)
    reference, real = rng.standard_normal((80, 3)), rng.standard_normal((40, 3))
    sets = {"real": real, "blurred": 3 + real, "crowded": 0.3 * real, "x": real}
    result = compare(reference, sets, "real", "blurred", {}, controls=["blurred", "crowded"])
    assert result["controls"] == ["blurred", "crowded"]
    assert result["untrusted"]["precision"] == ["crowded"]  # inside the real ones, without being like them
    assert result["untrusted"]["density"] == ["crowded"]
    assert not {"frechet", "kid", "mmd", "recall"} & set(result["untrusted"])


def test_there_is_no_prior_in_pixel_space():
    assert PRIOR not in evaluated(model([AGE], "concat", channels=1))["rows"]


def test_too_few_images_give_no_distances_and_a_warning(caplog):
    assert evaluated(model([AGE], "concat", channels=1), held_out=5) is None
    assert "there are 5; legal: 8 or more" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_subjects_are_counted_as_images_are(caplog, count):
    made, owners = model([AGE], "concat", channels=1), [f"sub-{i % count}" for i in range(24)]
    few = {"training images": {"training_subjects": count}, "held-out images": {"subjects": owners}}
    for what, given in few.items():
        caplog.clear()
        found = evaluated(made, **given)
        assert (found is None) == (count < 3)
        said = f"of {what}" in caplog.text and f"those of {count} subjects; legal: 3 subjects or more" in caplog.text
        assert said == (count < 3)


def test_few_images_are_compared_in_the_directions_in_which_the_reference_varies():
    rng = np.random.default_rng(0)
    spread = np.array([0.1, 5.0, 0.1, 3.0, *[0.1] * 36])
    reference = spread * rng.standard_normal((200, 40))
    axes, said = principal_directions(reference, 30)
    assert said["directions"] == axes.shape[1] == 3
    assert said["of"] == 40
    assert said["explained_variance"] > 0.95
    assert np.abs(axes[[1, 3], [0, 1]]).min() > 0.99
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert principal_directions(reference, 12)[0].shape == (40, 2)
    assert (principal_directions(reference, 80)[0] == np.eye(40)).all()
    sets = {FLOOR: spread * rng.standard_normal((30, 40)), CONTROL: 3 + spread * rng.standard_normal((30, 40))}
    result = compare(reference, sets, FLOOR, CONTROL, {"reference": {"n": 200, "images": "x"}})
    assert result["protocol"]["frechet"]["directions"] == 3
    assert result["control_is_worse"]


def test_more_features_than_images_are_cautioned_of_where_the_distance_stands(caplog):
    rng = np.random.default_rng(0)
    reference, sets = rng.standard_normal((60, 40)), {name: rng.standard_normal((30, 40)) for name in (FLOOR, CONTROL)}
    caution = compare(reference, sets, FLOOR, CONTROL, {})["protocol"]["frechet"]["caution"]
    assert caution.startswith("There are more features (40) than images (30)")
    assert caution in caplog.text
    fewer = {name: features[:, :30] for name, features in sets.items()}
    assert "caution" not in compare(reference[:, :30], fewer, FLOOR, CONTROL, {})["protocol"]["frechet"]


def test_a_distance_that_does_not_see_the_control_says_so():
    rng = np.random.default_rng(0)
    reference, good, bad = (rng.standard_normal((40, 3)) for _ in range(3))
    result = compare(reference, {"real": 5 + bad, "blurred": good, "x": good}, "real", "blurred", {"reference": {}})
    result["protocol"]["reference"] = {"n": 40, "images": "training split"}
    assert not result["control_is_worse"]
    verdict = realism(result, 1.5)
    assert verdict.status == NOT_MEASURED
    assert "cannot be trusted here: it does not call blurred worse than real images" in verdict.text


def test_only_sets_of_many_subjects_are_extrapolated_to_infinitely_many_images():
    rng = np.random.default_rng(0)
    for n, known in ((60, False), (120, True)):
        real, samples = rng.standard_normal((2, n, 2))
        row = compare(rng.standard_normal((120, 2)), {"real": real, "x": samples + 1}, "real", "x", {})["rows"]["x"]
        assert (row["frechet_infinity"] is not None) == known
    assert row["frechet_infinity"] == pytest.approx(2, abs=0.8)


def test_a_metric_at_its_end_for_real_images_and_a_control_says_nothing():
    rng = np.random.default_rng(0)
    reference, real = rng.standard_normal((2, 40, 3))
    inside = compare(reference, {"real": 0.3 * real, "moved": 0.3 * real + 0.2}, "real", "moved", {})
    assert inside["rows"]["real"]["precision"] == inside["rows"]["moved"]["precision"] == 1
    assert inside["untrusted"]["precision"] == ["moved"]
    same = compare(
        reference, {"real": real, "same": real, "worse": real + 1}, "real", "worse", {}, controls=["same", "worse"]
    )
    assert "frechet" not in same["untrusted"]  # images that are the same are none that are known to be worse


# feature networks ---------------------------------------------------------------------------------------


def test_features_come_in_float64_in_order_and_whatever_the_batch():
    network, stack = Texture(), images(7, 0)
    features = extract(network, iter(stack), batch_size=3)
    assert features.dtype == np.float64
    np.testing.assert_allclose(features, network(torch.from_numpy(np.stack(stack))).numpy(), rtol=1e-5)
    with pytest.raises(LdmError, match="no images"):
        extract(network, [])


def test_weights_that_are_not_there_are_no_error_and_a_wrong_word_is(tmp_path, caplog):
    assert find_features({"kind": "predictor", "path": str(tmp_path / "none")}) is None
    assert "distances are left out" in caplog.text
    assert "`ldm train-predictor`" in caplog.text
    with pytest.raises(LdmError, match="Did you mean 'predictor'"):
        find_features({"kind": "predicter"})
    with pytest.raises(LdmError, match="features.paht.*Did you mean 'path'"):
        find_features({"kind": "predictor", "paht": "x"})


def test_the_medical_network_gives_pooled_features_of_every_channel(tmp_path):
    torch.manual_seed(0)
    peer = resnet10(spatial_dims=3, n_input_channels=1, shortcut_type="B", bias_downsample=False)
    save_file(peer.state_dict(), tmp_path / "resnet10.safetensors")
    config = {"kind": "medicalnet", "path": tmp_path / "resnet10.safetensors", "backbone": "resnet10"}
    network, again = find_features(config), MedicalNetFeatures(tmp_path / "resnet10.safetensors")
    assert network.identity == again.identity
    x = torch.rand(2, 2, 16, 16, 16)
    features = network(x)
    assert features.shape == (2, 2 * 512)
    torch.testing.assert_close(network(x[:, 1:]), features[:, 512:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(100 * x + 7), features, atol=1e-3, rtol=1e-3)  # standardised
    peer.eval()
    x = (x - x.mean((2, 3, 4), keepdim=True)) / x.std((2, 3, 4), keepdim=True)
    with torch.no_grad():
        peer.fc = torch.nn.Identity()  # what stands before it is average pooling
        torch.testing.assert_close(peer(x[:, :1]), features[:, :512], atol=1e-4, rtol=1e-3)
    with pytest.raises(LdmError, match="does not hold a 3-D resnet18"):
        MedicalNetFeatures(tmp_path / "resnet10.safetensors", "resnet18")


def test_a_predictor_says_what_it_was_trained_on(tmp_path):
    made, path = predictor(), tmp_path / "model.safetensors"
    made.save(path)
    network = find_features({"kind": "predictor", "path": str(path), "backbone": "resnet10"})
    assert network.identity == {
        "name": str(path),
        "sha256": made.sha256,
        "kind": "predictor",
        "spatial_dims": 2,
        "trained_on": {"cohort": "test", "split": "train", "split_sha256": "0" * 64, "targets": ["age", "sex"]},
    }
    check_features(network, made.preprocessing, "test", "0" * 64)
    x = torch.rand(2, 2, 12, 8)
    torch.testing.assert_close(network(x), made.features(x))


def test_a_network_for_other_images_or_with_another_split_is_refused():
    check_features(Texture(), RECIPE, "test", "ours")
    check_features(Texture(), RECIPE, "another cohort", "any")
    with pytest.raises(LdmError, match="another split of test"):
        check_features(Texture(), RECIPE, "test", "other")
    prepared = replace(RECIPE, intensity=IntensityRecipe("zscore"))
    with pytest.raises(LdmError, match="prepared otherwise \\(intensity"):
        check_features(Texture(prepared), RECIPE, "test", "ours")
    with pytest.raises(LdmError, match="is for 2-D images, these are 3-D"):
        check_features(Texture(), Preprocessing(3), "test", "ours")


# folders ------------------------------------------------------------------------------------------------


def write_pictures(folder, stack):
    (folder / "deep").mkdir(parents=True)
    for i, x in enumerate(stack):
        where = folder / "deep" if i % 2 else folder
        PIL.Image.fromarray((255 * x[0]).astype(np.uint8)).save(where / f"{i:03}.png")


@pytest.fixture
def folders(tmp_path):
    """32 real pictures; synthetic ones that are too bright, in an archive, of another size."""
    write_pictures(tmp_path / "real", images(32, 0))
    (tmp_path / "synthetic").mkdir()
    stack = np.concatenate(images(20, 1, size=10, level=0.8))
    np.savez(tmp_path / "synthetic" / "drawn.npz", images=(255 * stack).astype(np.uint8))
    (tmp_path / "synthetic" / "readme.txt").write_text("no image")
    return tmp_path / "real", tmp_path / "synthetic"


def test_masks_and_mosaics_are_no_images_and_a_person_is_in_one_half(tmp_path):
    for name in ("sub-01_ses-1_T1w.nii.gz", "sub-01_dseg.nii.gz", "mosaic.png", "sub-02_mask.png", "sub-03.png"):
        (tmp_path / name).touch()
    found = image_references(tmp_path, RECIPE)
    assert [Path(ref).name for ref in found] == ["sub-01_ses-1_T1w.nii.gz", "sub-03.png"]
    refs = [f"sub-{i:02}_ses-{k}_T1w.nii.gz" for i in range(9) for k in range(2)] + ["scan_a.png", "scan_b.png"]
    halves = halves_by_subject(refs, 0)
    assert sorted([*halves[0], *halves[1]]) == sorted(refs)
    whose = [{subject_of(ref) for ref in half} for half in halves]
    assert not whose[0] & whose[1]
    assert abs(len(whose[0]) - len(whose[1])) <= 1
    assert subject_of("scan_a.png") != subject_of("scan_b.png")


def test_fewer_images_than_a_half_has_are_of_as_many_subjects_as_can_be():
    refs = [f"sub-{i:02}_slice-{k}.png" for i in range(6) for k in range(10 + i)]
    chosen = evenly_over_subjects(refs, 13, seed=0)
    counts = Counter(map(subject_of, chosen))
    assert len(set(chosen)) == 13
    assert sorted(counts.values()) == [2, 2, 2, 2, 2, 3]
    assert evenly_over_subjects(refs, 13, seed=1) != chosen


def test_files_of_several_channels_are_one_image(tmp_path):
    recipe = replace(RECIPE, channels=("T1", "c_T1"))  # one name ends like the other
    network = Texture(recipe)
    for folder, level in (("real", 0.5), ("synthetic", 0.8)):
        (tmp_path / folder).mkdir()
        for i, x in enumerate(images(32, 0, level=level, channels=2)):
            for name, channel in zip(recipe.channels, x, strict=True):
                file = tmp_path / folder / f"sub-{i + 1:06d}_{name}.png"
                PIL.Image.fromarray((255 * channel).astype(np.uint8)).save(file)
    real, synthetic = tmp_path / "real", tmp_path / "synthetic"
    refs = image_references(real, recipe)
    assert [Path(ref).name for ref in refs] == [f"sub-{i + 1:06d}_T1.png" for i in range(32)]
    both = next(read_all(recipe, refs, real))
    for x, name in zip(both, recipe.channels, strict=True):
        with PIL.Image.open(real / f"sub-000001_{name}.png") as picture:
            np.testing.assert_allclose(255 * x, np.asarray(picture), atol=1e-3)
    assert folder_distances(network, real, synthetic)["rows"][SYNTHETIC]["frechet_ratio"] > 3
    for name, other in (recipe.channels, recipe.channels[::-1]):
        (synthetic / f"sub-000007_{name}.png").rename(tmp_path / "kept.png")
        with pytest.raises(LdmError, match=rf"sub-000007_{name}.png is missing beside .*sub-000007_{other}.png"):
            folder_distances(network, real, synthetic)
        (tmp_path / "kept.png").rename(synthetic / f"sub-000007_{name}.png")


def test_a_release_of_several_channels_has_bids_suffixes(tmp_path):
    recipe = replace(RECIPE, channels=("T1", "FLAIR"))
    anat = tmp_path / "shard-000" / "sub-000001" / "anat"
    anat.mkdir(parents=True)
    for suffix, rows in (("FLAIR", 1), ("T1w", 5)):  # of 255, and otherwise 0
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:rows] = 255
        PIL.Image.fromarray(pixels).save(anat / f"sub-000001_{suffix}.png")
    (tmp_path / "release.json").write_text('{"suffixes": {"T1": "T1w", "FLAIR": "FLAIR"}}')
    refs = image_references(tmp_path, recipe)
    assert [Path(ref).name for ref in refs] == ["sub-000001_T1w.png"]
    (image,) = read_all(recipe, refs, tmp_path)
    assert image[:, :, 0].sum(1).tolist() == pytest.approx([5, 1])  # T1, then FLAIR
    with pytest.raises(LdmError, match="is a release of T1, FLAIR; T2 is not in it"):
        image_references(tmp_path, replace(RECIPE, channels=("T2", "FLAIR")))


def test_two_folders_are_compared_with_real_halves_as_floor(folders, ldm, monkeypatch):
    monkeypatch.setattr("ldm.commands.evaluate.find_features", lambda *given: Texture())
    code, text = ldm("evaluate", f"real={folders[0]}", f"synthetic={folders[1]}", "run_dir=out")
    assert not code, text
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert set(metrics["ms_ssim"]["difference"]) == {"samples"}
    assert metrics["ms_ssim"]["protocol"]["images"] == 16
    result = metrics["distances"]
    assert result["protocol"]["available"] == {"real": 32, "synthetic": 20}
    assert result["protocol"]["reference"] == {"images": "real images, one half", "n": 16, "of": 32}
    assert result["protocol"]["n"] == 16
    assert result["control_is_worse"]
    assert result["rows"][SYNTHETIC]["frechet_ratio"] > 3
    page = Path("out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "differ from each other as much as real ones do?" in page
    for said in (SYNTHETIC, "16 images, compared", "0" * 16, str(folders[1]), "(control)", "http"):
        assert (said in page) == (said != "http"), said


def test_folders_say_what_is_wrong_with_them(folders, ldm, tmp_path):
    real, synthetic = folders
    code, text = ldm("evaluate", f"real={real}")
    assert code
    assert "synthetic=DIR is missing" in text
    code, text = ldm("evaluate", f"real={real}", f"synthetic={synthetic}")
    assert code
    assert "features.path=runs/simulated/predictor/model.safetensors" in text
    with pytest.raises(LdmError, match="nowhere: is no folder"):
        folder_distances(Texture(), tmp_path / "nowhere", synthetic)
    (tmp_path / "few").mkdir()
    with pytest.raises(LdmError, match="synthetic has 0 images"):
        folder_distances(Texture(), real, tmp_path / "few")
    with pytest.raises(LdmError, match="features.kind=predictor"):
        folder_distances(Texture(preprocessing=None), real, synthetic)
    (real / "003.png").write_bytes(b"broken")
    with pytest.raises(LdmError, match="003.png: cannot be read"):
        folder_distances(Texture(), real, synthetic)


def test_blurring_keeps_channels_apart():
    x = np.concatenate([np.zeros((1, 8, 8)), images(1, 0)[0]])  # (2, 8, 8)
    assert (blurred(x)[0] == 0).all()
    assert blurred(x)[1].std() < 0.5 * x[1].std()
    assert blurred(x)[1].mean() == pytest.approx(x[1].mean(), abs=0.02)
