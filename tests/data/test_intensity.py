"""Intensity recipes: where the limits land, and data of the wrong kind are refused with the remedy."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.intensity import IntensityRecipe
from ldm.errors import LdmError


def mr(seed: int = 0) -> np.ndarray:
    """Background 0 and tissue of arbitrary scale."""
    rng = np.random.default_rng(seed)
    tissue = rng.normal(900, 150, (16, 16, 16))
    tissue[:5] = 0
    return tissue.astype(np.float32)


def ct(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    body = rng.normal(40, 30, (16, 16, 16))
    body[:6] = rng.normal(-990, 10, (6, 16, 16))
    body[0] = -1024
    return body.astype(np.float32)


def test_percentiles_map_onto_the_range() -> None:
    array = mr()
    recipe = IntensityRecipe("percentile", 1, 99, (-1, 1))
    result = recipe.apply(array, "a")
    low, high = np.percentile(array, (1, 99))
    np.testing.assert_allclose(result, np.clip((array - low) / (high - low) * 2 - 1, -1, 1), atol=1e-5)
    assert result.dtype == np.float32
    assert (result.min(), result.max()) == (-1, 1)
    # Scanner gain carries no meaning.
    np.testing.assert_allclose(recipe.apply(array * 37, "a"), result, atol=1e-5)
    assert IntensityRecipe("percentile", 1, 99, clip=False).apply(array, "a").max() > 1


def test_a_window_is_fixed_and_can_be_inverted() -> None:
    recipe = IntensityRecipe("window", -1000, 400)
    array = ct()
    result = recipe.apply(array, "a")
    assert recipe.apply(array[3:], "a")[5, 5, 5] == result[8, 5, 5]
    np.testing.assert_allclose(recipe.invert(result), np.clip(array, -1000, 400), atol=1e-3)


def test_zscore() -> None:
    result = IntensityRecipe("zscore").apply(mr(), "a")
    assert result.mean() == pytest.approx(0, abs=1e-5)
    assert result.std() == pytest.approx(1, abs=1e-5)
    limited = IntensityRecipe("zscore", -1, 2)
    assert limited.apply(mr(), "a").min() == -1
    assert limited.background(result) == result.min()


@pytest.mark.parametrize("kind", ["percentile", "window", "zscore"])
def test_every_recipe_can_be_undone_beside_the_image_it_was_applied_to(kind: str) -> None:
    recipe = IntensityRecipe(kind, *({"percentile": (1, 99), "window": (100, 1000)}.get(kind, ())), range=(-1, 1))
    array = mr()
    limits = {"percentile": np.percentile(array, (1, 99)), "window": (100, 1000)}.get(kind, (-np.inf, np.inf))
    back = recipe.undo(recipe.apply(array, "a"), array, "a")
    np.testing.assert_allclose(back, np.clip(array, *limits), atol=1e-2)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (IntensityRecipe("percentile", range=(-1.0, 1.0)), (-1, 1)),
        (IntensityRecipe("window", -1000, 400), (0, 1)),
        (IntensityRecipe("zscore"), (-5, 5)),
        (IntensityRecipe("zscore", -2, 4), (-2, 4)),
        (IntensityRecipe("zscore", upper=4), (-5, 4)),
        (IntensityRecipe("zscore", -2, 4, clip=False), (-5, 5)),
    ],
)
def test_black_and_white_are_fixed(recipe: IntensityRecipe, expected: tuple[float, float]) -> None:
    assert recipe.shown_range == expected


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_ct_under_an_mr_recipe_is_refused(kind: str) -> None:
    with pytest.raises(LdmError, match=r"sub-7\.nii.*min -1024.*looks like CT.*window"):
        IntensityRecipe(kind).apply(ct(), "sub-7.nii")
    ringing = mr()
    ringing[3, 3, 3] = -700.0  # one negative voxel of an interpolated MR is no CT
    IntensityRecipe(kind).apply(ringing, "a")


def test_mr_under_a_ct_window_is_refused() -> None:
    with pytest.raises(LdmError, match="not HU"):
        IntensityRecipe("window", -1000, 400).apply(mr(), "a")
    with pytest.raises(LdmError, match=r"saturates \d+\.\d% of the voxels"):
        IntensityRecipe("window", 0, 100).apply(mr(), "a")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 3.0), "constant"),
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "1 voxels are NaN"),
        (np.eye(100)[:, :, None] * np.array([0, 1.0]), "percentiles 0 and 90 are both 0"),
    ],
)
def test_useless_images_are_refused_by_name(array: np.ndarray, message: str) -> None:
    with pytest.raises(LdmError, match=f"sub-7: .*{message}"):
        IntensityRecipe("percentile", 0, 90).apply(array, "sub-7")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "percentle"}, "Did you mean 'percentile'"),
        ({"knd": "window"}, "Did you mean 'kind'"),
        ({"kind": "window"}, "needs 'lower' and 'upper'"),
        ({"kind": "percentile", "upper": 120}, "must lie in 0..100"),
        ({"lower": 99, "upper": 1}, "must be below"),
        ({"range": [1, 0]}, r"intensity\.range"),
    ],
)
def test_illegal_recipes_say_what_is_legal(config: dict, message: str) -> None:
    with pytest.raises(LdmError, match=message):
        IntensityRecipe.from_config(config)


def test_description_is_a_configuration() -> None:
    recipe = IntensityRecipe("window", -160, 240, (-1, 1), False)
    assert IntensityRecipe.from_config(recipe.to_dict()) == recipe
