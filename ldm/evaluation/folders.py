"""Two folders of images, real and synthetic, compared without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.draft import Record
from ldm.data.images import NUMPY_SUFFIXES, SEPARATOR, SUFFIXES
from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.evaluation.distances import SMALLEST, blurred, compare
from ldm.evaluation.features import FeatureNetwork, extract

FLOOR = "real images, the other half"
CONTROL = "real images, the other half, blurred"
SYNTHETIC = "synthetic images"


def folder_distances(network: FeatureNetwork, real: Path, synthetic: Path, seed: int = 0) -> dict[str, Any]:
    """Distances of synthetic images and of one half of the real ones from the other half.

    Every file goes through the preprocessing that is stored with the feature network, so that both folders arrive at
    the same size and intensities.

    Args:
        network: a feature network with a preprocessing.
        real, synthetic: folders; of their files, at any depth, all that are images count. A file is one image; an array
            in an ``.npz`` or ``.npy`` file with one more axis is as many images as it has rows.
        seed: of the halves and the resamples.

    Raises:
        LdmError: no such folder, too few images, or a file that cannot be read or does not fit the preprocessing.
    """
    recipe = network.preprocessing
    if recipe is None:
        raise LdmError(
            f"features.kind '{network.identity['kind']}' does not say how files become images; to compare folders take "
            "features.kind=predictor, which does."
        )
    refs = {name: image_references(Path(folder), recipe) for name, folder in (("real", real), ("synthetic", synthetic))}
    for name, least in (("real", 2 * SMALLEST), ("synthetic", SMALLEST)):
        if len(refs[name]) < least:
            raise LdmError(f"{name} has {len(refs[name])} images; distances need at least {least}.")
    order = np.random.default_rng(seed).permutation(len(refs["real"]))
    halves = [[refs["real"][i] for i in part] for part in np.array_split(order, 2)]
    n = min(len(halves[1]), len(refs["synthetic"]))
    chosen = np.random.default_rng(seed).permutation(len(refs["synthetic"]))[:n]
    sets = {
        FLOOR: read_all(recipe, halves[1][:n]),
        CONTROL: map(blurred, read_all(recipe, halves[1][:n])),
        SYNTHETIC: read_all(recipe, [refs["synthetic"][i] for i in chosen]),
    }
    return compare(
        extract(network, read_all(recipe, halves[0])),
        {name: extract(network, images) for name, images in sets.items()},
        FLOOR,
        CONTROL,
        {
            "features": network.identity,
            "reference": {"images": "real images, one half", "n": len(halves[0]), "of": len(refs["real"])},
            "available": {name: len(found) for name, found in refs.items()},
            "image_size": list(recipe.image_shape),
            "value_range": None if recipe.value_range is None else list(recipe.value_range),
        },
        seed,
    )


def image_references(folder: Path, recipe: Preprocessing) -> list[str]:
    """References of all images in a folder, in order of their names; see :mod:`ldm.data.images`.

    Raises:
        LdmError: no such folder, or a NumPy file that cannot be read.
    """
    if not folder.is_dir():
        raise LdmError(f"{folder}: is no folder of images.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES))
    refs = []
    for file in files:
        is_numpy = file.suffix.lower() in NUMPY_SUFFIXES
        refs += _arrays(file, recipe) if is_numpy else [str(file)]
    return refs


def _arrays(file: Path, recipe: Preprocessing) -> list[str]:
    """The images of a NumPy file: every array, or every row of one with an axis more than an image has."""
    try:
        content = np.load(file, allow_pickle=False, mmap_mode="r")
        arrays = {"": content} if isinstance(content, np.ndarray) else {key: content[key] for key in content.files}
    except (OSError, ValueError, EOFError) as error:
        raise LdmError(f"{file}: cannot be read as NumPy arrays ({error}).") from error
    refs = []
    for key, array in arrays.items():
        shape, channels = array.shape, len(recipe.channels)
        several = len(shape) == recipe.spatial_dims + 2 or (
            len(shape) == recipe.spatial_dims + 1 and shape[0] != channels
        )
        plain = f"{file}{SEPARATOR}{key}" if key else str(file)
        refs += [f"{file}{SEPARATOR}{key}[{row}]" for row in range(shape[0])] if several else [plain]
    return refs


def read_all(recipe: Preprocessing, refs: Sequence[str]) -> Iterator[np.ndarray]:
    """Images ``(C, *S)`` of files, as ``recipe`` makes them.

    Raises:
        LdmError: naming the file that cannot be read or does not fit.
    """
    for ref in refs:
        record = Record(ref, ref, {"image": ref}, None, {}, "")
        yield recipe.load(record)[0]
