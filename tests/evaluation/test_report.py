"""Every verdict of the report, and the page with and without each of its parts."""

import copy
import html
import json

import numpy as np
import PIL.Image
import pytest

from ldm.errors import LdmError
from ldm.evaluation.audit import AuditSettings, Scans, audit
from ldm.evaluation.distances import compare
from ldm.evaluation.goals import MET, MISSED, NOT_MEASURED, UNDECIDED, check_goals, judged, overall, verdicts
from ldm.evaluation.report import write_report
from ldm.evaluation.spaces import MatcherSpace
from ldm.metrics.ratio import EXTRAPOLATED, FIXED


def distances(ratio=1.2, interval=(1.1, 1.4), control=(3.0, 8.0), untrusted=None, floor=(0.8, 1.3), method=FIXED):
    """Distances of random features, with the numbers put in that decide."""
    rng = np.random.default_rng(0)
    sets = {name: rng.standard_normal((12, 2)) for name in ("real", "blurred", "samples")}
    protocol = {
        "reference": {"images": "training split", "n": 40, "of": 40},
        "features": {"kind": "fake", "name": "f", "sha256": "0" * 64},
    }
    result = compare(rng.standard_normal((40, 2)), sets, "real", "blurred", protocol)
    own = {"value": sum(floor) / 2, "interval": list(floor)}
    result["protocol"]["frechet_ratio"] |= {"method": method, "floor": own}
    result["untrusted"] = untrusted or {}
    result["rows"]["samples"] |= {"frechet_ratio": ratio, "frechet_ratio_interval": list(interval)}
    result["rows"]["real"] |= {"frechet_ratio": own["value"], "frechet_ratio_interval": own["interval"]}
    result["rows"]["blurred"] |= {"frechet_ratio": 5.0, "frechet_ratio_interval": list(control)}
    return result


def within(value=0.0, interval=(-0.01, 0.01)):
    return {
        "sets": {
            name: {"mean": 0.6, "std": 0.1, "interval": [0.5, 0.7]} for name in ("real", "reconstructed", "samples")
        },
        "difference": {"samples": {"value": value, "interval": list(interval)}},
        "protocol": {"pairs": 66, "images": 12, "scales": 3, "window": "uniform", "kernel": 7},
    }


AGREEMENT = {"r": 0.8, "slope": 0.9, "mae": 3.0, "n": 12, "r_interval": [0.7, 0.9], "slope_interval": [0.8, 1.0]}


def condition(interval=(0.96, 1.0), **more):
    share = {"value": 0.98, "interval": list(interval), "subjects": 12}
    entry = {"kind": "continuous", "unit": "years", "instrument_on_held_out": AGREEMENT, "samples": AGREEMENT}
    return {"age": {**entry, "share": share, "unmeasurable_samples": 0, **more}}


LEVELS = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 12, "levels": {}, "confusion": [[3, 3], [3, 3]]}
SEX = {"kind": "categorical", "levels": ["F", "M"], "instrument_on_held_out": LEVELS, "samples": LEVELS}
FULL = {
    "cohort": "test",
    "simulated": True,
    "distances": distances(),
    "ms_ssim": within(),
    "fidelity": condition(),
    "reconstruction": {"psnr_mean": 30.0, "psnr_std": 1.0, "n": 12, "splits": {"test": {"psnr_mean": 29.0, "n": 4}}},
    "model": {"parameters": "1 M"},
}


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ({"distances": distances()}, MET, "1.2 times as far"),
        ({"distances": distances(2.0, (1.6, 2.9))}, MISSED, "(95 %: 1.6 to 2.9); goal: at most 1.5"),
        ({"distances": distances(1.4, (1.1, 1.9))}, UNDECIDED, "12 images each: with fewer images any ratio"),
        ({"distances": distances(control=(0.9, 9.0))}, NOT_MEASURED, "does not tell blurred images from real ones"),
        ({"distances": distances(floor=(1.2, 1.9))}, NOT_MEASURED, "reference and held-out images differ in kind"),
        ({"distances": distances(floor=(1.2, 1.9), method=EXTRAPOLATED)}, MET, "extrapolated to infinitely many"),
        ({"distances": distances(floor=(2.1, 2.9), method=EXTRAPOLATED)}, NOT_MEASURED, "2.5 times as far (95 %: 2.1"),
        (
            {"distances": distances(untrusted={"frechet": ["blurred"]})},
            NOT_MEASURED,
            "does not call blurred worse than real",
        ),
        ({"distances": distances(), "goals": {"frechet_ratio": None}}, NOT_MEASURED, "No goal is set"),
        ({}, NOT_MEASURED, "needs a feature network"),
    ],
)
def test_the_verdict_on_realism(part, status, said):
    verdict = verdicts(part)[0]
    assert (verdict.status, said in verdict.text) == (status, True), verdict.text


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        (within(), MET, "goal: at most 0.02 either way"),
        (within(0.1, (0.08, 0.12)), MISSED, "more alike than real ones by 0.100"),
        (within(-0.1, (-0.12, -0.08)), MISSED, "less alike than real ones by 0.100"),
        (within(0.02, (-0.01, 0.05)), UNDECIDED, "-0.010 to +0.050"),
        (within() | {"seeds": {"difference": {"values": [0, 1], "mean": 0.5, "std": 0.7}}}, MET, "Over 2 seeds"),
        (within() | {"protocol": {"subjects": 2}}, NOT_MEASURED, "There are 2 held-out subjects"),
        (None, NOT_MEASURED, "too few images"),
    ],
)
def test_the_verdict_on_diversity(part, status, said):
    verdict = verdicts({} if part is None else {"ms_ssim": part})[1]
    assert (verdict.status, said in verdict.text) == (status, True), verdict.text


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        (condition(), MET, "98% of the agreement on real images is reached (95 %: 96% to 100%)"),
        (condition((0.3, 0.8)), MISSED, "r = 0.800, slope 0.90, mean error 3 years"),
        (condition((0.8, 1.0)), UNDECIDED, "goal: at least 95%"),
        (condition(share={"value": 1.4, "interval": [1.4, 1.4], "subjects": 1}), NOT_MEASURED, "There are 1 held-out"),
        (condition(share=None), NOT_MEASURED, "does not read it from real images"),
        (condition(trained_on_split=False), NOT_MEASURED, "may know some of the held-out images"),
        ({"sex": {**SEX, "share": {"value": 1.0, "interval": [0.95, 1.1]}}}, MET, "50.0% (95 %: 40.0% to 60.0%) of 12"),
        (None, NOT_MEASURED, "no instrument"),
    ],
)
def test_the_verdict_on_a_condition(part, status, said):
    verdict = verdicts({} if part is None else {"fidelity": part})[2]
    assert (verdict.status, said in verdict.text) == (status, True), verdict.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"statement": "No copies.", "passed": True}, MET),
        ({"statement": "3 copies.", "passed": False}, MISSED),
        ({"statement": "Too few."}, NOT_MEASURED),
        ({"statement": "Blind.", "passed": False, "verdict": "not conclusive"}, NOT_MEASURED),
        (None, NOT_MEASURED),
    ],
)
def test_the_verdict_on_copying(content, status):
    *_, verdict = verdicts({}, content)
    assert verdict.status == status
    assert verdict.text.startswith("No audit" if content is None else content["statement"])


def test_an_audit_of_images_that_were_drawn_otherwise_is_no_measurement(tmp_path):
    drawn = {"guidance_scale": 1.5, "num_inference_steps": 20}
    metrics = {"model_sha256": "a", "sampling": drawn}
    found = {"statement": "No copies.", "passed": True, "model_sha256": "a", "protocol": {"sampling": drawn}}
    assert verdicts(metrics, found)[-1].status == MET
    for other, said in ((drawn | {"guidance_scale": 4}, "scale 4 there, 1.5 here"), (None, "does not say how")):
        content = found | {"protocol": {"sampling": other}, "spaces": {}}
        verdict = verdicts(metrics, content)[-1]
        assert verdict.status == NOT_MEASURED
        assert said in verdict.text
        text = page(tmp_path, metrics, content)
        assert said in text
        assert "Is this a copy of the training scans?" not in text


def test_an_interval_is_judged_as_a_whole():
    assert judged((-1, 1), -1, 1) == MET
    assert judged((0, 1.1), -1, 1) == UNDECIDED
    assert judged((1.1, 2), -1, 1) == judged((-3, -2), -1, 1) == MISSED
    assert overall(verdicts(FULL)) == "Of 4 goals: 3 met, 1 not measured."


def test_goals_are_checked():
    assert check_goals({"share": 0.8}) == {"frechet_ratio": 1.5, "ms_ssim": 0.02, "share": 0.8}
    with pytest.raises(LdmError, match="Did you mean 'ms_ssim'"):
        check_goals({"ms_sim": 0.1})
    with pytest.raises(LdmError, match="goals.share is 'high'"):
        check_goals({"share": "high"})


def page(folder, metrics, content=None):
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if content is not None:
        (folder / "audit.json").write_text(json.dumps(content))
    return write_report(folder).read_text()


@pytest.mark.parametrize("missing", [None, *FULL, "everything"])
def test_the_page_copes_with_missing_parts_and_needs_nothing_else(tmp_path, missing):
    metrics = {} if missing == "everything" else {name: part for name, part in FULL.items() if name != missing}
    text = page(tmp_path, metrics)
    assert text.count('class="status"') == 4
    assert text.index('class="status"') < text.index("<h2>")  # verdict first
    for reference in ("http", 'src="/', "<script", "@import", "url("):
        assert reference not in text
    assert ("known to be worse" in text) == ("distances" in metrics)
    assert ("the 4 of the test split 29.0 dB" in text) == ("reconstruction" in metrics)
    assert ("that the truth is known" in text) == metrics.get("simulated", False)


def test_the_page_shows_pictures_and_an_audit_that_stands_beside_it(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("figures/real.png", "figures/samples.png", "figures/measured_real_age.png"):
        PIL.Image.new("L", (4, 4)).save(tmp_path / name)
    assert page(tmp_path, FULL).count("data:image/png;base64,") == 3
    rng = np.random.default_rng(0)
    images = [rng.random((1, 8, 8), np.float32) for _ in range(24)]
    train, held_out = (
        Scans(images[part], names, names)
        for part, names in ((slice(12), list("abcdefghijkl")), (slice(12, 24), list("mnopqrstuvwx")))
    )
    found = audit(
        images[:4],
        train,
        held_out,
        [MatcherSpace(lambda batch: batch.flatten(1), (0, 1))],
        settings=AuditSettings(planted=4),
    )
    text = page(tmp_path, FULL, found.to_dict())
    assert text.count("data:image/png;base64,") == 3  # no training scan
    assert "Nearest training scan in" in text
    assert "1 missed" in text
    PIL.Image.new("L", (4, 4)).save(tmp_path / "figures/nearest_features.png")  # put there on request
    with_pairs = page(tmp_path, FULL, found.to_dict())
    assert with_pairs.count("data:image/png;base64,") == 4
    assert "for those who may see these" in with_pairs
    assert "for those who may see these" not in text
    (tmp_path / "figures/nearest_features.png").unlink()
    assert html.escape(found.lines[0], quote=False) in text.replace("&#39;", "'")
    assert "No audit stands beside" in page(tmp_path, FULL, {**found.to_dict(), "model_sha256": "0"})  # another model's
    short = {"statement": "<b>2</b> copies of 12.", "passed": False}
    text = page(tmp_path, FULL, short)
    assert "&lt;b&gt;2&lt;/b&gt; copies of 12." in text  # a file's words are no markup
    assert "Nearest training scan in" not in text
    PIL.Image.new("L", (4, 4)).save(tmp_path / "figures/pairs.png")
    assert page(tmp_path, FULL, short).count("data:image/png;base64,") == 2  # pairs instead of two mosaics


def test_a_metric_that_cannot_be_trusted_is_flagged_beside_its_number(tmp_path):
    flagged = copy.deepcopy(FULL)
    flagged["distances"]["untrusted"] = {"precision": ["blurred"], "kid": ["blurred"]}
    text = page(tmp_path, flagged)
    assert "Precision: this metric cannot be trusted here.</strong> It does not rank blurred below real images." in text
    assert text.count('number distrust"') == 2 * 3  # both columns of all three rows
    assert 'distrust"' not in page(tmp_path, FULL)


@pytest.mark.parametrize("kind", [condition(), {"age": {**SEX, "share": None, "unmeasurable_samples": 0}}])
def test_an_instrument_of_another_split_is_flagged_beside_its_numbers(tmp_path, kind):
    said = '<p class="warn">age: The instrument was trained on another split'
    assert said not in page(tmp_path, {**FULL, "fidelity": kind})
    assert said in page(tmp_path, {**FULL, "fidelity": {"age": {**kind["age"], "trained_on_split": False}}})


def test_a_page_without_numbers_says_what_to_run(tmp_path):
    with pytest.raises(LdmError, match=r"metrics.json: cannot be read.*Run ldm evaluate"):
        write_report(tmp_path)
