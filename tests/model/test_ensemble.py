"""What an ensemble of label maps says: probabilities, segmentation, disagreement."""

import numpy as np
import pytest
import torch

from ldm.data.labels import LabelClasses
from ldm.model.ensemble import Ensemble, class_probabilities


def test_masks_become_probabilities():
    """Two classes, four voxels: sure background, sure second class, both halfway, both claimed."""
    masks = np.array([[[-1.0, -1.0, 0.0, 1.0], [-1.0, 1.5, 0.0, 1.0]]])  # (M, K, *S)
    probabilities = class_probabilities(masks)
    assert probabilities.shape == (1, 3, 4)
    assert probabilities.sum(1) == pytest.approx(1.0)
    wanted = [[1, 0, 0, 0], [0, 0, 0.5, 0.5], [0, 1, 0.5, 0.5]]
    assert probabilities[0] == pytest.approx(np.array(wanted))


def test_disagreement():
    """One class, three voxels of five members: all inside, all outside, two of five inside."""
    inside = np.array([[1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    ensemble = Ensemble(np.stack([1 - inside, inside], axis=1))  # (M, K + 1, *S)
    assert ensemble.labels.tolist() == [1, 0, 0]
    assert ensemble.mean[1] == pytest.approx([1, 0, 0.4])
    assert ensemble.variance == pytest.approx([0, 0, 0.24])
    assert ensemble.entropy == pytest.approx([0, 0, -(0.4 * np.log(0.4) + 0.6 * np.log(0.6))], abs=1e-6)
    assert ensemble.member_labels.tolist() == inside.astype(int).tolist()


def test_label_maps_and_masks():
    classes = LabelClasses.from_config({"core": [1, 4], "oedema": 2})
    labels = torch.tensor([0, 1, 4, 2, 7], dtype=torch.uint8)
    assert classes.masks(labels).tolist() == [[-1, 1, 1, -1, -1], [-1, -1, -1, 1, -1]]
    assert classes.values_of(classes.classes(labels)).tolist() == [0, 1, 1, 2, 0]
    assert classes.unknown({0, 1, 2, 7, 9}) == [7, 9]
