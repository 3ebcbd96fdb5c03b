"""The simulated population: who each subject is, before any image is made.

The constants describe a healthy ageing population in outline (ventricles grow and the brain shrinks with age, men
have larger heads and ventricles); they are chosen, not fitted to any data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AGE_YEARS = (44.0, 82.0)
HEAD_MM3 = {"F": 1.30e6, "M": 1.46e6}  # mean volume inside the skull-stripped mask
HEAD_SD_MM3 = 0.085e6
HEAD_RANGE_MM3 = (1.10e6, 1.62e6)
VENTRICLES_MEDIAN_MM3 = 27e3  # at the middle age, over both sexes
VENTRICLES_RANGE_MM3 = (9e3, 120e3)
# Streams of random numbers of one subject: each purpose has its own, so that none shifts another. The streams of
# rendering recur for each sequence.
ANATOMY, RENDERING, LESION, LESION_RENDERING, SLICES = range(5)
STREAMS_PER_SEQUENCE = 5


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random stream of one purpose of one subject, the same whatever the size of the cohort."""
    return np.random.default_rng([seed, index, stream])


@dataclass(frozen=True)
class Subject:
    """Covariates as drawn, and the pose; `head_mm3` and `ventricles_mm3` are what the simulation aims at."""

    age: float  # years
    sex: str  # "F" or "M"
    head_mm3: float
    ventricles_mm3: float
    atrophy: float  # 0: narrow sulci, 1: wide sulci
    matrix: np.ndarray  # (3, 3) template mm -> subject mm: rotation and scale
    offset: np.ndarray  # (3,) mm, from the centre of the field of view


def draw(rng: np.random.Generator, template_head_mm3: float) -> Subject:
    """Draw one subject; `template_head_mm3` is the head volume of the template, which sets the scale."""
    age = round(AGE_YEARS[0] + (AGE_YEARS[1] - AGE_YEARS[0]) * rng.beta(2.0, 2.0), 1)
    sex = "M" if rng.random() < 0.5 else "F"
    head_z, ageing, ventricular, sulcal = np.clip(rng.standard_normal(4), -2.5, 2.5)
    head = float(np.clip(HEAD_MM3[sex] + HEAD_SD_MM3 * head_z, *HEAD_RANGE_MM3))
    years = age - sum(AGE_YEARS) / 2
    male = 1.0 if sex == "M" else -1.0
    # `ageing` is how old a brain is for its years: it widens ventricles and sulci together.
    log_ratio = 0.034 * years + 0.11 * male + 0.08 * head_z + 0.22 * ageing + 0.30 * ventricular
    ventricles = float(np.clip(VENTRICLES_MEDIAN_MM3 * np.exp(log_ratio), *VENTRICLES_RANGE_MM3))
    atrophy = float(np.clip(0.42 + 0.018 * years + 0.08 * ageing + 0.08 * sulcal, 0, 1))
    matrix, offset = _pose(rng, (head / template_head_mm3) ** (1 / 3))
    return Subject(age, sex, head, ventricles, atrophy, matrix, offset)


def _pose(rng: np.random.Generator, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What is left after a rigid alignment: proportions of the head (2 %), rotation (1.5 degrees), shift (0.8 mm)."""
    proportions = np.exp(0.018 * np.clip(rng.standard_normal(3), -1.5, 1.5))
    proportions *= scale / proportions.prod() ** (1 / 3)
    a, b, c = np.radians(1.5) * np.clip(rng.standard_normal(3), -2, 2)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x @ np.diag(proportions), 0.8 * np.clip(rng.standard_normal(3), -2, 2)
