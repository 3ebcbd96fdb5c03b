"""What is said of segmentations, on label maps whose answers are known."""

import numpy as np
import pytest

from ldm.applications.segmentation import Result
from ldm.applications.segmentation_evaluation import calibrate, measure_patient, paired_difference, summarise
from ldm.applications.segmentation_report import interval, number
from ldm.metrics.segmentation import generalised_energy_distance

CLASSES = ("lesion",)
NOTHING = np.zeros((12, 12), np.uint8)


def square(side, start=2):
    mask = NOTHING.copy()
    mask[start : start + side, start : start + side] = 1
    return mask


def result(labels, members=None, uncertain=0.0):
    members = np.stack([labels] * 4 if members is None else members)
    mean = (members == 1).mean(0)[None]
    return Result(labels, members, mean, np.where((members > 0).any(0), uncertain, 0.0), NOTHING * 1.0)


def measured_lesion(images, joint=False):
    """One patient's numbers; ``images`` as (result, truth)."""
    results, truths = zip(*images, strict=True)
    return measure_patient(results, truths, truths, CLASSES, joint)[0]["classes"]["lesion"]


def measured(patients, seed=0):
    """Patients as lists of (result, truth)."""
    rows, bins = zip(
        *(measure_patient([r for r, _ in one], [t for _, t in one], [t for _, t in one], CLASSES) for one in patients),
        strict=True,
    )
    rows = [
        {"subject": str(i), "images": len(one), **row} for i, (row, one) in enumerate(zip(rows, patients, strict=True))
    ]
    everywhere, region = ([one[name] for one in bins] for name in ("everywhere", "region"))
    return rows, summarise(rows, CLASSES, seed), calibrate(rows, everywhere, region, seed)


def test_patients_without_the_class_earn_nothing():
    ill = [(result(square(4)), square(6))]  # Dice 2 * 16 / (16 + 36)
    healthy = [(result(NOTHING), NOTHING)]
    alarm = [(result(square(2)), NOTHING)]
    _, summary, _ = measured([ill, *[healthy] * 2, alarm])
    lesion = summary["classes"]["lesion"]
    assert (lesion["dice"]["value"], lesion["dice"]["n"]) == (pytest.approx(32 / 52), 1)
    assert lesion["volume_error"]["value"] == -20
    assert lesion["dice_or_empty"]["value"] == pytest.approx((32 / 52 + 1 + 1 + 0) / 4)
    assert (lesion["false_volume"]["value"], lesion["false_volume"]["n"]) == (pytest.approx(4 / 3), 3)
    assert lesion["false_positives"]["value"] == pytest.approx(1 / 3)


def test_a_surface_distance_is_of_images_that_have_two_surfaces():
    moved = (result(square(4, 5)), square(4, 2))
    empty, missed = (result(NOTHING), NOTHING), (result(NOTHING), square(4))
    alone = measured([[moved]])[1]["classes"]["lesion"]
    among = measured([[moved, empty, empty, missed]])[1]["classes"]["lesion"]
    assert alone["hd95"]["value"] > 2
    assert among["hd95"]["value"] == alone["hd95"]["value"]
    assert (alone["one_surface"], among["one_surface"]) == (0, 1)


def test_uncertainty_is_judged_where_there_is_a_lesion():
    """Three ill patients, the less sure the better the answer; healthy ones, sure and right, must not mend that."""
    ill = [[(result(square(side), uncertain=level), square(6))] for side, level in ((6, 0.3), (5, 0.2), (3, 0.1))]
    healthy = [[(result(NOTHING), NOTHING)]] * 9
    _, _, calibration = measured(ill + healthy)
    for name in ("spearman_of_images", "spearman_of_patients"):
        assert (calibration[name]["value"], calibration[name]["n"]) == (pytest.approx(-1), 3)


def test_an_honest_ensemble_is_calibrated_where_it_is_unsure():
    """Truth and members are drawn with the same probabilities: a region chosen by the truth would make this a fault."""
    random = np.random.default_rng(0)
    probability = np.repeat([0.0, 0.02, 0.2, 0.5, 0.8], 40_000).reshape(200, 1000)
    members = (random.random((50, *probability.shape)) < probability).astype(np.uint8)
    truth = (random.random(probability.shape) < probability).astype(np.uint8)
    spread = probability * (1 - probability)
    honest = Result((probability > 0.5).astype(np.uint8), members, probability[None], spread, spread)
    _, _, calibration = measured([[(honest, truth)]])
    assert calibration["ece"] < 0.01
    assert calibration["ece_region"] < 0.015


def test_differences_are_paired_and_over_patients_who_have_the_class():
    truth = square(6)
    sides = (6, 5, 4)
    ours = [[(result(square(side)), truth)] for side in sides] + [[(result(NOTHING), NOTHING)]]
    theirs = [[(result(square(side - 1)), truth)] for side in sides] + [[(result(square(2)), NOTHING)]]
    one, two = ({"patients": measured(rows)[0], "protocol": {"classes": {"lesion": [1]}}} for rows in (ours, theirs))
    found = paired_difference(one, two)["lesion"]
    gains = [2 * s**2 / (s**2 + 36) - 2 * (s - 1) ** 2 / ((s - 1) ** 2 + 36) for s in sides]
    assert (found["value"], found["n"]) == (pytest.approx(np.mean(gains)), 3)
    assert found["interval"][0] > 0


def test_members_of_several_images_are_added_up_only_where_they_are_one_draw():
    """Two slices; in each the first member finds less than the other, and were it one draw, so would the patient's."""
    members = np.stack([square(3), square(5)])
    images = [(result(square(4), members), square(4)), (result(square(4), members[::-1]), square(4))]
    apart, joint, alone = measured_lesion(images), measured_lesion(images, True), measured_lesion(images[:1])
    assert np.isnan(apart["in_interval"])
    assert (joint["in_interval"], alone["in_interval"]) == (0, 1)  # 34 + 34 of 32; 9 and 25 around 16
    of_image = generalised_energy_distance(list(members == 1), [square(4) == 1])
    assert apart["ged"] == joint["ged"] == pytest.approx(of_image)
    summary = measured([images, images])[1]["classes"]["lesion"]["in_interval"]
    assert (number(summary["value"]), interval(summary), summary["n"]) == ("n/a", "n/a", 0)
    single = (result(square(4), square(4)[None]), square(4))  # one network
    assert np.isnan(measured_lesion([single])["in_interval"])


def test_each_image_is_measured_with_its_own_voxels():
    """Slices with rows of 2 mm, columns of 1 mm and 3 mm across, and of 1 x 1 x 1 mm; moved down by three rows."""
    images = [
        (Result(**{**vars(result(square(4, 5))), "spacing": spacing}), np.roll(square(4, 5), -3, 0))
        for spacing in ((2.0, 1.0, 3.0), (1.0, 1.0, 1.0))
    ]
    found, coarse, fine = (measured_lesion(some) for some in (images, images[:1], images[1:]))
    assert (coarse["volume"], fine["volume"], found["volume"]) == (16 * 6, 16, 16 * 7)
    assert coarse["hd95"] == pytest.approx(2 * fine["hd95"])
    assert found["hd95"] == pytest.approx((coarse["hd95"] + fine["hd95"]) / 2)
    nothing, six = Result(**{**vars(result(square(4))), "spacing": (1.0, 2.0, 3.0)}), NOTHING
    assert measured_lesion([(nothing, six)])["false_volume"] == 16 * 6
