"""Pictures of a run show what a viewer of the images would."""

import numpy as np
import PIL.Image
import pytest

from ldm.training.figures import mosaic, reconstruction_panel


@pytest.mark.parametrize("rgb", [False, True])
def test_colour_is_shown_where_the_channels_are_colours(tmp_path, rgb):
    image = np.full((3, 16, 16), -1.0, np.float32)
    image[0, 4:12, 4:12], image[1, 4:12, 4:12] = 1.0, 0.0  # an orange square on black
    orange = np.array([255, 128, 0])
    for path in (
        mosaic([image] * 3, tmp_path / "mosaic.png", value_range=(-1, 1), rgb=rgb),
        reconstruction_panel([(image, image)], tmp_path / "panel.png", (-1, 1), rgb),
    ):
        pixels = np.asarray(PIL.Image.open(path).convert("RGB")).astype(int)
        assert (np.abs(pixels - orange).max(-1) <= 1).any() == rgb, path
