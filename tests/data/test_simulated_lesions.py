from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ldm.commands.main import conf_dir
from ldm.data.cohort import Cohort
from ldm.data.images import read
from ldm.data.simulated import LABELS, LESION_LABELS, generate, lesions, population, render, writer
from ldm.data.simulated.anatomy import Grid, template
from ldm.data.simulated.sequences import SEQUENCES, Tissues, scan
from ldm.errors import LdmError
from tests.data.test_simulated import digests, jacobian

SEED = 3
# Of subject 1 at 8 mm, as made when the simulation knew neither lesions nor other sequences.
PLAIN_SUM, PLAIN_VENTRICLES = 1075937, 73203.34706348261
PLAIN_COUNTS = [11311, 218, 1362, 789, 144]
VALUE = {name: value for value, name in enumerate(LABELS + LESION_LABELS)}


@pytest.fixture(scope="module")
def bodies(atlas) -> dict[int, render.Body]:
    """The anatomy of subjects with a tumour."""
    return {index: render.embody(atlas, SEED, index, 1.0) for index in range(2)}


@pytest.fixture(scope="module")
def subjects(atlas) -> list[render.Rendered]:
    """The same subjects in all sequences at 4 mm."""
    return [render.render(atlas, render.output_grid(4.0), SEED, k, tuple(SEQUENCES), 1.0) for k in range(3)]


def median(subject: render.Rendered, sequence: str, label: str) -> float:
    return float(np.median(subject.images[sequence][subject.labels == VALUE[label]]))


def test_the_plain_cohort_is_the_one_it_was_before_there_were_lesions(atlas):
    plain = render.render(atlas, render.output_grid(8.0), SEED, 1)
    assert plain.image.sum(dtype=np.int64) == pytest.approx(PLAIN_SUM, rel=1e-6)
    assert plain.ventricles_mm3 == pytest.approx(PLAIN_VENTRICLES, rel=1e-6)
    assert list(np.bincount(plain.labels.ravel())) == PLAIN_COUNTS


def test_extras_leave_the_healthy_and_the_drawn_as_they_are(atlas):
    grid = render.output_grid(8.0)
    plain = render.render(atlas, grid, SEED, 1)
    extra = render.render(atlas, grid, SEED, 1, tuple(SEQUENCES), 0.0)
    np.testing.assert_array_equal(extra.image, plain.image)
    np.testing.assert_array_equal(extra.labels, plain.labels)
    assert (extra.ventricles_mm3, extra.brain_mm3) == (plain.ventricles_mm3, plain.brain_mm3)
    assert not extra.diseased
    assert not any(extra.lesion_mm3.values())
    assert extra.labels.max() < len(LABELS)
    ill = render.render(atlas, grid, SEED, 1, ("T1",), 1.0)
    assert (ill.age, ill.sex) == (plain.age, plain.sex)
    assert set(range(len(LABELS), len(VALUE))) <= set(np.unique(ill.labels))
    np.testing.assert_array_equal(ill.lesion_centre, extra.lesion_centre)  # healthy slices are taken where it is


def test_the_share_decides_only_who_is_diseased():
    plans = {
        share: [lesions.draw(population.generator(0, k, population.LESION), share) for k in range(2000)]
        for share in (0.3, 0.5)
    }
    some, half = ([plan.diseased for plan in plans[share]] for share in (0.3, 0.5))
    assert np.mean(some) == pytest.approx(0.3, abs=0.03)
    assert np.mean(half) == pytest.approx(0.5, abs=0.03)
    assert all(second for first, second in zip(some, half, strict=True) if first)
    assert all(
        replace(a, diseased=True) == replace(b, diseased=True) for a, b in zip(plans[0.3], plans[0.5], strict=True)
    )
    core = np.array([plan.core_mm3 for plan in plans[0.5]])
    assert np.median(core) == pytest.approx(lesions.CORE_MEDIAN_MM3, rel=0.06)


def test_each_sequence_shows_what_radiologists_expect(subjects):
    for subject in subjects:
        healthy = ("csf", "grey_matter", "white_matter", "ventricles")
        for sequence in ("T1", "T1ce"):
            assert median(subject, sequence, "white_matter") > median(subject, sequence, "grey_matter")
            assert median(subject, sequence, "grey_matter") > median(subject, sequence, "ventricles")
        rest = max(median(subject, "T1ce", name) for name in (*healthy, "necrotic_core", "oedema"))
        assert median(subject, "T1ce", "enhancing") > 1.05 * rest
        assert median(subject, "T1", "enhancing") < median(subject, "T1", "white_matter")
        rest = max(median(subject, "FLAIR", name) for name in (*healthy, "necrotic_core"))
        assert median(subject, "FLAIR", "oedema") > 1.05 * rest
        assert median(subject, "FLAIR", "ventricles") < 0.6 * median(subject, "FLAIR", "white_matter")
        assert median(subject, "T2", "ventricles") > 1.2 * median(subject, "T2", "grey_matter")
        assert median(subject, "T2", "grey_matter") > median(subject, "T2", "white_matter")


def test_what_a_tumour_adds_leaves_the_contrast_of_the_rest_as_it_is():
    points = np.random.default_rng(0).uniform(-60, 60, (3, 400)).astype(np.float32)
    ones, none = np.ones(400, np.float32), np.zeros(400, np.float32)
    healthy = Tissues(none, ones, none, none, none, {})
    parts = {"necrotic_core": none, "oedema": none.copy(), "enhancing": none}
    parts["oedema"][:100] = 0.9
    ill = replace(healthy, white=1 - parts["oedema"], lesion=parts, unrest=none)
    for sequence in SEQUENCES:
        with_tumour, without = (scan(sequence, points, tissues, SEED, 0) for tissues in (ill, healthy))
        np.testing.assert_array_equal(with_tumour[100:], without[100:])
        assert np.abs(with_tumour[:100] - without[:100]).min() > 0


def test_labels_hold_the_volumes_that_the_table_states(subjects):
    for subject in subjects:
        stated = sum(subject.lesion_mm3.values())
        assert (subject.labels >= len(LABELS)).sum() * 64.0 == pytest.approx(stated, rel=0.1)
        largest = max(subject.lesion_mm3, key=subject.lesion_mm3.get)
        assert (subject.labels == VALUE[largest]).sum() * 64.0 == pytest.approx(subject.lesion_mm3[largest], rel=0.15)


def test_truth_does_not_depend_on_the_spacing(atlas, subjects):
    coarse = render.render(atlas, render.output_grid(8.0), SEED, 0, ("T1",), 1.0)
    fields = ("lesion_mm3", "ventricles_mm3", "brain_mm3")
    assert [getattr(coarse, name) for name in fields] == [getattr(subjects[0], name) for name in fields]


def test_a_tumour_lies_in_the_brain_and_mostly_in_white_matter(atlas, bodies):
    for body in bodies.values():
        points = body.lesion.grid.points()
        tissue = render._healthy_tissue(atlas, body.subject, body.deformation, points)
        core, _, oedema = body.lesion.fractions(points, body.lesion.grid.step)
        for part, fluid in ((core > 0.5, 0.25), (oedema > 0.5, 0.25)):
            assert tissue.brain[part].min() > 0.4
            assert tissue.ventricles[part].mean() < 0.05  # it borders on them, and does not fill them
            assert tissue.fluid[part].mean() < fluid
        assert tissue.white[core > 0.5].mean() > tissue.grey[core > 0.5].mean()


def test_volumes_after_the_mass_effect_are_those_of_a_finer_integral_of_the_same_map(atlas, bodies):
    anatomy = template()
    fine = Grid((-66.0, -100.0, -60.0), 1.5, (89, 112, 87))
    for index, body in bodies.items():
        core, _, _ = body.lesion.fractions(fine.points(), 3.0)
        exact = anatomy.grid.sample(anatomy.ventricles, body.deformation(fine.points())) * (1 - core)
        assert body.ventricles_mm3 == pytest.approx(exact.sum(dtype=np.float64) * 1.5**3, rel=0.03)
        before = render.embody(atlas, SEED, index)
        assert body.ventricles_mm3 < before.ventricles_mm3  # squeezed


def test_the_largest_tumour_pushes_outwards_and_does_not_fold(atlas):
    body = render.embody(atlas, SEED, 0, 0.0)
    plan = lesions.Plan(True, lesions.CORE_RANGE_MM3[1], lesions.OEDEMA_RANGE_MM3[1], 0.85, 4.0)
    mass = lesions.Mass.draw(np.random.default_rng(0), plan, body.lesion_centre)
    ill = render._with_lesion(atlas, body, plan, mass)
    assert jacobian(ill.deformation).min() > 0
    directions = np.random.default_rng(1).standard_normal((3, 200)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    around = body.lesion_centre.astype(np.float32)[:, None] + 30 * directions
    moved = render.warp.displacement_at(ill.deformation.mass, lesions.PUSH_GRID, around)
    outwards = -(moved * directions).sum(0)  # maps are stored backward
    assert outwards.mean() > 1
    assert (outwards > 0).mean() > 0.9
    tissue = render._healthy_tissue(atlas, body.subject, body.deformation, lesions.PUSH_GRID.points())
    midline = (np.abs(tissue.origins[0]) < 4) & (tissue.brain > 0.9)
    shift = np.abs(ill.deformation.mass[0].ravel()[midline]).max()
    assert 3 < shift < 12  # mm
    beyond = tissue.brain.reshape(lesions.PUSH_GRID.shape) == 0
    assert np.abs(ill.deformation.mass[:, beyond]).max() < np.abs(ill.deformation.mass).max() / 3  # the skull holds


OPTIONS = {"spacing_mm": 8.0, "seed": SEED, "workers": 1, "progress": False}
EXTRAS = {"sequences": list(SEQUENCES), "lesions": 0.5, "slices": 4}


@pytest.fixture(scope="module")
def cohort(atlas, tmp_path_factory) -> Path:
    """Ten subjects with everything at 8 mm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.Atlas, "build", classmethod(lambda cls, spacing: atlas))
        return generate(tmp_path_factory.mktemp("tumours") / "cohort", n=10, **OPTIONS, **EXTRAS)


def test_the_table_agrees_with_the_label_maps(cohort):
    files = {path.name[9:] for path in (cohort / "sub-0001" / "anat").glob("*.nii.gz")}
    assert files == {f"{end}.nii.gz" for end in ("T1w", "ce-gd_T1w", "T2w", "FLAIR", "dseg")}
    with (cohort / "participants.tsv").open() as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert set(rows[0]) == {"participant_id", *json.loads((cohort / "participants.json").read_text())}
    assert {row["diseased"] for row in rows} == {"healthy", "diseased"}
    for row in rows:
        labels = nibabel.load(cohort / row["participant_id"] / "anat" / f"{row['participant_id']}_dseg.nii.gz").dataobj
        counted = float((np.asarray(labels) >= len(LABELS)).sum() * 512)
        assert counted == pytest.approx(float(row["lesion_mm3"]), rel=0.25)
        assert (counted > 0) == (row["diseased"] == "diseased")
        parts = [float(row[f"{part}_mm3"]) for part in LESION_LABELS]
        assert sum(parts) == pytest.approx(float(row["lesion_mm3"]), abs=0.3)
    assert "7\tenhancing" in (cohort / "dseg.tsv").read_text()


def test_files_are_the_same_every_time_and_the_healthy_are_those_of_the_plain_cohort(coarse, cohort, tmp_path):
    made = digests(cohort)
    again = digests(generate(tmp_path / "again", n=2, **OPTIONS, **EXTRAS))
    subjects = [name for name in again if name.startswith("sub-")]
    assert len(subjects) == 2 * 6
    assert all(again[name] == made[name] for name in subjects)
    plain = digests(generate(tmp_path / "plain", n=2, **OPTIONS))
    facts = {who: json.loads((cohort / f"{who}/anat/{who}_T1w.json").read_text()) for who in ("sub-0001", "sub-0002")}
    assert {entry["diseased"] for entry in facts.values()} == {"healthy", "diseased"}
    for who, entry in facts.items():
        for kind in ("T1w", "dseg"):
            name = f"{who}/anat/{who}_{kind}.nii.gz"
            assert (plain[name] == made[name]) == (entry["diseased"] == "healthy")


@pytest.mark.parametrize("option", ["simulated_tumours", "simulated_tumour_slices"])
def test_the_configurations_read_it(cohort, option):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("check", [f"data={option}", f"data.root={cohort}"]).data
    found = Cohort.from_config(config)
    assert found.channels == tuple(SEQUENCES)
    assert {record.covariates["diseased"] for record in found.records} == {"healthy", "diseased"}
    assert len(found.records) == (10 if option == "simulated_tumours" else 10 * 4)
    splits = {}
    for record in found.records:
        splits.setdefault(record.subject, set()).add(record.split)
        if "lesion_mm2" in record.covariates:
            area = float((read(record.labels, found.root, 2).array >= len(LABELS)).sum() * 64)
            assert area == record.covariates["lesion_mm2"]
            assert (area > 0) == (record.covariates["diseased"] == "diseased")
    assert all(len(names) == 1 for names in splits.values())


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"sequences": ["T1", "FLAIRE"]}, "Did you mean 'FLAIR'"),
        ({"sequences": ["T2"]}, "must name T1"),
        ({"lesions": 1.5}, "share of diseased subjects"),
        ({"slices": 99}, "slices = 99"),
    ],
)
def test_impossible_extras_are_refused(tmp_path, extras, message):
    with pytest.raises(LdmError, match=message):
        generate(tmp_path / "cohort", n=1, progress=False, **extras)
    assert not (tmp_path / "cohort").exists()


def test_a_cohort_with_other_extras_is_refused(coarse, tmp_path):
    root = generate(tmp_path / "cohort", n=1, spacing_mm=8.0, workers=1, progress=False)
    with pytest.raises(LdmError, match=r"lesions = None .asked for 0\.5"):
        generate(root, n=1, spacing_mm=8.0, lesions=0.5, workers=1, progress=False)
