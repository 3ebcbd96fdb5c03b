"""MS-SSIM: known answers, and scales that fit the image."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from ldm.errors import LdmError
from ldm.metrics.similarity import ms_ssim, ms_ssim_protocol


def image(size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((1, *size), dtype=np.float32)


@pytest.mark.parametrize("size", [(32, 32), (40, 48, 40)])
def test_identical_images_are_one_and_noise_lowers_it(size):
    x = image(size)
    values = [ms_ssim(x, np.clip(x + level * (image(size, 1) - 0.5), 0, 1)) for level in (0.0, 0.2, 0.8)]
    assert values[0] == pytest.approx(1.0, abs=1e-5)
    assert values[0] > values[1] > values[2]
    assert ms_ssim(x, image(size, 2)) < 0.3


def test_the_protocol_follows_the_smallest_side():
    assert ms_ssim_protocol((40, 48, 40))["scales"] == 3
    assert ms_ssim_protocol((160, 224, 160))["scales"] == 5
    assert ms_ssim_protocol((175, 224, 180))["kernel"] == 7
    assert ms_ssim_protocol((176, 224, 192)) == {
        "scales": 5,
        "kernel": 11,
        "window": "Gaussian",
        "sigma": 1.5,
        "weights": [0.0448, 0.2856, 0.3001, 0.2363, 0.1333],
    }
    assert sum(ms_ssim_protocol((40, 48, 40))["weights"]) == pytest.approx(1.0)
    with pytest.raises(LdmError, match="at least 7"):
        ms_ssim_protocol((5, 48, 48))


def test_large_images_are_compared_as_published():
    x, y = image((176, 180)), image((176, 180), 1)
    blend = (0.7 * x + 0.3 * y).astype(np.float32)
    published = multiscale_structural_similarity_index_measure(
        torch.from_numpy(x)[None], torch.from_numpy(blend)[None], data_range=1.0
    )  # torchmetrics' defaults are those of the paper
    assert ms_ssim(x, blend) == pytest.approx(float(published), abs=1e-6)
