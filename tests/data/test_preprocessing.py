"""Preprocessing: files to model arrays, and back into the space they came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest

from ldm.data import images
from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError

LPS = np.array([[-1.0, 0, 0, 90], [0, -1.5, 0, 60], [0, 0, 2.0, -40], [0, 0, 0, 1]])
CONFIG = {
    "spatial_dims": 3,
    "orientation": "RAS",
    "intensity": {"kind": "percentile", "lower": 0, "upper": 100},
}


def record(images_: dict[str, Path], labels: Path | None = None, split: str = "train", id_: str = "s1") -> Record:
    references = {name: str(path) for name, path in images_.items()}
    return Record(id_, id_, references, None if labels is None else str(labels), {}, split)


def save(path: Path, array: np.ndarray, affine: np.ndarray = LPS, code: int = 4) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    nib.save(image, path)
    return path


def blob(shape: tuple[int, ...], peak: float = 500.0) -> np.ndarray:
    grids = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return (peak * np.exp(-3 * sum((g - 0.2 * i) ** 2 for i, g in enumerate(grids)))).astype(np.float32)


def test_a_file_comes_back_on_its_own_grid(tmp_path: Path) -> None:
    stored = blob((21, 18, 13))
    path = save(tmp_path / "a.nii.gz", stored)
    labels = save(tmp_path / "seg.nii.gz", (stored > 200).astype(np.uint8) * 3)
    one = record({"T1": path}, labels)
    prep = Preprocessing.from_config(CONFIG, 8).fit([one])
    assert prep.image_shape == (1, 24, 24, 16)

    array, geometry = prep.load(one)
    assert array.shape == (1, 24, 24, 16)
    assert (array.min(), array.max()) == (0, 1)
    restored = prep.restore(array, geometry)
    images.write(tmp_path / "out.nii.gz", restored)
    out = nib.load(tmp_path / "out.nii.gz")

    np.testing.assert_array_equal(out.affine, LPS)
    np.testing.assert_array_equal(out.get_sform(), LPS)
    np.testing.assert_allclose(out.get_qform(), LPS, atol=1e-5)
    assert (int(out.header["sform_code"]), int(out.header["qform_code"])) == (4, 4)
    assert out.header.get_xyzt_units()[0] == "mm"
    assert b"ldm" in bytes(out.header["descrip"].item())
    assert out.get_data_dtype() == np.float32
    low, high = stored.min(), stored.max()
    np.testing.assert_allclose(out.get_fdata(), (stored - low) / (high - low), atol=1e-5)

    back = prep.restore(prep.load_labels(one), geometry, labels=True)
    assert back.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(back.dataobj), (stored > 200) * 3)


def test_a_ct_window_comes_back_in_hu(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).uniform(-1024, 1500, (9, 8, 7)).astype(np.int16)
    one = record({"CT": save(tmp_path / "ct.nii.gz", hu)})
    window = {"kind": "window", "lower": -1000, "upper": 1000}
    prep = Preprocessing.from_config(CONFIG | {"intensity": window}, 4).fit([one])
    back = prep.restore(*prep.load(one))
    np.testing.assert_allclose(back.get_fdata(), np.clip(hu, -1000, 1000), atol=1e-2)


def test_generated_volumes_land_on_the_shared_grid(tmp_path: Path) -> None:
    records = [
        record({"T1": save(tmp_path / f"{i}.nii.gz", blob((11, 12, 13), 100 + i))}, id_=f"s{i}") for i in range(3)
    ]
    prep = Preprocessing.from_config(CONFIG, 8).fit(records)
    generated = prep.restore(np.ones(prep.image_shape, np.float32))
    assert generated.shape == (11, 12, 13)
    np.testing.assert_array_equal(generated.affine, LPS)


def test_without_a_shared_grid_nothing_generated_is_cut_off(tmp_path: Path) -> None:
    shapes, shifts = [(9, 12, 13), (11, 10, 13), (12, 12, 9)], [0, 4, 60]
    records = []
    for i, (shape, shift) in enumerate(zip(shapes, shifts, strict=True)):
        affine = LPS.copy()
        affine[0, 3] += shift
        records.append(record({"T1": save(tmp_path / f"{i}.nii.gz", blob(shape), affine)}, id_=f"s{i}"))
    records.append(record({"T1": save(tmp_path / "v.nii.gz", blob((17, 9, 9)))}, id_="v", split="valid"))
    prep = Preprocessing.from_config(CONFIG, 4).fit(records)
    assert prep.shape == (20, 12, 16)  # holds the validation volume too
    generated = prep.restore(np.full(prep.image_shape, 0.5, np.float32))
    assert generated.shape == prep.shape
    assert nib.aff2axcodes(generated.affine) == ("R", "A", "S")
    _, nearest_to_median = prep.load(records[1])
    np.testing.assert_allclose(generated.affine, nearest_to_median.affine)


def test_two_channels_on_one_grid(tmp_path: Path) -> None:
    first, second = (
        save(tmp_path / "t1.nii.gz", blob((8, 8, 8))),
        save(tmp_path / "t2.nii.gz", blob((8, 8, 8), 9.0)),
    )
    one = record({"T1": first, "T2": second})
    prep = Preprocessing.from_config(CONFIG, 8).fit([one])
    assert prep.channels == ("T1", "T2")
    array, geometry = prep.load(one)
    assert [channel.max() for channel in array] == [1, 1]
    assert prep.restore(array, geometry).shape == (8, 8, 8, 2)

    moved = LPS.copy()
    moved[2, 3] += 1.0
    save(second, blob((8, 8, 8)), moved)
    with pytest.raises(LdmError, match=r"record 's1': 'T1' and 'T2' do not lie on one grid"):
        prep.load(one)
    with pytest.raises(LdmError, match="do not lie on one grid"):
        prep.load_labels(replace(record({"T1": first}), labels=str(second)))


def test_pictures_are_padded_and_come_back_as_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 10, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    one = record({"image": tmp_path / "a.png"})
    config = {"spatial_dims": 2, "intensity": {"kind": "window", "lower": 0, "upper": 255, "range": [-1, 1]}}
    prep = Preprocessing.from_config(config, 8).fit([one])
    array, geometry = prep.load(one)
    assert array.shape == (3, 16, 16)
    assert prep.channels == ("image_red", "image_green", "image_blue")
    assert prep.is_rgb
    assert (array[:, 0] == -1).all()
    np.testing.assert_array_equal(prep.restore(array, geometry), pixels)


def test_three_channels_that_are_no_colours_stay_three(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((3, 8, 8)))
    config = {"spatial_dims": 2, "intensity": {"kind": "percentile"}}
    prep = Preprocessing.from_config(config, 8).fit([record({"image": tmp_path / "a.npy"})])
    assert prep.channels == ("image_0", "image_1", "image_2")
    assert not prep.is_rgb


def test_labels_that_are_not_labels_are_refused(tmp_path: Path) -> None:
    one = record({"T1": save(tmp_path / "a.nii.gz", blob((8, 8, 8)))}, tmp_path / "a.nii.gz")
    prep = Preprocessing.from_config(CONFIG, 8).fit([one])
    with pytest.raises(LdmError, match=r"a\.nii\.gz.*whole numbers in 0\.\.255"):
        prep.load_labels(one)


def test_description_and_fingerprint(tmp_path: Path) -> None:
    prep = Preprocessing.from_config(CONFIG | {"spacing_mm": 2.0}, 8)
    prep = prep.fit([record({"T1": save(tmp_path / "a.nii.gz", blob((8, 8, 8)))})])
    copy = Preprocessing.from_dict(json.loads(json.dumps(prep.to_dict())))
    assert copy == prep
    assert copy.fingerprint() == prep.fingerprint()
    assert replace(prep, shape=(16, 8, 8)).fingerprint() != prep.fingerprint()


def test_illegal_settings_say_what_is_legal() -> None:
    with pytest.raises(LdmError, match="nearest legal: 16 or 24"):
        Preprocessing.from_config(CONFIG | {"shape": [16, 20, 16]}, 8)
    with pytest.raises(LdmError, match="spatial_dims"):
        Preprocessing.from_config(CONFIG | {"spatial_dims": 4})
    with pytest.raises(LdmError, match="needs 3 sizes"):
        Preprocessing.from_config(CONFIG | {"shape": [16, 16]})
