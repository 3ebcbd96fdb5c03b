"""Simulated brains: a cohort with known anatomy and true covariates, made from the MNI152 template.

>>> from ldm.data.simulated import generate
>>> generate("data/simulated/4mm", n=400, spacing_mm=4.0, seed=0)      # doctest: +SKIP
"""

from ldm.data.simulated.render import LABELS, LESION_LABELS
from ldm.data.simulated.writer import COLUMNS, generate

__all__ = ["COLUMNS", "LABELS", "LESION_LABELS", "generate"]
