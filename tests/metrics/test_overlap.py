"""Dice of label maps with known answers, empty ones included."""

import math

import pytest
import torch
from torchmetrics.functional.segmentation import dice_score

from ldm.metrics.overlap import dice_per_class


def test_dice_of_maps_counted_by_hand():
    truth = torch.tensor([[1, 1, 1, 0], [0, 2, 2, 0]])
    found = torch.tensor([[1, 1, 0, 0], [0, 0, 2, 2]])
    assert dice_per_class(found, truth, 3) == pytest.approx([2 * 2 / (2 + 3), 2 * 1 / (2 + 2)])


def test_a_class_in_one_map_alone_scores_0_and_one_in_neither_is_left_out():
    empty, full = torch.zeros(4, 4, dtype=torch.long), torch.ones(4, 4, dtype=torch.long)
    for found, truth in ((empty, full), (full, empty)):
        one, neither = dice_per_class(found, truth, 3)
        assert one == 0
        assert math.isnan(neither)


def test_it_agrees_with_torchmetrics_where_no_class_is_empty():
    maps = torch.randint(0, 4, (2, 6, 7, 8), generator=torch.Generator().manual_seed(0))
    found, truth = maps
    wanted = dice_score(
        found[None], truth[None], 4, include_background=False, average="none", input_format="index"
    )  # (1, 3)
    assert dice_per_class(found, truth, 4) == pytest.approx(wanted[0].tolist())
