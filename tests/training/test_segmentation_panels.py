"""Training of a model of label maps stops where its Dice has long not become better, also over sessions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.training.segmentation_panels import METRIC, LabelledImage, SegmentationPanels


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Validate once a score, as training would; returns after how many it was stopped, or None."""

    def run(scores, patience, step=1):
        case = LabelledImage("a", "a", np.zeros((1, 2, 2)), np.ones((2, 2)))
        panels = SegmentationPanels(tmp_path, [case], 1, 1, patience=patience)
        strategy = SimpleNamespace(broadcast=lambda value: value)
        trainer = SimpleNamespace(is_global_zero=True, strategy=strategy, should_stop=False)
        panels.on_train_start(trainer, SimpleNamespace(step=step))
        for count, score in enumerate(scores, 1):
            if trainer.should_stop:
                return count - 1
            monkeypatch.setattr(panels, "_validate", lambda *_, score=score: panels.scores.append(score))
            panels.on_validation_end(trainer, None)
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": count, "time": 0, METRIC: score}) + "\n")
        return len(scores) if trainer.should_stop else None

    return run


def test_it_stops_after_so_many_validations_without_a_better_one(train):
    assert train([0.1, 0.5, 0.4, 0.5, 0.9], patience=2) == 4


def test_it_goes_on_while_it_gets_better(train):
    assert train([0.1, 0.2, 0.1, 0.3, 0.2], patience=2) is None


def test_without_patience_nothing_stops_it(train):
    assert train([0.5, 0.4, 0.3, 0.2], patience=None) is None


def test_a_run_that_has_stopped_by_itself_does_not_go_on(train):
    assert train([0.5, 0.4, 0.3], patience=2) == 3
    assert train([0.9], patience=2, step=3) == 0
    assert train([0.9], patience=2, step=0) is None  # started anew in the same folder


def test_a_validation_that_is_taken_anew_counts_once(train):
    """Killed after the third was logged and before the checkpoint that would know of it."""
    assert train([0.5, 0.4, 0.3], patience=3) is None
    assert train([0.3, 0.3], patience=3, step=2) == 2


def test_the_best_model_of_another_run_is_moved_aside(tmp_path):
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "model-best.safetensors").write_bytes(b"of before")
    case = LabelledImage("a", "a", np.zeros((1, 2, 2)), np.ones((2, 2)))
    for step, there in ((5, True), (0, False)):
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 0, METRIC: 0.9}) + "\n")
        panels = SegmentationPanels(run, [case], 1, 1, keep_best=True)
        panels.on_train_start(SimpleNamespace(is_global_zero=True), SimpleNamespace(step=step))
        assert (run / "model-best.safetensors").is_file() == there
        assert len(panels.scores) == there
    assert (run / "model-best-before.safetensors").read_bytes() == b"of before"


@pytest.mark.parametrize("choosing", [{"patience": 2}, {"keep_best": True}])
@pytest.mark.parametrize("truths", [(), (np.zeros((2, 2)),)])
def test_without_a_held_out_class_there_is_nothing_to_choose_by(tmp_path, choosing, truths):
    cases = [LabelledImage("a", "a", np.zeros((1, 2, 2)), truth) for truth in truths]
    SegmentationPanels(tmp_path, cases, 1, 1)
    with pytest.raises(LdmError, match=f"none of the {len(cases)} held-out images has a class"):
        SegmentationPanels(tmp_path, cases, 1, 1, **choosing)
