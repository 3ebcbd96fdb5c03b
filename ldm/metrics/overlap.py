"""Overlap of two label maps."""

from __future__ import annotations

from torch import Tensor


def dice_per_class(found: Tensor, truth: Tensor, num_classes: int) -> list[float]:
    """Dice of two label maps (Dice 1945), for each class but background: 2 |A and B| / (|A| + |B|).

    A class that only one of them has scores 0; one that neither has scores NaN, to be left out of a mean, in which a
    structure that is absent in most maps would otherwise earn 1 for every one of these. (MONAI's ``compute_dice``
    gives 1 there, or leaves out whatever the truth does not have, found or not; in torchmetrics the value depends on
    the version.)

    Args:
        found, truth: class indices below ``num_classes``, ``(*S)``.
        num_classes: background, which is 0, included.

    Returns:
        Scores of classes 1, 2, ...
    """
    scores = []
    for index in range(1, num_classes):
        a, b = found == index, truth == index  # (*S)
        total = int(a.sum()) + int(b.sum())
        scores.append(2 * int((a & b).sum()) / total if total else float("nan"))
    return scores
