"""Numbers of detection against their definitions, and against those of other libraries."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from ldm.applications.anomaly import DetectionOptions
from ldm.applications.cases import Case
from ldm.applications.detection import INTENSITIES, Found, map_of, summary
from ldm.applications.detection_report import evaluate, markdown
from ldm.data.draft import Record
from ldm.errors import LdmError
from ldm.metrics.detection import (
    Reference,
    best_threshold,
    detection_metrics,
    detection_statistics,
    interval_over_patients,
    otsu,
    paired_differences,
    voxel_counts,
)
from ldm.metrics.segmentation import dice


def blobs(n=12, side=24, patients=6, seed=0):
    """Noisy maps in which lesions are brighter; every other image is healthy."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, side, side), bool)
    for k in range(0, n, 2):
        i, j = rng.integers(4, side - 8, 2)
        masks[k, i : i + 5, j : j + 4] = True
    maps = (rng.gamma(2.0, 0.1, masks.shape) + 0.4 * masks).astype(np.float32)
    diseased = masks.any((1, 2))
    return maps, masks, Reference(diseased, [f"p{k % patients}" for k in range(n)], masks)


def test_dice_and_the_best_threshold_of_all():
    a, b = np.array([1, 1, 1, 0, 0], bool), np.array([0, 1, 1, 1, 0], bool)
    assert dice(a, b) == pytest.approx(2 * 2 / 6)
    assert dice(a & ~a, b & ~b) == 1
    rng = np.random.default_rng(0)
    values, truth = rng.integers(0, 20, 200) / 10, rng.random(200) < 0.2
    threshold, found = best_threshold(values, truth)
    every = [dice(values > t, truth) for t in np.arange(-0.05, 2.0, 0.1)]
    assert found == pytest.approx(max(every))
    assert dice(values > threshold, truth) == pytest.approx(found)
    threshold, found = best_threshold(np.array([0.1, 0.9, 0.2, 0.8]), np.array([False, True, False, True]))
    assert (threshold, found) == (pytest.approx(0.5), 1.0)


def test_otsu_is_the_smallest_variance_within_classes():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(0.2, 0.05, 900), rng.normal(0.7, 0.1, 100)])
    threshold = otsu(values)
    edges = np.linspace(values.min(), values.max(), 257)[1:-1]

    def within(t):
        return sum(part.var() * len(part) for part in (values[values <= t], values[values > t]) if len(part))

    assert within(threshold) <= min(map(within, edges)) * (1 + 1e-3)  # the histogram rounds values to its bins
    # two points with nothing between them: the middle of the gap, whatever their shares
    assert otsu(np.array([0.0] * 97 + [1.0] * 3)) == pytest.approx(0.5, abs=0.01)
    assert otsu(np.full(5, 0.3)) == pytest.approx(0.3)


def test_areas_are_those_of_torchmetrics():
    maps, masks, reference = blobs()
    scores = maps.max((1, 2))
    threshold, pooled = best_threshold(maps, masks)
    found = detection_metrics(maps, scores, reference, threshold, resamples=20)
    x, y = torch.from_numpy(maps).flatten(), torch.from_numpy(masks).flatten().long()
    assert found["pixel_auroc"]["value"] == pytest.approx(binary_auroc(x, y).item(), abs=1e-3)
    assert found["pixel_auprc"]["value"] == pytest.approx(binary_average_precision(x, y).item(), abs=2e-3)
    s, d = torch.from_numpy(scores), torch.from_numpy(reference.diseased).long()
    assert found["image_auroc"]["value"] == pytest.approx(binary_auroc(s, d).item())
    assert found["image_auprc"]["value"] == pytest.approx(binary_average_precision(s, d).item())
    assert found["dice_pooled"]["value"] == pytest.approx(pooled)
    ill = reference.diseased
    each = [dice(m > threshold, t) for m, t in zip(maps[ill], masks[ill], strict=True)]
    assert found["dice"]["value"] == pytest.approx(np.mean(each))
    by_otsu = [dice(m > otsu(m), t) for m, t in zip(maps[ill], masks[ill], strict=True)]
    assert found["dice_otsu"]["value"] == pytest.approx(np.mean(by_otsu))
    above = maps[~ill] > threshold
    assert found["false_positive_voxels"]["value"] == pytest.approx(above.mean())
    assert found["false_positive_images"]["value"] == pytest.approx(above.any((1, 2)).mean())
    assert found["prevalence"]["value"] == pytest.approx(masks.mean())
    for name, one in found.items():
        low, high = one.get("interval", (0, 1))
        assert low <= high, name


def test_counts_of_levels_lose_no_voxel_and_cut_at_the_threshold():
    maps, masks, reference = blobs(n=6, side=64)
    lesions, rest, edges = voxel_counts(maps, masks, reference.owners(), threshold=0.55)
    assert lesions.sum() == masks.sum()
    assert rest.sum() == (~masks).sum()
    above = np.searchsorted(edges, 0.55) + 1
    assert lesions[:, above:].sum() == (maps[masks] > 0.55).sum()
    assert len(edges) < 2100 < np.unique(maps).size


def test_patients_are_drawn_and_not_images():
    """With two patients a draw has only three outcomes, however many images they have."""
    owners = np.array([0] * 50 + [1] * 50)
    values = np.where(owners == 0, 0.0, 1.0)
    seen = set()

    def mean(weights):
        value = float((weights[owners] * values).sum() / weights[owners].sum())
        seen.add(value)
        return value

    assert interval_over_patients(mean, 2, resamples=60) == [0.0, 1.0]
    assert seen == {0.0, 0.5, 1.0}


def test_one_patient_has_no_interval():
    """Of all six patients one is ill: what is said of lesions has no spread, what of false alarms has one."""
    maps, masks, reference = blobs()
    masks = masks & np.array([s == "p0" for s in reference.subjects])[:, None, None]
    lonely = Reference(masks.any((1, 2)), reference.subjects, masks)
    found = detection_metrics(maps, maps.max((1, 2)), lonely, 0.5, resamples=20)
    assert {name for name, one in found.items() if one.get("interval", 0) is None} == {
        *("image_auroc", "image_auprc", "pixel_auroc", "pixel_auprc", "dice", "dice_otsu")
    }
    alone = detection_metrics(maps, maps.max((1, 2)), Reference(lonely.diseased, ["p0"] * 12), 0.5, resamples=20)
    assert all(one["interval"] is None for one in alone.values())
    assert markdown({"methods": {"free": alone}, "images": {"diseased": 12}}).splitlines()[-1].count("(n/a)") == len(
        alone
    )


def test_methods_are_compared_on_the_same_draws():
    """Identical maps differ by exactly nothing, whoever is drawn; a clearly better one is better beyond chance."""
    maps, masks, reference = blobs()
    worse = maps - 0.35 * masks
    ours, theirs = (detection_statistics(one, one.mean((1, 2)), reference, 0.5) for one in (maps, worse))
    same = paired_differences(ours, ours, reference, resamples=30)
    assert same == {name: {"value": 0.0, "interval": [0.0, 0.0]} for name in ("pixel_auroc", "dice", "image_auroc")}
    better = paired_differences(ours, theirs, reference, resamples=30)
    for name in ("pixel_auroc", "dice"):
        assert better[name]["interval"][0] > 0
        assert better[name]["value"] == ours[name](np.ones(6, int)) - theirs[name](np.ones(6, int))
    without = detection_statistics(worse, worse.mean((1, 2)), Reference(reference.diseased, reference.subjects), None)
    assert set(paired_differences(ours, without, reference, resamples=2)) == {"image_auroc"}


def test_a_focal_change_of_healthy_images_is_seen():
    """Two per cent of the voxels: nearly nothing of the mean of an image, and all of its 99th percentile."""
    seen, options = [], DetectionOptions(score="mean")
    for k in range(4):
        image = np.zeros((1, 10, 10), np.float32)
        healthy, mask = image.copy(), np.zeros((10, 10), bool)
        healthy[0, 0, :2] = 0.5
        mask[0, :2] = k % 2
        case = Case(Record(f"p{k}", f"p{k}", {}, None, {}, "test"), image, None, mask, bool(k % 2))
        found = Found(case, healthy, round_trip=image)
        seen.append(summary(found, map_of(found, options), options, 0))
    metrics = evaluate(seen, options, {"classifier": 0.1}, resamples=5)
    assert metrics["sanity"]["healthy_change"]["value"] == pytest.approx(0.01)
    assert metrics["sanity"]["healthy_change_p99"]["value"] == pytest.approx(0.5)
    assert set(metrics["differences"]) == set(INTENSITIES)
    text = markdown(metrics)
    assert "| classifier less | voxel AUROC | image AUROC |" in text
    assert "99th percentile of each | 0.5000 (0.5000 to 0.5000) |" in text


def test_one_class_is_refused():
    _, masks, _ = blobs(n=4)
    for diseased, message in ((np.ones(4, bool), "All 4 images are diseased"), (np.zeros(4, bool), "are healthy")):
        with pytest.raises(LdmError, match=message):
            Reference(diseased, list("abcd"), masks)
    with pytest.raises(LdmError, match="None of the 4 masks"):
        Reference(np.array([True, False] * 2), list("abcd"), np.zeros_like(masks))
