"""What is left of held-out images after the first stage, beyond which no sample can come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

from ldm.data.draft import Record
from ldm.model.generative import Generative
from ldm.training.vae import psnr

HELD_OUT_SPLITS = ("test", "valid")  # splits that no stage is trained on


def reconstructions(
    model: Generative, real: Sequence[np.ndarray], rows: Sequence[Mapping[str, Any]]
) -> list[np.ndarray]:
    """Held-out images ``(C, *S)`` through the model, see :meth:`Generative.reconstruct`, in its range if it has one."""
    rebuilt, value_range = [], model.preprocessing.value_range
    for image, row in zip(track(real, "reconstructing"), rows, strict=True):
        decoded = model.reconstruct(torch.from_numpy(image)[None], [row])  # (1, C, *S)
        rebuilt.append((decoded if value_range is None else decoded.clamp(*value_range))[0].cpu().numpy())
    return rebuilt


def quality(
    real: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray],
    value_range: tuple[float, float],
    records: Sequence[Record],
) -> dict[str, Any]:
    """PSNR in dB of the reconstructions: of all held-out images and, with two held-out splits, of each split."""
    span = value_range[1] - value_range[0]
    values = [psnr(torch.from_numpy(x), torch.from_numpy(y), span) for x, y in zip(real, rebuilt, strict=True)]
    found = mean_psnr(values)
    splits = {
        name: [v for v, one in zip(values, records, strict=True) if one.split == name] for name in HELD_OUT_SPLITS
    }
    if all(splits.values()):
        found["splits"] = {name: mean_psnr(some) for name, some in splits.items()}
    return found


def mean_psnr(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and number of PSNRs."""
    return {"psnr_mean": float(np.mean(values)), "psnr_std": float(np.std(values)), "n": len(values)}
