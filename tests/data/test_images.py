"""Reading: every format comes in channel-first, every broken file is an LdmError that names it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from ldm.data import images
from ldm.errors import LdmError


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An LPS volume whose voxel values tell their RAS index: 100 r + 10 a + s."""
    r, a, s = np.meshgrid(range(3), range(4), range(5), indexing="ij")
    ras = (100 * r + 10 * a + s).astype(np.int16)
    path = tmp_path / "volume.nii.gz"
    nib.save(nib.Nifti1Image(ras[::-1, ::-1], np.diag([-1.0, -2.0, 3.0, 1.0])), path)
    return path


def test_nifti_slope_and_intercept_are_applied_once_and_units_become_mm(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(stored, np.diag([2000.0, 2000.0, 2000.0, 1.0]))
    image.header.set_slope_inter(0.5, -1024)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "ct.nii")
    # nibabel scales floats on saving; the raw integers are written by hand to keep slope and intercept.
    raw = bytearray((tmp_path / "ct.nii").read_bytes())
    raw[352:] = stored.tobytes(order="F")
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()
    (tmp_path / "ct.nii").write_bytes(bytes(raw))

    read = images.read("ct.nii", tmp_path)

    np.testing.assert_array_equal(read.array[0], stored * 0.5 - 1024)
    assert read.array.dtype == np.float32
    np.testing.assert_allclose(np.diag(read.affine), [2, 2, 2, 1])


def test_fourth_nifti_axis_becomes_channels(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).random((3, 4, 5, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(stored, np.eye(4)), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(images.read("two.nii.gz", tmp_path).array, np.moveaxis(stored, -1, 0))
    assert images.read_header("two.nii.gz", tmp_path).shape == (2, 3, 4, 5)


def test_slices_are_counted_along_ras_axes_and_stand_upright(volume: Path) -> None:
    axial = images.read(f"{volume}::axial[4]").array
    assert axial.shape == (1, 4, 3)
    assert axial[0, 0, 0] == 34  # top left: leftmost, most anterior
    assert images.read(f"{volume}::sagittal[2]").array[0, -1, 0] == 200  # bottom left: inferior, posterior
    assert images.read(f"{volume}::coronal[1]").array[0, 0, 2] == 214  # top right: superior, right


def test_pictures_keep_their_channels(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(rgb).save(tmp_path / "rgb.png")
    PIL.Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.tif")
    PIL.Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    np.testing.assert_array_equal(images.read("rgb.png", tmp_path).array, np.moveaxis(rgb, -1, 0))
    np.testing.assert_array_equal(images.read("grey.tif", tmp_path).array[0], rgb[..., 0])
    with pytest.raises(LdmError, match=r"palette\.png.*colour mode 'P'"):
        images.read("palette.png", tmp_path)


def test_rows_of_arrays(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 16), dtype=np.uint8)
    masks = np.random.default_rng(1).random((5, 8, 16)) > 0.5
    np.savez(tmp_path / "x.npz", images=stack, masks=np.packbits(masks, axis=-1))
    np.save(tmp_path / "x.npy", stack[:, 0])
    np.testing.assert_array_equal(images.read("x.npz::images[3]", tmp_path, 2).array, stack[3])
    np.testing.assert_array_equal(images.read("x.npz::unpackbits(masks[2])", tmp_path, 2).array[0], masks[2])
    np.testing.assert_array_equal(images.read("x.npy::[4]", tmp_path, 2).array[0], stack[4, 0])
    # A file that is written anew must not come from the memory of the old one.
    np.savez(tmp_path / "x.npz", images=stack[::-1], masks=masks)
    os.utime(tmp_path / "x.npz", (1, 1))
    np.testing.assert_array_equal(images.read("x.npz::images[3]", tmp_path, 2).array, stack[1])


class _Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_hostile_arrays_are_refused_without_being_executed(tmp_path: Path, suffix: str) -> None:
    trap = tmp_path / "executed"
    hostile = np.array([_Bomb(trap)], dtype=object)
    path = tmp_path / f"hostile{suffix}"
    np.savez(path, images=hostile) if suffix == ".npz" else np.save(path, hostile, allow_pickle=True)
    with pytest.raises(LdmError, match="hostile"):
        images.read(f"{path}::{'images[0]' if suffix == '.npz' else '[0]'}")
    path.write_bytes(hostile.dumps())  # a bare pickle with an array's name
    with pytest.raises(LdmError, match="hostile"):
        images.read(f"{path}::{'images[0]' if suffix == '.npz' else '[0]'}")
    assert not trap.exists()


def test_each_broken_file_is_an_error_that_names_it(tmp_path: Path, volume: Path) -> None:
    whole = gzip.compress(np.random.default_rng(0).bytes(4000), mtime=0)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9)), np.eye(4)), tmp_path / "cut.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "cut.nii.gz").read_bytes()[:-900])
    (tmp_path / "noise.nii.gz").write_bytes(whole)
    (tmp_path / "text.nii").write_text("not an image")
    (tmp_path / "text.png").write_text("not an image")
    np.savez(tmp_path / "cut.npz", images=np.zeros((4, 8, 8)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    flat = nib.load(volume)
    flat.set_sform(np.zeros((4, 4)), code=1)
    flat.set_qform(None, code=0)
    nib.save(flat, tmp_path / "flat.nii.gz")
    broken = ["cut.nii.gz", "noise.nii.gz", "text.nii", "text.png", "cut.npz::images[0]", "flat.nii.gz"]
    broken += ["volume.nii.gz::axial[5]", "volume.nii.gz::axail[1]", "no.png", "scan.dcm"]
    for reference in broken:
        with pytest.raises(LdmError, match=reference.split("::")[0]):
            images.read(reference, tmp_path)
    with pytest.raises(LdmError, match=r"Did you mean 'volume\.nii\.gz'"):
        images.read("volumes.nii.gz", tmp_path)
    with pytest.raises(LdmError, match="Did you mean 'axial'"):
        images.read("volume.nii.gz::axail[1]", tmp_path)


def test_written_files_read_back_and_leave_nothing_else(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (6, 7), dtype=np.uint8)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    images.write(tmp_path / "out" / "a.png", picture)
    images.write(tmp_path / "out" / "a.nii.gz", nib.Nifti1Image(np.zeros((2, 3, 4), np.float32), affine))
    np.testing.assert_array_equal(images.read(tmp_path / "out" / "a.png").array[0], picture)
    np.testing.assert_array_equal(images.read(tmp_path / "out" / "a.nii.gz").affine, affine)
    with pytest.raises(LdmError, match=r"a\.png"):
        images.write(tmp_path / "out" / "a.png", np.zeros((6, 7, 2), np.uint8))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "a.png"]
