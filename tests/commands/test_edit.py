"""``ldm edit`` from the command line to the files: in the scan's own space, and only what was asked for changes."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from omegaconf import OmegaConf

from ldm.commands.edit import asked_edit
from ldm.conditioning.build import complete
from ldm.data.geometry import Geometry
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.edited_image import EditedImage
from tests.model.test_transfer import AGE, SEX, model

# posterior and right come first, and no voxel size is the model's
AFFINE = np.array([[-1.5, 0, 0, 7], [0, -1.0, 0, 5], [0, 0, 2.0, -3], [0, 0, 0, 1.0]])
SHAPE = (9, 13, 11)  # 6.75, 6.5 and 11 of the model's 8 voxels: padded and cropped
WINDOW = IntensityRecipe("window", 0.0, 1000.0, (-1.0, 1.0))


def save_model(path, preprocessing, **settings):
    """A small network that was never trained, on voxels, for images that are prepared like this."""
    channels, size = len(preprocessing.channels), preprocessing.shape
    first_stage = {"kind": "identity", "spatial_dims": len(size), "in_channels": channels}
    header = {"first_stage": first_stage, "latent_shape": [channels, *size], **settings}
    made = model([AGE, SEX], "concat", channels=channels, **header)
    made.preprocessing = preprocessing
    made.save(path)


def volumes(channels):
    reference = Geometry.plan((8, 8, 8), np.diag([2.0, 2.0, 2.0, 1.0]), "RAS", (2.0, 2.0, 2.0), (8, 8, 8))
    return Preprocessing(3, "RAS", (2.0, 2.0, 2.0), (8, 8, 8), (2, 2, 2), WINDOW, channels, reference)


def pictures(channels):
    return Preprocessing(
        2, None, None, (8, 8), (2, 2), IntensityRecipe("window", 0.0, 255.0), channels, Geometry.plan((8, 8))
    )


def ramp(steps=(1, 2, 3)):
    """A scan that differs along every axis, so that a wrong orientation shows."""
    i, j, k = np.indices(SHAPE)
    values = steps[0] * i + steps[1] * j + steps[2] * k
    return (100 + 800 * values / values.max()).astype(np.float32)


def write_scan(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)


def data(path):
    return np.asarray(nib.load(path).dataobj, np.float32)


def test_image_to_image_in_the_scans_own_space(ldm, tmp_path):
    save_model(tmp_path / "m.safetensors", volumes(("T1",)))
    write_scan(tmp_path / "scan.nii.gz", ramp())
    request = ("edit", "model=m.safetensors", "image=scan.nii.gz", "covariates=[{age: 50},{age: 75, sex: F}]")
    request = (*request, "steps=50", "batch_size=1", "out=out")
    code, text = ldm(*request, "strength=0.02")
    assert not code, text
    assert "larger than the model's field of view, 8x8x8 voxels: what lies outside is background" in text
    scan, first = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out/sub-000001.nii.gz")
    assert first.shape == scan.shape
    np.testing.assert_allclose(first.affine, scan.affine)
    found, seen = data(tmp_path / "out/sub-000001.nii.gz"), slice(1, 9)  # 8 of 11 slices
    assert np.corrcoef(found[..., seen].ravel(), ramp()[..., seen].ravel())[0, 1] > 0.9
    assert (found[..., 0] == 0).all()  # the window's lower end
    np.testing.assert_allclose(data(tmp_path / "out/image.nii.gz"), ramp(), atol=1e-3)
    assert (tmp_path / "out/mosaic.png").is_file()
    table = pd.read_csv(tmp_path / "out/participants.tsv", sep="\t")
    assert table["age"].tolist() == [50, 75]
    assert table["strength"].tolist() == [0.02] * 2
    assert table["image"].tolist() == ["scan.nii.gz"] * 2
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["files_sha256"] == {
        "scan.nii.gz": hashlib.sha256((tmp_path / "scan.nii.gz").read_bytes()).hexdigest()
    }
    assert (record["sampling"]["edit"], record["sampling"]["num_inference_steps"]) == ("image-to-image", 50)

    lost = tmp_path / "out/sub-000002.nii.gz"
    before = data(lost)
    assert np.abs(before - found).max() > 1  # other noise, other covariates
    lost.unlink()
    assert not ldm(*request, "strength=0.02")[0]  # goes on where it stopped
    np.testing.assert_allclose(data(lost), before, atol=1e-2)
    code, text = ldm(*request, "strength=1.0")
    assert code
    assert "results of another request (inputs differ)" in text


def test_a_region_of_two_channels_is_filled_in_and_nothing_else_changes(ldm, tmp_path):
    save_model(tmp_path / "m.safetensors", volumes(("T1", "T2")))
    scans = {"T1": ramp(), "T2": ramp((3, 1, 2))}
    for name, scan in scans.items():
        write_scan(tmp_path / f"{name}.nii.gz", scan)
    fill = np.zeros(SHAPE, np.uint8)
    fill[3:6, 4:8, 4:7] = 1
    write_scan(tmp_path / "fill.nii.gz", fill)
    request = ("edit", "model=m.safetensors", "image={T2: T2.nii.gz, T1: T1.nii.gz}", "steps=4", "n=2", "out=out")
    code, text = ldm(*request, "fill=fill.nii.gz")
    assert not code, text
    for name, scan in scans.items():
        first, second = (data(tmp_path / f"out/sub-00000{i}_{name}.nii.gz") for i in (1, 2))
        np.testing.assert_allclose(first[fill == 0], scan[fill == 0], atol=1e-3)  # outside the field of view as well
        assert (np.abs(first - second)[fill == 1] > 1).mean() > 0.9
        assert (tmp_path / f"out/image_{name}.nii.gz").is_file()
    assert len(json.loads((tmp_path / "out/provenance.json").read_text())["files_sha256"]) == 3


def test_a_region_that_cannot_be_filled_in_is_refused(tmp_path):
    image, fill = str(tmp_path / "T1.nii.gz"), str(tmp_path / "fill.nii.gz")
    write_scan(image, ramp())
    seen, unseen = np.zeros((2, *SHAPE), np.uint8)
    seen[3:6, 4:8, 4:7] = 1
    unseen[:, :, 0] = 1  # the model's grid begins with the next slice
    for region, affine, message in (
        (seen, np.eye(4), "fill=.*fill.nii.gz.* do not lie on one grid"),
        (0 * seen, AFFINE, "fill.nii.gz: marks no voxel"),
        (unseen, AFFINE, "fill.nii.gz: marks nothing that is left on the model's grid"),
        (ramp(), AFFINE, "fill.nii.gz: is not a label map"),
    ):
        write_scan(fill, region, affine)
        with pytest.raises(LdmError, match=message):
            EditedImage.read(volumes(("T1",)), image, fill)
    with pytest.raises(LdmError, match="Expected a file for each of T1, T2, got T1"):
        EditedImage.read(volumes(("T1", "T2")), {"T1": image})
    with pytest.raises(LdmError, match=r"T1.nii.gz: 1 channel\(s\); the model has T1, T2"):
        EditedImage.read(volumes(("T1", "T2")), image)


def test_pictures_are_interpolated_at_their_own_size(ldm, tmp_path):
    save_model(tmp_path / "m.safetensors", pictures(("red", "green", "blue")))
    ends = [np.kron(np.array(values), np.ones((5, 4))) for values in ([[0, 250], [100, 50]], [[200, 20], [40, 220]])]
    ends = [np.stack([one, one[::-1], one[:, ::-1]], -1).astype(np.uint8) for one in ends]  # (10, 8, 3)
    for name, end in zip("ab", ends, strict=True):
        PIL.Image.fromarray(end).save(tmp_path / f"{name}.png")
    code, text = ldm("edit", "model=m.safetensors", "image=a.png", "to=b.png", "n=3", "steps=60", "out=out")
    assert not code, text
    found = [np.asarray(PIL.Image.open(tmp_path / f"out/sub-00000{i}.png"), float) for i in (1, 2, 3)]
    assert found[0].shape == (10, 8, 3)
    seen = slice(1, 9)  # rows of the model's grid
    scale = np.abs(ends[0][seen].astype(float) - ends[1][seen]).mean()
    distance = [[np.abs(one[seen] - end[seen]).mean() / scale for end in ends] for one in found]
    assert distance[0][0] < 0.2
    assert distance[2][1] < 0.2
    assert min(distance[1]) > 0.2
    assert pd.read_csv(tmp_path / "out/participants.tsv", sep="\t")["share"].tolist() == [0, 0.5, 1]
    record = json.loads((tmp_path / "out/provenance.json").read_text())["sampling"]
    assert (record["edit"], record["sampler"], record["guidance_scale"]) == ("interpolation", "ddim", 1.0)
    assert (np.asarray(PIL.Image.open(tmp_path / "out/to.png")) == ends[1]).all()


def test_channels_that_the_model_is_given_stand_beside_those_that_are_edited(ldm, tmp_path):
    conditioners = complete({"image": {"channels": ["T2"]}}, CovariateSchema([AGE, SEX]), None, ("T1", "T2"), 1)
    save_model(tmp_path / "m.safetensors", pictures(("T1",)), conditioners=conditioners)
    for seed, name in enumerate(("a", "b", "c")):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        PIL.Image.fromarray(noise).save(tmp_path / f"{name}.png")
    found = {}
    for given in ("{T1: a.png, T2: b.png}", "{T1: a.png, T2: c.png}"):
        out = f"out{len(found)}"
        code, text = ldm(
            "edit", "model=m.safetensors", f"image={given}", "strength=0.5", "steps=4", "n=1", f"out={out}"
        )
        assert not code, text
        found[given] = np.asarray(PIL.Image.open(tmp_path / out / "sub-000001.png"), float)
    first, other = found.values()
    assert np.abs(first - other).max() > 0  # the same noise, another T2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None, "strength": 0.5}, "image is not set"),
        ({}, "there is nothing to do to the image; give one of strength=0.5"),
        ({"strength": 0.5, "to": "b.png"}, "strength and to are different edits"),
        ({"strength": 0.5, "fill": "m.png"}, "strength and fill are different edits"),
        ({"to": "b.png", "fill": "m.png"}, "to and fill are different edits"),
        ({"to": "b.png", "guidance_scale": 2.0}, "guidance_scale makes no sense with to="),
        ({"to": "b.png", "eta": 0.5}, "eta makes no sense with to="),
        ({"strength": "half"}, "strength is 'half'; legal: a number"),
        ({"strength": 0.5, "n": 0}, "n is 0; legal: 1 or more"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given, message):
    names = ("strength", "to", "fill", "n", "batch_size", "sampler", "eta", "guidance_scale")
    names = (*names, "guidance_interval", "guidance_rescale")
    with pytest.raises(LdmError, match=message):
        asked_edit(OmegaConf.create({**dict.fromkeys(names), "image": "a.png", **given}))
