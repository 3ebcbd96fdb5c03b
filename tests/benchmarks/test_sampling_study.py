"""The study of samplers: what is measured, goes on where it stopped, and is compared seed by seed."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from benchmarks import sampling
from ldm.errors import LdmError
from tests.model.test_transfer import AGE, SEX, model

STUDY = {
    "predictor_sha256": "p",
    "split_sha256": "s",
    "reference": "held_out",
    "n_reference": 4,
    "n": 6,
    "precision": "float32",
}


class Predictor:
    """Features are an image's mean and spread; bright images are said to be of the second level."""

    def features(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)

    def predict(self, images):
        bright = (images.mean((1, 2, 3)) > 0.5).float()
        return {"sex": torch.stack([1 - bright, bright], 1)}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Run the tool on a small model with features and a distance that are quickly computed."""
    model([AGE, SEX], "adaptive_norm", channels=1).save(tmp_path / "model.safetensors")
    asked = [{"age": 50.0, "sex": "FM"[i % 2]} for i in range(6)]
    reference = sampling.Reference(np.random.default_rng(0).random((4, 2)), asked, STUDY)
    monkeypatch.setattr(sampling, "open_reference", lambda arguments, models: (Predictor(), reference, None))
    monkeypatch.setattr(sampling, "MARK_STEPS", 8)
    monkeypatch.setattr(sampling, "frechet_distance", lambda a, b: float(np.square(a.mean(0) - b.mean(0)).sum()))

    def run(*arguments):
        path = tmp_path / "rows.jsonl"
        given = ("--model", f"tiny={tmp_path / 'model.safetensors'}", "--predictor", "p", "--cohort", "data=mednist")
        monkeypatch.setattr(
            sys, "argv", ["sampling.py", "run", *given, "--rows", str(path), "--batch-size", "4", *arguments]
        )
        sampling.main()
        return path

    return run


#: `heun` cannot make 4 calls: it makes 3, once
SMALL = ("--seeds", "0", "1", "--samplers", "ddpm", "ddim:eta=0.5", "heun", "--calls", "3", "4", "--ddpm-calls", "2")


def test_a_line_says_what_was_measured(study):
    rows = [
        json.loads(line)
        for line in study("--seeds", "0", *SMALL[3:], "--guidance-scales", "2").read_text().splitlines()
    ]
    assert [(row["sampler"], row["options"], row["steps"], row["calls"]) for row in rows] == [
        ("ddpm", {}, 8, 8),
        ("ddpm", {}, 2, 2),
        ("ddim", {"eta": 0.5}, 3, 3),
        ("ddim", {"eta": 0.5}, 4, 4),
        ("heun", {}, 2, 3),
    ]
    for row in rows:
        assert row["evaluations"] == 2 * row["calls"]  # guidance: with and without the condition
        assert row["frechet_distance"] > 0
        assert row["seconds_per_image"] > 0
        assert 0 <= row["agreement"]["sex"] <= 1
        assert row["prediction_type"] == "v_prediction"
    assert len({row["frechet_distance"] for row in rows}) == 5


def test_a_study_that_was_killed_goes_on(study, monkeypatch):
    """Half of the third line is on disk: whole lines stay, and the others are those of an unbroken run."""
    path, original = study(*SMALL), sampling.measure
    whole = path.read_text().splitlines()
    assert len(whole) == 10
    path.write_text("\n".join(whole[:2]) + "\n" + whole[2][:50])
    measured = []
    monkeypatch.setattr(sampling, "measure", lambda *given: measured.append(given[1]) or original(*given))
    study(*SMALL)
    lines = path.read_text().splitlines()
    assert len(measured) == 8
    assert lines[:2] == whole[:2]
    for name in ("sampler", "seed", "frechet_distance", "agreement"):
        assert [json.loads(line)[name] for line in lines] == [json.loads(line)[name] for line in whole]
    measured.clear()
    study(*SMALL)
    assert not measured


def test_the_mark_can_be_left_out(study):
    rows = [json.loads(line) for line in study("--no-mark", *SMALL).read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["ratio"] is None for row in sampling.summarise(rows))


def line(sampler="ddpm", steps=1000, seed=0, distance=1.0, **changes):
    row = {"model": "m", "model_sha256": "m", "prediction_type": "flow", "sampler": sampler, "options": {}}
    row |= {"timestep_spacing": "trailing", "steps": steps, "calls": steps, "guidance_scale": 1.0, "seed": seed}
    return {
        **row,
        **STUDY,
        "seconds_per_image": 0.1,
        "device": "cpu",
        "threads": 2,
        "frechet_distance": distance,
        "agreement": {"sex": 0.5},
        **changes,
    }


def test_ratios_are_paired_by_seed():
    """Marks of 1, 2 and 4 with a sampler at 1.1, 1.2 and 1.3 times these; by hand, t(0.975, 2) = 4.302653."""
    factors = (1.1, 1.2, 1.3)
    rows = [line(seed=seed, distance=2.0**seed) for seed in range(3)]
    rows += [line("ddim", 10, seed, 2.0**seed * factor) for seed, factor in enumerate(factors)]
    mark, ddim = sampling.summarise(rows)
    assert mark["is_mark"]
    assert mark["ratio"] is None
    assert mark["mean"] == pytest.approx(7 / 3)
    assert mark["std"] == pytest.approx(math.sqrt(7 / 3))
    logs = [math.log(factor) for factor in factors]
    middle = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((value - middle) ** 2 for value in logs) / 2 / 3)
    expected = [math.exp(middle), math.exp(middle - half), math.exp(middle + half)]
    assert expected == pytest.approx([1.197216, 0.972822, 1.473369], abs=1e-6)
    assert ddim["ratio"] == pytest.approx(expected, rel=1e-6)


def test_a_ratio_takes_the_mark_of_its_own_model_and_guidance():
    rows = [line(distance=2.0), line(distance=4.0, guidance_scale=2.0), line(distance=8.0, model="other")]
    rows += [line("heun", 9, distance=2.0, guidance_scale=2.0), line("heun", 9, distance=2.0, model="third")]
    found = {
        (row["model"], row["guidance_scale"]): row["ratio"] for row in sampling.summarise(rows) if not row["is_mark"]
    }
    assert found["m", 2.0][0] == pytest.approx(0.5)
    assert all(math.isnan(end) for end in found["m", 2.0][1:])
    assert found["third", 1.0] is None


def test_the_table_and_the_plot(tmp_path, monkeypatch):
    rows = [line(seed=seed, distance=value) for seed, value in enumerate((1.0, 3.0))]
    rows += [line("ddim", 10, seed, value, options={"eta": 0.5}) for seed, value in enumerate((2.0, 6.0))]
    for row in rows:
        sampling.append(tmp_path / "rows.jsonl", row)
    given = ["--rows", tmp_path / "rows.jsonl", "--table", tmp_path / "table.md", "--plot", tmp_path / "plot.png"]
    monkeypatch.setattr(sys, "argv", ["sampling.py", "table", *map(str, given)])
    sampling.main()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| m (flow) | 1 | ddpm | trailing | 1000 | 2 +- 1.41 (2) | 1 | 0.1 | 50.0% |"
    assert (
        lines[3]
        == "| m (flow) | 1 | ddim:eta=0.5 | trailing | 10 | 4 +- 2.83 (2) | 2.000 (2.000 to 2.000) | 0.1 | 50.0% |"
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_two_studies_are_not_mixed():
    with pytest.raises(LdmError, match="n_reference is 4 and 5"):
        sampling.one_study([line(), line(n_reference=5)])


def test_asked_rows_keep_the_shares_of_the_classes():
    rows = [{"class": name} for name in "aabbbbcc" * 10]
    codes = np.array([["abc".index(row["class"])] for row in rows])
    for n in (8, 160):
        asked = [rows[k]["class"] for k in sampling.spread_evenly(codes, n)]
        assert [asked.count(name) / n for name in "abc"] == [0.25, 0.5, 0.25]
