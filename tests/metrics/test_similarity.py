"""MS-SSIM: known answers, and scales that fit the image."""

import numpy as np
import pytest

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
    assert sum(ms_ssim_protocol((40, 48, 40))["weights"]) == pytest.approx(1.0)
    with pytest.raises(LdmError, match="at least 7"):
        ms_ssim_protocol((5, 48, 48))
