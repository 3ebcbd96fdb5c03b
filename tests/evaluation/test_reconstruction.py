"""How well held-out images are reconstructed, as `ldm evaluate` reports it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.draft import Record
from ldm.data.intensity import IntensityRecipe
from ldm.data.preprocessing import Preprocessing
from ldm.evaluation.reconstruction import quality, reconstructions


def record(number: int, split: str) -> Record:
    return Record(f"a{number}", f"a{number}", {}, None, {}, split, f"table:{number}")


@pytest.mark.parametrize(
    ("intensity", "highest"), [(IntensityRecipe("zscore"), 7), (IntensityRecipe("window", 0, 255), 1)], ids=str
)
def test_only_what_has_a_range_is_cut_off(intensity, highest):
    recipe = Preprocessing(2, intensity=intensity, channels=("T1",))
    model = SimpleNamespace(preprocessing=recipe, reconstruct=lambda images, rows: 7 * images)
    (rebuilt,) = reconstructions(model, [np.ones((1, 4, 4), np.float32)], [{}])
    assert (rebuilt == highest).all()


def test_psnr_of_each_held_out_split():
    real = [np.full((1, 4, 4), 0.5, np.float32)] * 3
    rebuilt = [image + error for image, error in zip(real, (0.1, 0.01, 0.1), strict=True)]  # 20, 40, 20 dB
    found = quality(real, rebuilt, (0.0, 1.0), [record(0, "test"), record(1, "valid"), record(2, "test")])
    assert found["n"] == 3
    assert found["psnr_mean"] == pytest.approx(80 / 3, abs=1e-3)
    assert found["splits"]["test"] == {"psnr_mean": pytest.approx(20, abs=1e-3), "psnr_std": pytest.approx(0), "n": 2}
    assert found["splits"]["valid"]["psnr_mean"] == pytest.approx(40, abs=1e-3)
    alone = quality(real[:2], rebuilt[:2], (0.0, 1.0), [record(0, "valid"), record(1, "valid")])
    assert "splits" not in alone
