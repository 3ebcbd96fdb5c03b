"""What the training covariates look like, in a form that holds no subject's row.

A Gaussian copula: every covariate keeps its own distribution (a continuous one as quantiles that are each
the mean of at least five subjects, a categorical one as level frequencies), and one correlation matrix of
latent normal variables ties them together. Correlations are those of normal scores (van der Waerden scores
of the ranks); a categorical covariate is a latent normal cut at its cumulative frequencies, and the
attenuation that the cutting causes is undone as in the polyserial correlation of Olsson, Drasgow and Dorans
1982, Psychometrika 47:337-347, eq. 12 (here also when both are categorical, as a first-order approximation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from ldm.data.schema import Covariate, CovariateSchema, Value
from ldm.errors import LdmError

MIN_SUBJECTS = 5
"""Subjects behind every published quantile."""
MAX_QUANTILES = 41
MAX_CORRELATION = 0.99
MIN_PAIRS = 10
"""Rows with both covariates that a correlation needs; with fewer it is taken as zero."""


@dataclass(frozen=True)
class CovariateDistribution:
    """Joint distribution of the covariates of a schema; draws complete rows.

    Attributes:
        schema: the fitted schema.
        quantiles: name -> increasing values at evenly spaced probabilities ``(i + 0.5) / len``; empty when
            the split is too small (fewer than two bins of five): drawn uniformly over the range then.
        frequencies: name -> probability of each level, in level order.
        correlation: (K, K) latent correlation, in schema order.
    """

    schema: CovariateSchema
    quantiles: dict[str, tuple[float, ...]]
    frequencies: dict[str, tuple[float, ...]]
    correlation: np.ndarray

    @classmethod
    def fit(cls, schema: CovariateSchema, rows: Sequence[Mapping[str, Value]]) -> CovariateDistribution:
        """Fit on the training rows, one a subject; missing values are left out pair by pair.

        Args:
            schema: a fitted schema.
            rows: covariate values in physical units.

        Raises:
            LdmError: for values that the schema does not allow, or a schema that is not fitted.
        """
        quantiles, frequencies, scores, retained = {}, {}, [], []
        for covariate in schema:
            codes = np.array([covariate.encode(row.get(covariate.name)) for row in rows], dtype=np.float64)
            if covariate.kind == "categorical":
                frequencies[covariate.name] = _frequencies(covariate, codes)
                score, variance = _level_scores(frequencies[covariate.name], codes)
            else:
                values = [covariate.number(row[covariate.name]) for row in rows if row.get(covariate.name) is not None]
                quantiles[covariate.name] = _smoothed_quantiles(values)
                score, variance = _normal_scores(codes), 1.0
            scores.append(score)
            retained.append(variance)
        return cls(schema, quantiles, frequencies, _correlation(scores, retained))

    def sample(self, n: int, seed: int) -> list[dict[str, Value]]:
        """Draw ``n`` rows; the first rows are the same for every ``n``."""
        normal = np.random.default_rng(seed).standard_normal((n, len(self.schema)))
        values, vectors = np.linalg.eigh(self.correlation)
        uniform = ndtr(normal @ (vectors * np.sqrt(np.clip(values, 0.0, None))).T)
        return [
            {covariate.name: self._quantile(covariate, u) for covariate, u in zip(self.schema, row, strict=True)}
            for row in uniform
        ]

    def _quantile(self, covariate: Covariate, u: float) -> Value:
        if covariate.kind == "categorical":
            bounds = np.cumsum(self.frequencies[covariate.name])[:-1]
            return covariate.levels[int(np.searchsorted(bounds, u, side="right"))]
        quantiles = self.quantiles[covariate.name]
        if not quantiles:
            return covariate.decode(float(u))
        return float(np.interp(u, (np.arange(len(quantiles)) + 0.5) / len(quantiles), quantiles))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema": self.schema.to_dict(),
            "quantiles": {name: list(values) for name, values in self.quantiles.items()},
            "frequencies": {name: list(values) for name, values in self.frequencies.items()},
            "correlation": self.correlation.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CovariateDistribution:
        """Invert :meth:`to_dict`.

        Raises:
            LdmError: if the parts do not belong together.
        """
        schema = CovariateSchema.from_dict(data["schema"])
        correlation = np.asarray(data["correlation"], dtype=np.float64).reshape(len(schema), len(schema))
        if sorted([*data["quantiles"], *data["frequencies"]]) != sorted(schema.names):
            raise LdmError("covariate distribution: its covariates are not those of its schema; fit it again")
        return cls(
            schema,
            {name: tuple(values) for name, values in data["quantiles"].items()},
            {name: tuple(values) for name, values in data["frequencies"].items()},
            correlation,
        )


def _smoothed_quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """Means of consecutive, equally large bins of the sorted values, each of at least MIN_SUBJECTS."""
    count = min(MAX_QUANTILES, len(values) // MIN_SUBJECTS)
    if count < 2:
        return ()
    return tuple(float(bin_.mean()) for bin_ in np.array_split(np.sort(np.asarray(values)), count))


def _frequencies(covariate: Covariate, codes: np.ndarray) -> tuple[float, ...]:
    given = codes[np.isfinite(codes)].astype(int)
    if not len(given):
        return (1.0 / len(covariate.levels),) * len(covariate.levels)
    return tuple(float(f) for f in np.bincount(given, minlength=len(covariate.levels)) / len(given))


def _normal_scores(codes: np.ndarray) -> np.ndarray:
    """Van der Waerden scores, ``ndtri(rank / (n + 1))``; NaN stays NaN."""
    scores = np.full(codes.shape, np.nan)
    given = np.isfinite(codes)
    scores[given] = ndtri(rankdata(codes[given]) / (given.sum() + 1))
    return scores


def _level_scores(frequencies: Sequence[float], codes: np.ndarray) -> tuple[np.ndarray, float]:
    """Expected latent normal of each row's level, and the share of latent variance that survives."""
    f = np.asarray(frequencies)
    cuts = ndtri(np.clip(np.concatenate([[0.0], np.cumsum(f)]), 0.0, 1.0))
    density = np.exp(-0.5 * np.square(cuts)) / np.sqrt(2 * np.pi)
    mean = np.divide(density[:-1] - density[1:], f, out=np.zeros_like(f), where=f > 0)
    scores = np.full(codes.shape, np.nan)
    given = np.isfinite(codes)
    scores[given] = mean[codes[given].astype(int)]
    return scores, float(np.sum(f * np.square(mean)))


def _correlation(scores: Sequence[np.ndarray], retained: Sequence[float]) -> np.ndarray:
    """Latent correlation matrix, made positive semi-definite by clipping eigenvalues."""
    matrix = np.eye(len(scores))
    for i in range(len(scores)):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = _pair(scores[i], scores[j], retained[i] * retained[j])
    if not len(scores):
        return matrix
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * np.clip(values, 0.0, None)) @ vectors.T
    scale = np.sqrt(np.diag(matrix))
    return matrix / np.outer(scale, scale)


def _pair(a: np.ndarray, b: np.ndarray, retained: float) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < MIN_PAIRS or a[both].std() == 0 or b[both].std() == 0:
        return 0.0
    latent = np.corrcoef(a[both], b[both])[0, 1] / np.sqrt(retained)
    return float(np.clip(latent, -MAX_CORRELATION, MAX_CORRELATION))
