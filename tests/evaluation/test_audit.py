"""A copier fails, scans that nobody was trained on pass, and an audit that is blind does not pass anybody."""

import itertools
import json

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.evaluation.audit import AuditSettings, Scans, audit
from ldm.evaluation.audit_report import audit_fragment, pair_pictures, write_audit_page
from ldm.evaluation.planted import KINDS, plant
from ldm.evaluation.spaces import CorrelationSpace, MatcherSpace, audit_spaces, checked_flips
from ldm.metrics.copies import pairwise


def persons(count, seed):
    """Pictures ``(1, 24, 24)`` in 0..1 of five slanted waves each: who it is, is which waves they are."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:24, :24] / 24
    pictures = []
    for _ in range(count):
        waves = 1 + np.stack(np.divmod(rng.choice(36, 5, replace=False), 6), 1)  # (5, 2), periods a side
        sizes, signs, phases = rng.uniform(0.6, 1, 5), rng.choice((-1, 1), 5), rng.uniform(0, 2 * np.pi, 5)
        each = zip(sizes, waves, signs, phases, strict=True)
        total = sum(a * np.cos(2 * np.pi * (u * y + sign * v * x) + phase) for a, (u, v), sign, phase in each)
        pictures.append((0.5 + total / sizes.sum() / 2)[None].astype(np.float32))
    return pictures


def scans(images, prefix):
    names = [f"{prefix}{i}" for i in range(len(images))]
    return Scans(images, names, names)


def spectrum(images):
    """Unit vectors that flips and shifts leave alone: strength of the slanted waves, mirrored ones together."""
    size = torch.fft.fft2(images[:, 0]).abs()
    both = size + size.flip(1).roll(1, 1)  # F(u, v) beside F(-u, v)
    return torch.nn.functional.normalize(both[:, 1:7, 1:7].flatten(1), dim=1)


def pixels(images):
    """Unit vectors that know no shifts."""
    x = images.flatten(1)
    return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1)


def spaces(matcher):
    return audit_spaces(matcher, None, (0, 1))


TRAIN, HELD_OUT = scans(persons(60, 0), "train"), scans(persons(40, 1), "held")
SETTINGS = AuditSettings(planted=20, recall=0.9)


def test_what_a_shift_brings_in_is_background():
    scan = TRAIN.images[0]
    (copy,) = plant("shifted", [scan], [0], [0], (-5, 5), seed=5)
    assert copy.min() == scan.min()


def changed(kinds, count):
    """Copies of the first training scans, of all kinds in turn."""
    return [next(plant(kinds[i % len(kinds)], TRAIN.images, [i], [59], (0, 1), seed=5)) for i in range(count)]


@pytest.mark.parametrize("kinds", [("unchanged",), KINDS[1:]], ids=["plain", "changed"])
def test_a_copier_fails(kinds):
    result = audit(changed(kinds, 30), TRAIN, HELD_OUT, spaces(spectrum), settings=SETTINGS)
    space = result.numbers["spaces"]["features"]
    assert not result.passed
    assert result.verdict == "not passed"
    assert space["excess"]["p_value"] < 1e-4
    assert space["copies"]["count"] > 15
    assert result.lines[0].startswith("NOT PASSED")
    assert space["authenticity"]["synthetic images"] < 0.1 < 0.3 < space["authenticity"]["held-out scans"]
    assert space["distance_ratio"]["synthetic images"] < space["distance_ratio"]["held-out scans"]
    pair = result.worst["features"][0]
    assert pair.copy
    assert pair.train == pair.synthetic  # image i was made of scan i


def test_a_few_copies_among_many_are_found_too():
    drawn = persons(100, 2) + changed(("unchanged",), 2)
    result = audit(drawn, TRAIN, HELD_OUT, spaces(spectrum), settings=SETTINGS)
    assert result.numbers["spaces"]["features"]["copies"]["count"] == 2
    assert not result.passed


@pytest.mark.parametrize(("seed", "settings"), [(2, SETTINGS), (3, AuditSettings())], ids=["lenient", "as demanded"])
def test_scans_that_nobody_saw_pass_though_some_are_flagged(seed, settings):
    result = audit(persons(100, seed), TRAIN, HELD_OUT, spaces(spectrum), settings=settings, subjects_linked=False)
    assert {row["n"] for row in result.numbers["control"]["kinds"].values()} == {settings.planted}
    space = result.numbers["spaces"]["features"]
    assert result.passed, result.lines
    assert space["rows"]["held-out scans"]["flagged"] == 2  # of 40
    assert result.numbers["control"]["passed"]
    assert result.numbers["control"]["untold"] == []
    assert abs(space["membership"]["auc"] - 0.5) < 0.2
    text = " ".join(result.lines)
    assert "no formal guarantee" in text
    assert "does not say which scans are of one person" in text
    assert "anonym" not in text.lower()
    assert text.lower().count("guarantee") == text.lower().count("no formal guarantee")


def test_an_audit_that_is_blind_passes_nobody():
    blind = [MatcherSpace(pixels, (0, 1))]
    result = audit(persons(60, 2), TRAIN, HELD_OUT, blind, settings=SETTINGS)
    space = result.numbers["spaces"]["features"]
    assert space["control"]["noised"]["recall"] == 1
    assert space["control"]["flipped"]["recall"] == 1  # flips are tried
    assert space["control"]["shifted"]["recall"] < 0.9
    assert result.verdict == "not conclusive"
    assert not result.passed
    assert "THE AUDIT'S OWN CONTROL FAILED" in " ".join(result.lines)
    assert "shifted" in " ".join(result.lines)
    same = audit(changed(("unchanged",), 30), TRAIN, HELD_OUT, blind, settings=SETTINGS)
    assert same.verdict == "not passed"  # what it does find counts


def test_few_held_out_scans_cannot_tell_copies_and_pass_nobody():
    result = audit(persons(40, 2), TRAIN, scans(persons(2, 1), "held"), spaces(spectrum), settings=SETTINGS)
    control = result.numbers["control"]
    assert control["passed"]  # every kind lies nearer than the nearest of two held-out scans,
    assert control["noticeable_share"] is not None
    assert "noised" in control["untold"]  # which says little about the nearest of forty
    assert "unchanged" not in control["untold"]
    assert control["kinds"]["unchanged"]["strict_recall"] == 1
    assert control["kinds"]["noised"]["strict_space"] is None
    assert result.verdict == "not conclusive"
    assert "noised) could not be told from the nearest" in result.lines[0]


def test_more_held_out_scans_are_flagged_in_any_space_than_in_one():
    drawn = persons(30, 2)
    result = audit(drawn, TRAIN, HELD_OUT, spaces(spectrum), settings=AuditSettings(planted=1))
    alone = [space["rows"]["held-out scans"]["flagged"] for space in result.numbers["spaces"].values()]
    assert alone == [2, 2]
    vectors = [space.vectors(TRAIN.images) for space in spaces(spectrum)]
    nearest = [
        pairwise(space.all_variants(HELD_OUT.images), known).min(1)
        for space, known in zip(spaces(spectrum), vectors, strict=True)
    ]
    either = set().union(*(np.argsort(one)[:2].tolist() for one in nearest))
    found = result.numbers["any_space"]["held-out scans"]
    assert found == {"n": 40, "flagged": len(either), "share": len(either) / 40}
    assert found["flagged"] > 2
    assert f"at least one of 2 ways lie {len(either)} of 40 held-out scans" in " ".join(result.lines)


def test_correlation_finds_what_a_blind_matcher_does_not():
    result = audit(persons(60, 2), TRAIN, HELD_OUT, spaces(pixels), settings=SETTINGS)
    assert {row["space"] for row in result.numbers["control"]["kinds"].values()} == {"features", "correlation"}
    assert result.passed, result.lines
    assert not audit(changed(("shifted",), 30), TRAIN, HELD_OUT, spaces(pixels), settings=SETTINGS).passed


def test_correlation_is_of_the_best_shift_and_flip_whatever_the_contrast():
    rng, space = np.random.default_rng(0), CorrelationSpace((0, 1, 2))
    large = rng.random((2, 20, 24, 22)).astype(np.float32)  # its longest side needs no averaging; two channels
    image, moved = large[:, 1:-1, 1:-1, 1:-1], large[:, :-2, 2:, 1:-1]
    contrast = np.array([3, 0.5], np.float32)[:, None, None, None]
    changed = np.ascontiguousarray(np.flip(contrast * moved + 0.1, 2))
    reference = space.vectors([image, rng.random(image.shape)])
    near, far = pairwise(space.all_variants([changed]), reference)[0]
    assert near == pytest.approx(0, abs=1e-5)
    assert far > 1  # of noise, r is about 0
    first = next(space.all_variants([image]))
    assert len(first) == 8 * 5**3  # flips times shifts of up to 2
    np.testing.assert_allclose(first[0], reference[0], rtol=1e-6)  # the image itself comes first
    one, other = image[:1], rng.random((1, 18, 22, 20))
    shifts = itertools.product(range(5), repeat=3)
    cuts = [one[0, i : i + 14, j : j + 18, k : k + 16] for i, j, k in shifts]
    best = max(np.corrcoef(cut.ravel(), other[0, 2:-2, 2:-2, 2:-2].ravel())[0, 1] for cut in cuts)
    plain = CorrelationSpace(())
    assert pairwise(plain.all_variants([one]), plain.vectors([other]))[0, 0] == pytest.approx(np.sqrt(2 - 2 * best))


class CountingSpace(CorrelationSpace):
    """Keeps every image whose variants were compared."""

    def __init__(self):
        super().__init__((0, 1))
        self.seen = []

    def variants(self, image):
        self.seen.append(image.numpy())
        return super().variants(image)


def test_only_training_scans_next_to_an_image_are_compared_with_the_others():
    space, drawn = CountingSpace(), persons(3, 2)
    result = audit(drawn, TRAIN, scans(persons(4, 1), "held"), [space], settings=AuditSettings(planted=1))
    compared = sum(any(np.array_equal(image, scan) for scan in TRAIN.images) for image in space.seen)
    assert compared <= 1 + 3 + 4  # the unchanged planted copy, and the nearest of each image
    plain = CorrelationSpace((0, 1))
    vectors = plain.vectors(TRAIN.images)
    to_train, within = (pairwise(plain.all_variants(images), vectors) for images in (drawn, TRAIN.images))
    np.fill_diagonal(within, np.inf)
    expected = (to_train.min(1) >= within.min(1)[to_train.argmin(1)]).mean()
    assert result.numbers["spaces"]["correlation"]["authenticity"]["synthetic images"] == expected


def test_several_scans_of_a_held_out_subject_count_once():
    doubled = Scans(HELD_OUT.images * 2, [*HELD_OUT.subjects] * 2, [*HELD_OUT.names, *"x" * 40])
    one, two = (audit(persons(30, 2), TRAIN, held, spaces(spectrum), settings=SETTINGS) for held in (HELD_OUT, doubled))
    first, second = (result.numbers["spaces"]["features"] for result in (one, two))
    assert first["threshold"] == second["threshold"]
    assert first["excess"] == second["excess"]
    assert first["membership"]["n"] == second["membership"]["n"]


def test_what_is_written_shows_the_nearest_pairs_and_can_leave_scans_out(tmp_path):
    drawn = changed(("unchanged",), 9)
    result = audit(drawn, TRAIN, HELD_OUT, spaces(spectrum), settings=SETTINGS, protocol={"cohort": "made"})
    content = json.loads(json.dumps(result.to_dict()))
    assert content["passed"] is False
    assert content["protocol"]["cohort"] == "made"
    pictures = pair_pictures(result, drawn, TRAIN, tmp_path, (0, 1))
    page = write_audit_page(tmp_path / "audit.html", content, pictures).read_text()
    assert page.count("data:image/png;base64,") == 2  # of each space
    assert "NOT PASSED" in page
    assert "data:image" not in audit_fragment(content)
    assert "<html" not in audit_fragment(content)


def test_settings_and_sets_that_make_no_audit_are_refused():
    with pytest.raises(LdmError, match="rate is 1.5"):
        AuditSettings(rate=1.5)
    with pytest.raises(LdmError, match="2 subjects or more.*there are 60 and 1"):
        audit(persons(3, 2), TRAIN, scans(persons(1, 1), "held"), spaces(spectrum))
    with pytest.raises(LdmError, match="synthetic images; there are none"):
        audit([], TRAIN, TRAIN, spaces(spectrum))
    with pytest.raises(LdmError, match="flip_axes"):
        checked_flips((2,), 2)
