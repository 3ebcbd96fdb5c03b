"""The Dice of a segmenter is over the classes that there are."""

from types import SimpleNamespace

import pytest
import torch

from ldm.data.labels import LabelClasses
from ldm.training.segmenter import SegmenterModule

OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99), "warmup_steps": 0, "schedule": "constant"}
NETWORK = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "num_res_units": 0}


@pytest.fixture
def validate(monkeypatch):
    """Validate once on two label maps that are found as they are given; returns what is logged."""
    module = SegmenterModule(NETWORK, LabelClasses.from_config({"one": 1, "two": 2}), OPTIMIZER)
    logged = []
    logger = SimpleNamespace(log_metrics=lambda numbers, step: logged.append(dict(numbers)))
    monkeypatch.setattr(SegmenterModule, "trainer", SimpleNamespace(world_size=1, loggers=[logger]))

    def run(truth, found):
        scores = torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()  # (B, 3, *S)
        monkeypatch.setattr(module.network, "forward", lambda images: scores)
        module.on_validation_epoch_start()
        module.validation_step({"image": torch.zeros(len(truth), 1, 4, 4), "labels": truth}, 0)
        module.on_validation_epoch_end()
        return logged[-1], module.latest

    return run


def test_a_class_that_is_in_no_image_is_left_out(validate):
    truth = torch.zeros(2, 4, 4, dtype=torch.long)
    truth[0, :2] = 1
    wrong = truth.clone()
    wrong[1, :2] = 2
    logged, latest = validate(truth, wrong)
    assert logged == {"segmenter/val/dice": 0.5, "segmenter/val/dice/one": 1.0, "segmenter/val/dice/two": 0.0}
    logged, latest = validate(truth, truth)
    assert logged == latest == {"segmenter/val/dice": 1.0, "segmenter/val/dice/one": 1.0}


def test_dropout_follows_from_seed_and_step(monkeypatch):
    """Not from what else the process has drawn: a resumed run drops what the uninterrupted one would."""
    monkeypatch.setattr(SegmenterModule, "trainer", SimpleNamespace(world_size=1, global_rank=0, loggers=[]))
    labels, losses = LabelClasses.from_config({"one": 1, "two": 2}), []
    batch = {"image": torch.rand(2, 1, 8, 8), "labels": torch.ones(2, 8, 8, dtype=torch.long), "index": [0, 1]}
    for before, step in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(0)
        module = SegmenterModule({**NETWORK, "dropout": 0.5}, labels, OPTIMIZER)
        monkeypatch.setattr(module, "step_optimizers", lambda loss, networks: losses.append(float(loss.detach())))
        module._step.fill_(step)
        torch.manual_seed(before)
        module.training_step(batch, 0)
    assert losses[0] == losses[1] != losses[2]


def test_without_any_class_there_is_no_dice(validate):
    nothing = torch.zeros(2, 4, 4, dtype=torch.long)
    assert validate(nothing, nothing) == ({}, {})
