"""Two folders of images, real and synthetic, compared without a model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.draft import Record
from ldm.data.preprocessing import Preprocessing
from ldm.data.stored import NUMPY_SUFFIXES, SEPARATOR, SUFFIXES
from ldm.errors import LdmError
from ldm.evaluation.distances import SMALLEST, blurred, compare, too_few
from ldm.evaluation.diversity import REAL, SAMPLES, within_sets
from ldm.evaluation.features import FeatureNetwork, extract
from ldm.evaluation.pictures import SHOWN
from ldm.model.output import file_ends, grouped
from ldm.training.figures import mosaic

FLOOR = "real images, the other half"
CONTROL = "real images, the other half, blurred"
SYNTHETIC = "synthetic images"
LOOKED_AT = 64  # images of each folder that are held in memory at once
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_NO_IMAGE = re.compile(r"^mosaic\.png$|_(dseg|probseg|mask|seg|lesion)\.")


def folder_distances(network: FeatureNetwork, real: Path, synthetic: Path, seed: int = 0) -> dict[str, Any]:
    """Distances of synthetic images and of one half of the real ones from the other half.

    Every file goes through the preprocessing that is stored with the feature network, so that both folders arrive at
    the same size and intensities.

    Args:
        network: a feature network with a preprocessing.
        real, synthetic: folders; of their files, at any depth, all that are images count, but for label maps and the
            mosaic that ``ldm sample`` adds. A file is one image, but ``NAME_CHANNEL.nii.gz`` (2-D: ``.png``) of all
            channels are one together, as ``ldm sample`` and, with BIDS suffixes, ``ldm release`` write it; an array in
            an ``.npz`` or ``.npy`` file with one more axis is as many images as it has rows. Files called ``sub-...``
            alike are of one subject.
        seed: of the halves and the resamples.

    Raises:
        LdmError: no such folder, too few images or subjects, or a file that cannot be read or does not fit the
            preprocessing.
    """
    recipe, refs = _recipe(network), Chosen.choose(network, real, synthetic, seed)
    sets = {
        FLOOR: read_all(recipe, refs.held_out, real),
        CONTROL: map(blurred, read_all(recipe, refs.held_out, real)),
        SYNTHETIC: read_all(recipe, refs.synthetic, synthetic),
    }
    return compare(
        extract(network, read_all(recipe, refs.reference, real)),
        {name: extract(network, images) for name, images in sets.items()},
        FLOOR,
        CONTROL,
        {
            "features": network.identity,
            "reference": {
                "images": "real images, one half",
                "n": len(refs.reference),
                "of": refs.available["real"],
            },
            "available": refs.available,
            "image_size": list(recipe.image_shape),
            "value_range": None if recipe.value_range is None else list(recipe.value_range),
        },
        seed,
        subjects=[subject_of(ref) for ref in refs.held_out],
        reference_subjects=[subject_of(ref) for ref in refs.reference],
    )


def folder_likeness(
    network: FeatureNetwork, real: Path, synthetic: Path, figures: Path, most: int = 200, seed: int = 0
) -> dict[str, Any] | None:
    """MS-SSIM within the two folders, of at most :data:`LOOKED_AT` images each, and a mosaic of each in ``figures``.

    See :func:`folder_distances` and :func:`ldm.evaluation.diversity.within_sets`; ``most`` is the number of pairs.
    """
    recipe, refs = _recipe(network), Chosen.choose(network, real, synthetic, seed)
    held_out = refs.held_out[:LOOKED_AT]
    sets = {
        REAL: list(read_all(recipe, held_out, real)),
        SAMPLES: list(read_all(recipe, refs.synthetic[:LOOKED_AT], synthetic)),
    }
    for name, images in sets.items():
        mosaic(images[:SHOWN], figures / f"{name}.png", None, recipe.shown_range, rgb=recipe.is_rgb)
    return within_sets(sets, [subject_of(ref) for ref in held_out], recipe.shown_range, most, seed)


@dataclass(frozen=True)
class Chosen:
    """References of the images that are compared.

    Attributes:
        reference: real ones of one half of the subjects.
        held_out: as many of the other half as there are ``synthetic`` ones.
        synthetic: of the other folder.
        available: images in each folder.
    """

    reference: list[str]
    held_out: list[str]
    synthetic: list[str]
    available: dict[str, int]

    @classmethod
    def choose(cls, network: FeatureNetwork, real: Path, synthetic: Path, seed: int) -> Chosen:
        """See :func:`folder_distances`."""
        recipe = _recipe(network)
        refs = {
            name: image_references(Path(folder), recipe) for name, folder in (("real", real), ("synthetic", synthetic))
        }
        for name, least in (("real", 2 * SMALLEST), ("synthetic", SMALLEST)):
            if len(refs[name]) < least:
                raise LdmError(f"{name} has {len(refs[name])} images; distances need at least {least}.")
        halves = halves_by_subject(refs["real"], seed)
        n = min(len(halves[1]), len(refs["synthetic"]))
        held_out, drawn = (evenly_over_subjects(one, n, seed) for one in (halves[1], refs["synthetic"]))
        for part in (halves[0], held_out):
            if (lacking := too_few([subject_of(ref) for ref in part])) is not None:
                raise LdmError(f"real: of the images of half of its subjects there are {lacking}.")
        return cls(halves[0], held_out, drawn, {name: len(found) for name, found in refs.items()})


def _recipe(network: FeatureNetwork) -> Preprocessing:
    """How files become images.

    Raises:
        LdmError: the network does not say it.
    """
    if network.preprocessing is None:
        raise LdmError(
            f"features.kind '{network.identity['kind']}' does not say how files become images; to compare folders take "
            "features.kind=predictor, which does."
        )
    return network.preprocessing


def subject_of(ref: str) -> str:
    """Whose image a file is: the BIDS entity ``sub-...`` of its name; without one, each is of another subject."""
    found = _SUBJECT.match(Path(ref).name)
    return found[0] if found else ref


def halves_by_subject(refs: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The images in two halves, all of a subject in the same one."""
    subjects = sorted({subject_of(ref) for ref in refs})
    order = np.random.default_rng(seed).permutation(len(subjects))
    first = {subjects[i] for i in order[: (len(subjects) + 1) // 2]}
    place = {subjects[i]: number for number, i in enumerate(order)}
    shuffled = sorted(refs, key=lambda ref: place[subject_of(ref)])
    return [ref for ref in shuffled if subject_of(ref) in first], [r for r in shuffled if subject_of(r) not in first]


def evenly_over_subjects(refs: Sequence[str], n: int, seed: int) -> list[str]:
    """``n`` of the images, in turn one of each subject: as many subjects as there can be, and none much more often."""
    order = np.random.default_rng(seed).permutation(len(refs))
    turns: dict[str, int] = defaultdict(int)
    ranked = []
    for i in order:
        whose = subject_of(refs[i])
        ranked.append((turns[whose], len(ranked), refs[i]))
        turns[whose] += 1
    return [ref for _, _, ref in sorted(ranked)[:n]]


def image_references(folder: Path, recipe: Preprocessing) -> list[str]:
    """References of all images in a folder, in order of their names; see :mod:`ldm.data.images`.

    Of an image with a file a channel, see :func:`ldm.model.output.file_ends`, that of the first.

    Raises:
        LdmError: no such folder, a file without those of the other channels, or a NumPy file that cannot be read.
    """
    if not folder.is_dir():
        raise LdmError(f"{folder}: is no folder of images.")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name.lower().endswith(SUFFIXES) and not _NO_IMAGE.search(path.name)
    )
    further = [file for _, *others in grouped(files, file_ends(recipe, folder)) for file in others]
    refs = []
    for file in sorted({*files}.difference(further)):
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


def read_all(recipe: Preprocessing, refs: Sequence[str], folder: Path) -> Iterator[np.ndarray]:
    """Images ``(C, *S)`` of files in a folder, as ``recipe`` makes them.

    Raises:
        LdmError: naming the file that cannot be read or does not fit.
    """
    ends = file_ends(recipe, folder)
    for ref in refs:
        record = Record(ref, ref, channel_files(recipe, ref, ends), None, {}, "")
        yield recipe.load(record)[0]


def channel_files(recipe: Preprocessing, ref: str, ends: Sequence[str]) -> dict[str, str]:
    """Files of an image that :func:`image_references` refers to: one a channel, or one with all of them."""
    if len(ends) == 1 or not ref.endswith(ends[0]):
        return {"image": ref}
    return {name: ref.removesuffix(ends[0]) + end for name, end in zip(recipe.channels, ends, strict=True)}
