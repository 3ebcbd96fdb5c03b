"""Images from images, with a small network that was never trained."""

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from tests.model.test_transfer import AGE, SEX, model

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()


@pytest.fixture(scope="module")
def made():
    return model([AGE, SEX], "concat")


def test_strength_leads_from_the_image_to_a_new_one(made):
    images = {
        strength: made.image_to_image(IMAGE, strength, {"age": 50.0}, n=2, num_inference_steps=10, sampler="ddim")
        for strength in (0.1, 0.5, 1.0)
    }
    changes = [float(np.abs(image - IMAGE).mean()) for image in images.values()]
    assert changes == sorted(changes)
    assert changes[0] < 0.5 * changes[2]
    assert images[1.0].shape == (2, 3, 8, 8)
    again = made.image_to_image(IMAGE, 0.5, {"age": 50.0}, n=2, num_inference_steps=10, sampler="ddim")
    assert (again == images[0.5]).all()
    other = made.image_to_image(IMAGE, 0.5, {"age": 79.0}, n=2, num_inference_steps=10, sampler="ddim")
    assert np.abs(other - again).max() > 1e-5
    for strength in (0, 1.5, 0.01):
        with pytest.raises(LdmError, match=f"strength is {strength}"):
            made.image_to_image(IMAGE, strength, num_inference_steps=10)
    with pytest.raises(LdmError, match=r"\(3, 8, 6\) is not on the model's grid; legal: \(3, 8, 8\)"):
        made.image_to_image(IMAGE[..., :6], 0.5)


def test_an_image_does_not_depend_on_what_is_drawn_with_it(made):
    fill = np.ones((8, 8), bool)
    options = {"n": 5, "num_inference_steps": 4}
    for edit in (
        made.plan_image_to_image(IMAGE, 0.5, {"age": 50.0}, **options),
        made.plan_interpolation(IMAGE, IMAGE[:, ::-1].copy(), **options),
        made.plan_inpainting(IMAGE, fill, [{"age": 50.0}, {"age": 79.0}], **options),
    ):
        together, numbers = next(edit.batches([3, 1, 4], 3))
        assert list(numbers) == [3, 1, 4]
        np.testing.assert_allclose(edit.images(batch_size=2)[[3, 1, 4]], together, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3


def test_interpolation_starts_and_ends_at_the_images(made):
    other = IMAGE[:, ::-1].copy()
    images = made.interpolate(IMAGE, other, n=3, num_inference_steps=60)
    scale = np.abs(IMAGE - other).mean()
    assert np.abs(images[0] - IMAGE).mean() < 0.15 * scale
    assert np.abs(images[2] - other).mean() < 0.15 * scale
    assert min(np.abs(images[1] - one).mean() for one in (IMAGE, other)) > 0.15 * scale
    with pytest.raises(LdmError, match="n is 1; legal: 2 or more"):
        made.interpolate(IMAGE, other, n=1)


def test_inpainting_changes_the_region_alone(made):
    fill = np.zeros((8, 8), bool)
    fill[2:5, 3:6] = True
    images = made.inpaint(IMAGE, fill, {"sex": "F"}, n=2, num_inference_steps=5)
    assert (images[..., ~fill] == IMAGE[:, ~fill]).all()
    assert np.abs(images[0] - images[1])[:, fill].mean() > 0.05  # other noise, another region
    with pytest.raises(LdmError, match=r"fill has shape \(8, 6\)"):
        made.inpaint(IMAGE, fill[:, :6])
    with pytest.raises(LdmError, match="0 voxels"):
        made.inpaint(IMAGE, ~fill & fill)
