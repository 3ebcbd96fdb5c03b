"""What a folder of results is bound to, and what is written into it, with networks that say what they are given."""

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from ldm.applications.segmentation import NetworkSource, read_result, segment
from ldm.data.draft import Record
from ldm.data.geometry import Geometry
from ldm.data.labels import LabelClasses
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.segmenter import Segmenter


class Bright(nn.Module):
    """The class is where the first channel is bright."""

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, :1]), 9 * x[:, :1]], 1)  # (B, 2, *S)


def bright(channels=("T1", "FLAIR"), shape=(16, 16)):
    recipe = Preprocessing(2, None, None, shape, (1, 1), channels=channels, reference=Geometry.plan(shape))
    classes = LabelClasses.from_config({"bright": 1})
    return NetworkSource([Segmenter(Bright(), {}, classes, recipe, facts={"split_sha256": "s"})], ["a"])


def of(name, images, labels=None):
    return Record(name, name, images, labels, {}, "test")


@pytest.fixture
def files(tmp_path):
    """Three arrays, and a volume stored LPS of 20 x 16 x 8 voxels of 1 x 2 x 4 mm."""
    rng = np.random.default_rng(0)
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", rng.random((16, 16)).astype(np.float32))
    volume = rng.random((20, 16, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -2, 4, 1])), tmp_path / "vol.nii.gz")
    return {name: str(tmp_path / f"{name}.npy") for name in "abc"} | {"volume": str(tmp_path / "vol.nii.gz")}


def test_results_of_another_image_are_not_taken_for_these(tmp_path, files):
    """Channels, subjects or slices that change places: the same names and the same files."""
    a, b, c, volume = files.values()
    first, second = {"T1": a, "FLAIR": b}, {"T1": b, "FLAIR": c}
    cuts = [{"T1": f"{volume}::axial[{k}]", "FLAIR": f"{volume}::axial[{k}]"} for k in (3, 4)]
    swapped = (
        ([of("s", first)], [of("s", {"T1": b, "FLAIR": a})]),
        ([of("s", first), of("t", second)], [of("s", second), of("t", first)]),
        ([of("s", cuts[0])], [of("s", cuts[1])]),
    )
    for number, (asked, other) in enumerate(swapped):
        out = tmp_path / str(number)
        source = bright(shape=(16, 20) if number == 2 else (16, 16))
        segment(source, asked, out, {"files_sha256": "the same"})
        segment(source, asked, out, {"files_sha256": "the same"})
        with pytest.raises(LdmError, match=r"another request \(images differ\)"):
            segment(source, other, out, {"files_sha256": "the same"})
