"""Anomaly detection from the command line: train, detect, refuse."""

import os
import sys

import numpy as np
import pandas as pd
import pytest

from ldm.model.classifier import Classifier
from ldm.training.logging import read_metrics
from tests.applications.blobs import DATA, SMALL, write_blobs

pytestmark = pytest.mark.slow

FAST = ("steps=10", "batch_size=16")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A diffusion model and a classifier of the small cohort."""
    from ldm.commands.main import main

    folder = tmp_path_factory.mktemp("blobs")
    root = write_blobs(folder / "data")
    common = (*DATA, *SMALL, f"data.root={root}", f"runs_dir={folder}/runs")
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        for verb, steps in (("train-ldm", 160), ("train-classifier", 80)):
            sys.argv = ["ldm", verb, *common, f"trainer.max_steps={steps}", f"trainer.val_every={steps}"]
            main()
    finally:
        os.chdir(before)
        sys.argv = argv
    return folder / "runs/blobs", common, root


def test_the_classifier_tells_little_noise_better_than_much(trained):
    run, _, _ = trained
    metrics = read_metrics(run / "classifier/metrics.jsonl")
    accuracy = [metrics[f"classifier/val/accuracy_bin/{k}"][-1][1] for k in range(10)]
    assert accuracy[0] > 0.9
    assert accuracy[0] > accuracy[9] + 0.2
    classifier = Classifier.load(run / "classifier/model.safetensors")
    assert classifier.target.levels == ("0", "1")


@pytest.mark.parametrize("guide", ["classifier", "free", "none"])
def test_lesions_stand_out(trained, ldm, tmp_path, guide):
    _, common, _ = trained
    code, text = ldm("detect", *common, *FAST, f"guide={guide}", "threshold=0.3", "compare=false", "out=out")
    assert not code, text
    scores = pd.read_csv(tmp_path / "out/scores.tsv", sep="\t")
    assert len(scores) == 16
    maps = np.stack([np.load(tmp_path / f"out/{name}_anomaly.npy") for name in scores["participant_id"]])
    healthy, diseased = (scores.loc[scores["diseased"] == kind, "score"].mean() for kind in (0, 1))
    assert maps.shape == (16, 16, 16)
    assert diseased > (1 if guide == "none" else 3) * healthy
