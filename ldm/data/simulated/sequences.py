"""MR sequences of the simulated brains: the intensity of each tissue in each sequence, bias field, noise and gain.

The levels are signal intensities relative to the brightest healthy tissue of the sequence. Their order is the textbook
one (T1: white > grey > CSF; T2: CSF > grey > white; FLAIR: T2 with dark CSF, so that oedema is the brightest; contrast
agent: T1 with a bright rim); the numbers are chosen, not measured on a scanner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ldm.data.simulated import population

Span = tuple[float, float]  # drawn uniformly between the two for each subject


@dataclass(frozen=True)
class Sequence:
    """One sequence; `suffix` is the end of its BIDS file names, `texture` the weight of what the T1 template shows
    beyond tissue class, `lesion` the levels of the parts of a tumour."""

    suffix: str
    grey: Span
    csf: Span
    white: float
    texture: Span
    lesion: Mapping[str, Span]


SEQUENCES = {
    "T1": Sequence(
        "T1w",
        grey=(0.66, 0.82),
        csf=(0.18, 0.36),
        white=1.0,
        texture=(0.8, 1.3),
        lesion={"necrotic_core": (0.34, 0.48), "oedema": (0.64, 0.76), "enhancing": (0.60, 0.74)},
    ),
    "T1ce": Sequence(
        "ce-gd_T1w",
        grey=(0.68, 0.82),
        csf=(0.18, 0.34),
        white=1.0,
        texture=(0.8, 1.3),
        lesion={"necrotic_core": (0.34, 0.48), "oedema": (0.62, 0.74), "enhancing": (1.45, 1.80)},
    ),
    "T2": Sequence(
        "T2w",
        grey=(0.54, 0.64),
        csf=(0.95, 1.08),
        white=0.42,
        texture=(-0.45, -0.25),
        lesion={"necrotic_core": (0.84, 1.00), "oedema": (0.76, 0.90), "enhancing": (0.60, 0.72)},
    ),
    "FLAIR": Sequence(
        "FLAIR",
        grey=(0.62, 0.70),
        csf=(0.08, 0.16),
        white=0.53,
        texture=(-0.25, -0.10),
        lesion={"necrotic_core": (0.36, 0.60), "oedema": (0.96, 1.14), "enhancing": (0.76, 0.90)},
    ),
}


@dataclass(frozen=True)
class Tissues:
    """What N voxels hold, as fractions (N,) float32 that add up to one; the T1 texture; and the parts of a tumour.

    `lesion` maps the names of its parts to fractions (N,), and is empty without one; `unrest` (N,) is a smooth random
    field of unit variance that makes the tumour uneven.
    """

    grey: np.ndarray
    white: np.ndarray
    csf: np.ndarray  # outside the ventricles
    ventricles: np.ndarray
    texture: np.ndarray
    lesion: Mapping[str, np.ndarray]
    unrest: np.ndarray | None = None


UNREST = 0.07  # of a tumour's signal, standard deviation


def scan(name: str, points: np.ndarray, tissues: Tissues, seed: int, index: int) -> np.ndarray:
    """Intensities (N,) int16 in sequence `name` of `tissues` at world `points` (3, N) of subject `index`.

    Contrast, bias field, Rician noise and gain are drawn for each subject and sequence; what a tumour adds is drawn
    from a stream of its own, so that contrast and bias field are the same with and without it.
    """
    sequence, place = SEQUENCES[name], list(SEQUENCES).index(name)
    rng = population.generator(seed, index, population.RENDERING + population.STREAMS_PER_SEQUENCE * place)
    grey_level, csf_level = rng.uniform(*sequence.grey), rng.uniform(*sequence.csf)
    fluid = tissues.csf + tissues.ventricles
    signal = grey_level * tissues.grey + sequence.white * tissues.white + csf_level * fluid
    signal = signal + rng.uniform(*sequence.texture) * tissues.texture
    if tissues.lesion:
        stream = population.LESION_RENDERING + population.STREAMS_PER_SEQUENCE * place
        signal += _tumour(sequence, tissues, population.generator(seed, index, stream))
    return _acquire(signal, points, rng)


def _tumour(sequence: Sequence, tissues: Tissues, rng: np.random.Generator) -> np.ndarray:
    """What the parts of a tumour add to the signal, (N,) float32."""
    signal = sum(np.float32(rng.uniform(*sequence.lesion[part])) * share for part, share in tissues.lesion.items())
    return signal * (1 + np.float32(rng.choice([-1, 1]) * UNREST) * tissues.unrest)


def _acquire(signal: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scanner: a smooth bias field, Rician noise and a gain; (N,) float32 -> (N,) int16."""
    bias = np.zeros_like(signal)
    for _ in range(4):  # a few long waves, in every direction
        direction = rng.standard_normal(3)
        wave = 2 * np.pi / rng.uniform(150, 350) * direction / np.linalg.norm(direction)
        bias += rng.normal(0, 0.04) * np.cos(wave.astype(np.float32) @ points + rng.uniform(0, 2 * np.pi))
    signal = signal * np.exp(bias)
    noise = rng.uniform(0.008, 0.028)
    real, imaginary = rng.standard_normal((2, signal.size), dtype=np.float32) * np.float32(noise)
    magnitude = np.hypot(signal + real, imaginary)  # Rician, as in a magnitude image
    return np.clip(np.rint(magnitude * rng.uniform(500, 1100)), 1, np.iinfo(np.int16).max).astype(np.int16)
