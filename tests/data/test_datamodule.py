"""The data module: one order for any number of processes, a cache that notices change, honest items."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data import cache as cache_module
from ldm.data.cache import build_cache, open_cache
from ldm.data.checks import check_cohort
from ldm.data.cohort import Cohort
from ldm.data.datamodule import CohortDataModule
from ldm.data.preprocessing import Preprocessing
from ldm.data.sampler import EpochSampler
from ldm.errors import LdmError

N = 12


@pytest.fixture
def data_cfg(tmp_path: Path) -> dict:
    """Twelve small subjects (8 train, 4 valid), each a block of its own size with labels and its volume."""
    root = tmp_path / "cohort"
    (root / "T1").mkdir(parents=True)
    rows = ["participant_id\tsplit\tage\tvolume_mm3"]
    rng = np.random.default_rng(0)
    for i in range(N):
        array = rng.random((10, 9, 8)).astype(np.float32) * 20
        block = np.zeros(array.shape, np.uint8)
        block[2 : 4 + i % 4, 2:6, 2:6] = 1
        affine = np.diag([-2.0, -2.0, 2.0, 1.0])
        nib.save(nib.Nifti1Image(array + 100 * block, affine), root / "T1" / f"s{i:02}.nii.gz")
        nib.save(nib.Nifti1Image(block, affine), root / "T1" / f"s{i:02}_seg.nii.gz")
        age = "n/a" if i == 1 else 40 + i
        rows.append(f"s{i:02}\t{'train' if i < 8 else 'valid'}\t{age}\t{block.sum() * 8}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return {
        "name": "blocks",
        "spatial_dims": 3,
        "orientation": "RAS",
        "root": str(root),
        "table": "participants.tsv",
        "image": "T1/{participant_id}.nii.gz",
        "labels": "T1/{participant_id}_seg.nii.gz",
        "covariates": {
            "age": {"kind": "continuous", "unit": "years"},
            "volume_mm3": {"kind": "continuous", "unit": "mm3", "scales_with": "volume"},
        },
        "split": {"column": "split"},
        "cache_dir": str(tmp_path / "cache"),
    }


def ready(data_cfg: dict, **settings) -> CohortDataModule:
    module = CohortDataModule(data_cfg, **{"batch_size": 2, "num_workers": 0, "progress": False} | settings)
    module.prepare_data()
    module.setup()
    return module


def fitted(data_cfg: dict) -> tuple[Cohort, Preprocessing]:
    cohort = check_cohort(data_cfg, progress=False).cohort
    return cohort, Preprocessing.from_config(data_cfg, 8).fit(cohort.records)


def test_items_are_what_the_interface_promises(data_cfg: dict) -> None:
    module = ready(data_cfg)
    assert module.image_shape == (1, 16, 16, 8)
    batches = list(module.val_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [8, 9, 10, 11]
    item = module.dataset("train")[1]
    assert item["image"].dtype == torch.float32
    assert item["image"].shape == module.image_shape
    assert item["labels"].dtype == torch.uint8
    assert item["labels"].shape == module.image_shape[1:]
    assert item["covariates"].isnan().tolist() == [True, False]
    # Image and labels come from the cache unharmed and lie on one another.
    image, _ = module.preprocessing.load(module.cohort.records[1])
    assert np.abs(item["image"].numpy() - image).max() < 2.5e-4
    assert item["image"][0][item["labels"] == 1].min() > item["image"][0][item["labels"] == 0].max()
    with pytest.raises(LdmError, match="no test split"):
        module.test_dataloader()
    with pytest.raises(LdmError, match="Did you mean 'valid'"):
        module.dataset("val")


def test_one_process_and_two_see_the_same_global_batches() -> None:
    items = list(range(11))
    for epoch in range(2):
        one = EpochSampler(items, 1, 0, seed=5)
        two = [EpochSampler(items, 2, rank, seed=5) for rank in range(2)]
        for sampler in (one, *two):
            sampler.set_epoch(epoch)
        order, (first, second) = list(one), (list(sampler) for sampler in two)
        assert sorted(order) == items
        assert len(first) == len(second) == len(two[0]) == 6
        merged = [index for pair in zip(first, second, strict=True) for index in pair]
        assert merged[:11] == order
        assert merged[11] == order[0]
    again = EpochSampler(items, seed=5)
    again.set_epoch(1)
    assert list(again) == order
    assert list(EpochSampler(items, seed=6)) != order  # seed 6 epoch 0 is not seed 5 epoch 1
    short = [list(EpochSampler(items, 2, rank, drop_last=True)) for rank in range(2)]
    assert len(set(short[0]) | set(short[1])) == 10


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_order_goes_on_behind_the_batches_that_were_consumed(ranks: int) -> None:
    def batches(start: int, rank: int) -> list[list[int]]:
        """All batches of three epochs behind the first ``start``; the iterator of the first one is made twice."""
        sampler = EpochSampler(list(range(23)), ranks, rank, seed=5)
        sampler.start_at(start, 4)
        loader = DataLoader(range(23), 4, sampler=sampler)
        next(iter(loader))
        result = [batch.tolist() for batch in loader]
        for epoch in range(sampler.epoch + 1, 3):
            sampler.set_epoch(epoch)
            result += [batch.tolist() for batch in loader]
        return result

    for rank in range(ranks):
        whole = batches(0, rank)
        assert len(whole) == {1: 18, 2: 9}[ranks]
        for start in (1, 3, 5, len(whole) // 3, len(whole) // 3 + 1, len(whole) - 1):
            assert batches(start, rank) == whole[start:]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_data_go_on_behind_the_batches_that_were_consumed(data_cfg: dict, workers: int) -> None:
    data_cfg["augment"] = {"brightness": 0.5}
    whole = ready(data_cfg, batch_size=3).train_dataloader()  # 3 batches an epoch
    whole.sampler.set_epoch(1)
    module = ready(data_cfg, batch_size=3, num_workers=workers)
    module.start_at(4)
    rest = module.train_dataloader()
    assert len(rest) == 3
    for expected, found in zip(list(whole)[1:], rest, strict=True):
        assert expected["index"].tolist() == found["index"].tolist()
        assert torch.equal(expected["image"], found["image"])
    assert [int(i) for batch in module.val_dataloader() for i in batch["index"]] == [8, 9, 10, 11]


def test_training_items_depend_on_seed_epoch_and_index_alone(data_cfg: dict) -> None:
    data_cfg["augment"] = {"flip_axes": [0], "scale": 0.1, "rotate": 5, "brightness": 0.1}

    def epoch_images(epoch: int, **settings) -> dict[int, torch.Tensor]:
        loader = ready(data_cfg, seed=3, **settings).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {
            int(index): image for batch in loader for index, image in zip(batch["index"], batch["image"], strict=True)
        }

    first = epoch_images(0)
    assert sorted(first) == list(range(8))
    in_workers = epoch_images(0, batch_size=3, num_workers=1)
    assert all(torch.equal(first[index], in_workers[index]) for index in first)
    assert not torch.equal(first[0], epoch_images(1)[0])


def test_workers_that_stay_alive_learn_of_the_next_epoch(data_cfg: dict) -> None:
    data_cfg["augment"] = {"brightness": 0.5}
    loader = ready(data_cfg, batch_size=8, num_workers=1).train_dataloader()
    sums = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        (batch,) = list(loader)
        sums.append(batch["image"][batch["index"] == 0].sum())
    assert sums[0] != sums[1]


def test_covariates_follow_the_augmented_anatomy(data_cfg: dict) -> None:
    data_cfg["augment"] = {"scale": 0.3}
    module = ready(data_cfg)
    plain, augmented = module.dataset("train"), module.dataset("train", augment=True)
    ratios = []
    for position in range(8):
        before, after = plain[position], augmented[position]
        volumes = [module.schema.decode(item["covariates"].numpy())["volume_mm3"] for item in (before, after)]
        voxels = [int((item["labels"] > 0).sum()) for item in (before, after)]
        ratios.append((volumes[1] / volumes[0], voxels[1] / voxels[0]))
        assert after["covariates"][0].isnan() == before["covariates"][0].isnan()
    by_covariate, by_voxels = np.array(ratios).T
    assert by_covariate.min() < 0.8 < 1.2 < by_covariate.max()
    assert np.corrcoef(by_covariate, by_voxels)[0, 1] > 0.8


def test_patches_are_cut_from_training_images_only(data_cfg: dict) -> None:
    module = ready(data_cfg, patch_size=(8, 8, 8))
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 1, 8, 8, 8)
    assert batch["labels"].shape == (2, 8, 8, 8)
    assert next(iter(module.val_dataloader()))["image"].shape[1:] == module.image_shape
    dataset = module.dataset("train", patch_size=(8, 8, 8))
    corners = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        corners.add(float(dataset[0]["image"].sum()))
    assert len(corners) > 2
    with pytest.raises(LdmError, match="patch_size"):
        ready(data_cfg, patch_size=(8, 8, 12)).train_dataloader()


def test_cache_is_reused_and_rebuilt_when_a_source_or_the_recipe_changes(data_cfg: dict, monkeypatch) -> None:
    cohort, prep = fitted(data_cfg)
    loads = []
    original = Preprocessing.load
    monkeypatch.setattr(
        Preprocessing, "load", lambda self, record: (loads.append(record.id), original(self, record))[1]
    )

    def build(cohort=cohort, prep=prep, **settings):
        loads.clear()
        return build_cache(data_cfg["cache_dir"], cohort, prep, progress=False, **settings)

    cache = build()
    assert len(loads) == N
    assert build().folder == cache.folder
    assert loads == []
    assert cache.image(3).shape == prep.image_shape

    old = cache.image(0)
    path = Path(cohort.records[0].images["image"])
    changed = nib.Nifti1Image(np.asarray(nib.load(path).dataobj)[::-1], nib.load(path).affine)
    nib.save(changed, path)
    mirrored, _ = fitted(data_cfg)
    assert open_cache(data_cfg["cache_dir"], mirrored, prep) is None
    assert not np.array_equal(build(mirrored).image(0), old)
    assert len(loads) == N

    other = Preprocessing.from_config(data_cfg | {"intensity": {"range": [-1, 1]}}, 8).fit(cohort.records)
    assert build(mirrored, other).image(0).min() == -1
    assert len(loads) == N
    assert build(mirrored, dtype="float32").image(0).min() == 0
    assert len(loads) == N
    assert not [p.name for p in Path(data_cfg["cache_dir"]).iterdir() if p.name.startswith(".")]


def test_a_copy_of_the_files_elsewhere_is_the_same_cohort(data_cfg: dict, tmp_path: Path) -> None:
    """A job that copies its data to the disk of its node finds cache and latents again, and its run goes on."""
    cohort, prep = fitted(data_cfg)
    folder = build_cache(data_cfg["cache_dir"], cohort, prep, progress=False).folder
    shutil.copytree(data_cfg["root"], tmp_path / "scratch", copy_function=shutil.copyfile)  # with new time stamps
    copied, _ = fitted(data_cfg | {"root": str(tmp_path / "scratch")})
    assert copied.content_hash() == cohort.content_hash()
    assert open_cache(data_cfg["cache_dir"], copied, prep).folder == folder


def test_content_changes_with_a_covariate_an_order_a_value_or_a_place(data_cfg: dict) -> None:
    """Latents are cached under it, so that a corrected table or a replaced scan is encoded anew."""
    cohort, _ = fitted(data_cfg)
    before, records = cohort.content_hash(), cohort.records
    assert cohort.content_hash(list(records)) == before
    corrected = replace(records[0], covariates={**records[0].covariates, "age": 1.0})
    assert cohort.content_hash([corrected, *records[1:]]) != before
    assert cohort.content_hash(records[::-1]) != before
    path = Path(next(iter(records[0].images.values())))
    image = nib.load(path)
    values, moved = image.get_fdata(dtype=np.float32), image.affine + np.diag([0, 0, 1e-3, 0])
    for array, affine in ((values + np.float32(1e-3), image.affine), (values, moved)):
        nib.save(nib.Nifti1Image(array, affine), path)
        assert fitted(data_cfg)[0].content_hash() != before


def test_a_damaged_cache_is_built_anew_and_a_failed_one_leaves_nothing(data_cfg: dict) -> None:
    cohort, prep = fitted(data_cfg)
    cache = build_cache(data_cfg["cache_dir"], cohort, prep, progress=False)
    with (cache.folder / "images.npy").open("r+b") as file:
        file.truncate(1000)
    assert open_cache(data_cfg["cache_dir"], cohort, prep) is None
    assert build_cache(data_cfg["cache_dir"], cohort, prep, progress=False).image(0).max() == 1
    shutil.rmtree(data_cfg["cache_dir"])
    path = Path(cohort.records[5].images["image"])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(LdmError, match=r"s05\.nii\.gz"):
        build_cache(data_cfg["cache_dir"], cohort, prep, progress=False)
    assert list(Path(data_cfg["cache_dir"]).iterdir()) == []


def test_what_a_killed_build_left_is_removed_in_time(data_cfg: dict) -> None:
    old, fresh = (Path(data_cfg["cache_dir"]) / f".building-{name}" for name in ("old", "fresh"))
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "images.npy").write_bytes(b"cut short")
    os.utime(old / "images.npy", (1, 1))
    os.utime(old, (1, 1))
    build_cache(data_cfg["cache_dir"], *fitted(data_cfg), progress=False)
    assert not old.exists()
    assert fresh.exists()


def test_cache_limit_and_pickling(data_cfg: dict, monkeypatch) -> None:
    cohort, prep = fitted(data_cfg)
    one_gb = int(np.prod(prep.image_shape)) * 3 / 1e9  # float16 image and uint8 labels
    cache = build_cache(data_cfg["cache_dir"], cohort, prep, limit_gb=5.5 * one_gb, progress=False)
    assert [index in cache for index in (0, 4, 5)] == [True, True, False]
    cache.image(0)
    assert len(pickle.dumps(cache)) < 1000
    assert (pickle.loads(pickle.dumps(cache)).image(4) == cache.image(4)).all()
    assert 0 not in build_cache(data_cfg["cache_dir"], cohort, prep, limit_gb=0, progress=False)
    module = ready(data_cfg | {"cache_gb": 5.5 * one_gb})
    assert sorted(index for batch in module.train_dataloader() for index in batch["index"].tolist()) == list(range(8))
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(LdmError, match="cache_gb"):
        build_cache(data_cfg["cache_dir"], cohort, prep, dtype="float32", progress=False)


def test_a_second_process_arrives_at_the_same_data(data_cfg: dict) -> None:
    first = ready(data_cfg)
    second = CohortDataModule(data_cfg, batch_size=2, num_workers=0, progress=False)
    with pytest.raises(LdmError, match="prepare_data"):
        _ = second.cohort
    second.setup()
    assert second.preprocessing.fingerprint() == first.preprocessing.fingerprint()
    assert second.cohort.records == first.cohort.records
    index = json.loads(next(Path(data_cfg["cache_dir"]).glob("*/index.json")).read_text())
    assert index["ids"] == [f"s{i:02}" for i in range(N)]


def test_faults_stop_and_uncached_data_work(data_cfg: dict) -> None:
    module = ready(data_cfg | {"cache": False})
    assert not list(Path(data_cfg["cache_dir"]).glob("*/index.json"))
    assert next(iter(module.train_dataloader()))["image"].shape == (2, *module.image_shape)
    Path(data_cfg["root"], "T1", "s03.nii.gz").unlink()
    with pytest.raises(LdmError, match=r"s03\.nii\.gz"):
        ready(data_cfg)
    left = ready(data_cfg | {"faults": "leave_out"})
    assert "s03" not in [record.id for record in left.cohort.records]
    assert len(left.dataset("train")) == 7
