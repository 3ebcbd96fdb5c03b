from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ldm.data.simulated import COLUMNS, LABELS, generate, population, render, warp, writer
from ldm.data.simulated.anatomy import Grid, template
from ldm.errors import LdmError


def subject(atlas: render.Atlas, index: int, seed: int = 3):
    rng = population.generator(seed, index, population.ANATOMY)
    drawn = population.draw(rng, atlas.head_mm3)
    return drawn, *render.deform(atlas, drawn, warp.random_displacement(rng))


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def test_template_ventricles_are_two_symmetric_halves_of_plausible_volume():
    anatomy = template()
    volume = anatomy.ventricles.sum() * anatomy.grid.step**3
    assert 15e3 < volume < 30e3  # mm3; found: 18.7 ml
    x = anatomy.grid.points()[0].reshape(anatomy.grid.shape)
    left, right = (anatomy.ventricles[side].sum() for side in (x < 0, x > 0))
    assert left == pytest.approx(right, rel=0.02)  # the template is the symmetric one
    occupied = anatomy.grid.points()[:, (anatomy.ventricles > 0.5).ravel()]
    assert np.abs(occupied[0]).max() < 42
    assert occupied[2].min() >= -13
    posterior_midline = (np.abs(occupied[0]) < 3) & (occupied[1] < -30)
    assert not posterior_midline.any()  # no quadrigeminal cistern


def test_tissue_fractions_add_up_inside_the_head():
    anatomy = template()
    for grey, white in zip(anatomy.grey, anatomy.white, strict=True):
        total = grey + white + anatomy.ventricles
        assert grey.min() >= 0
        assert white.min() >= 0
        assert total.max() < 1 + 1e-4
        assert not total[anatomy.brain == 0].any()


@pytest.mark.parametrize("index", range(4))
def test_the_map_of_a_subject_does_not_fold(atlas, index):
    _, deformation, _ = subject(atlas, index)
    assert jacobian(deformation).min() > 0


@pytest.mark.parametrize("volume", population.VENTRICLES_RANGE_MM3)
def test_extreme_ventricles_are_reached_without_folding(atlas, volume):
    drawn = population.draw(population.generator(0, 0, population.ANATOMY), atlas.head_mm3)
    extreme = population.Subject(
        drawn.age, drawn.sex, drawn.head_mm3, volume, drawn.atrophy, drawn.matrix, drawn.offset
    )
    rng = np.random.default_rng(5)
    deformation, reached = render.deform(atlas, extreme, warp.random_displacement(rng))
    assert reached == pytest.approx(volume, rel=0.02)
    assert jacobian(deformation).min() > 0


def jacobian(deformation: render.Deformation) -> np.ndarray:
    grid = Grid((-60.0, -90.0, -50.0), 2.5, (49, 61, 45))
    mapped = deformation(grid.points()).astype(np.float64).reshape(3, *grid.shape)
    rows = np.stack([np.stack(np.gradient(component, grid.step)) for component in mapped])
    return np.linalg.det(np.moveaxis(rows, (0, 1), (-2, -1)))


def test_true_volumes_are_those_of_a_finer_integral_of_the_same_map(atlas):
    anatomy = template()
    drawn, deformation, ventricles = subject(atlas, 2)
    assert ventricles == pytest.approx(drawn.ventricles_mm3, rel=0.005)
    fine = Grid((-66.0, -100.0, -60.0), 1.5, (89, 112, 87))
    exact = anatomy.grid.sample(anatomy.ventricles, deformation(fine.points())).sum(dtype=np.float64) * 1.5**3
    assert ventricles == pytest.approx(exact, rel=0.02)
    whole = Grid((-80.0, -114.0, -75.0), 2.0, (81, 98, 82))
    origins = deformation(whole.points())
    head, *tissue = (
        float(anatomy.grid.sample(volume, origins).sum(dtype=np.float64)) * 8
        for volume in (anatomy.brain, *anatomy.grey, *anatomy.white)
    )
    assert head == pytest.approx(drawn.head_mm3, rel=0.02)
    brain = (1 - drawn.atrophy) * (tissue[0] + tissue[2]) + drawn.atrophy * (tissue[1] + tissue[3])
    stated = render.render(atlas, render.output_grid(8.0), 3, 2)
    assert stated.brain_mm3 == pytest.approx(brain, rel=0.01)
    assert stated.ventricles_mm3 == ventricles


def test_truth_does_not_depend_on_the_image_and_images_hold_the_whole_head(atlas):
    for index in range(6):
        near, far = (render.render(atlas, render.output_grid(s), 3, index) for s in (4.0, 8.0))
        assert (near.ventricles_mm3, near.brain_mm3, near.age) == (far.ventricles_mm3, far.brain_mm3, far.age)
        image = near.image
        for axis in range(3):
            assert not image.take([0, -1], axis).any()
        labelled = (near.labels == LABELS.index("ventricles")).sum() * 64.0
        assert labelled == pytest.approx(near.ventricles_mm3, rel=0.35)
        assert ((near.labels > 0) == (image > 0)).all()


def test_subjects_differ_in_shape_and_contrast(atlas):
    grid = render.output_grid(4.0)
    first, second = (render.render(atlas, grid, 3, k) for k in (0, 1))
    heads = first.image > 0, second.image > 0
    overlap = (heads[0] & heads[1]).sum() / (heads[0] | heads[1]).sum()
    assert 0.6 < overlap < 0.96
    white = [np.median(s.image[s.labels == 3]) for s in (first, second)]
    ratio = [np.median(s.image[s.labels == 4]) / w for s, w in zip((first, second), white, strict=True)]
    assert abs(white[0] - white[1]) > 10
    assert abs(ratio[0] - ratio[1]) > 0.005


def test_the_population_ages_as_people_do():
    drawn = [population.draw(population.generator(0, k, population.ANATOMY), 1.85e6) for k in range(1500)]
    age, head, ventricles, atrophy, male = np.array(
        [(s.age, s.head_mm3, s.ventricles_mm3, s.atrophy, s.sex == "M") for s in drawn], float
    ).T
    assert age.min() >= 44
    assert age.max() <= 82
    assert ventricles.min() >= 9e3
    assert 80e3 < ventricles.max() <= 120e3
    assert 0.4 < np.corrcoef(age, ventricles)[0, 1] < 0.65
    assert np.corrcoef(age, atrophy)[0, 1] > 0.5
    for values in (head, ventricles):
        assert values[male == 1].mean() > 1.1 * values[male == 0].mean()
    assert abs(np.corrcoef(age, male)[0, 1]) < 0.1


def test_layout_is_bids_and_says_simulated(coarse, tmp_path):
    root = generate(tmp_path / "cohort", n=2, spacing_mm=8.0, workers=1, progress=False)
    assert "imulated" in json.loads((root / "dataset_description.json").read_text())["Name"]
    with (root / "participants.tsv").open() as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [r["participant_id"] for r in rows] == ["sub-0001", "sub-0002"]
    assert (
        set(rows[0])
        == {"participant_id", *COLUMNS}
        == {"participant_id", *json.loads((root / "participants.json").read_text())}
    )
    assert 0.8e6 < float(rows[0]["brain_mm3"]) < 1.5e6
    image, labels = (nibabel.load(root / "sub-0001" / "anat" / f"sub-0001_{kind}.nii.gz") for kind in ("T1w", "dseg"))
    assert image.shape == labels.shape == (24, 24, 24)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.header.get_zooms() == (8.0, 8.0, 8.0)
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(image.get_qform(), image.get_sform())
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert set(np.unique(labels.dataobj)) == set(range(len(LABELS)))


def test_default_grid_is_the_smallest_multiple_of_eight():
    assert render.output_grid(4.0).shape == (40, 48, 40)
    assert render.output_grid(3.0).shape == (56, 64, 56)
    assert render.output_grid(1.0).shape == (160, 192, 160)


def test_an_interrupted_cohort_is_completed_to_the_same_bytes(coarse, tmp_path, monkeypatch):
    options = {"n": 3, "spacing_mm": 8.0, "seed": 1, "workers": 1, "progress": False}
    whole = generate(tmp_path / "whole", **options)
    calls, replace = [], writer.os.replace

    def killed(*paths):
        calls.append(paths)
        if len(calls) == 9:  # after the first subject, in the middle of the second
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(writer.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "cut", **options)
    monkeypatch.setattr(writer.os, "replace", replace)
    assert (tmp_path / "cut" / "sub-0001" / "anat" / "sub-0001_T1w.json").exists()
    assert not (tmp_path / "cut" / "participants.tsv").exists()
    assert digests(generate(tmp_path / "cut", **options)) == digests(whole)


def test_a_complete_cohort_is_left_alone(coarse, tmp_path, monkeypatch):
    options = {"n": 1, "spacing_mm": 8.0, "workers": 1, "progress": False}
    root = generate(tmp_path / "cohort", **options)
    monkeypatch.setattr(writer, "write_bytes", lambda *_: pytest.fail("wrote into a complete cohort"))
    generate(root, **options)


def test_a_subject_is_the_same_whatever_the_cohort_and_the_workers(tmp_path):
    one = digests(generate(tmp_path / "one", n=2, spacing_mm=8.0, seed=4, workers=1, progress=False))
    more = digests(generate(tmp_path / "more", n=3, spacing_mm=8.0, seed=4, workers=2, progress=False))
    subjects = [name for name in one if name.startswith("sub-")]
    assert len(subjects) == 6
    assert all(one[name] == more[name] for name in subjects)


def test_other_parameters_and_other_folders_are_refused(coarse, tmp_path):
    root = generate(tmp_path / "cohort", n=1, spacing_mm=8.0, workers=1, progress=False)
    before = digests(root)
    with pytest.raises(LdmError, match=r"seed = 0 .asked for 5."):
        generate(root, n=1, spacing_mm=8.0, seed=5, workers=1, progress=False)
    assert digests(root) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(LdmError, match=r"thesis\.txt"):
        generate(tmp_path / "mine", n=1, progress=False)
    with pytest.raises(LdmError, match="would cut brains"):
        generate(tmp_path / "small", n=1, spacing_mm=4.0, shape=(32, 48, 40), progress=False)
    assert not (tmp_path / "small").exists()
