"""A vector of covariates as condition, each covariate with a learned null of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioner, Conditioning
from ldm.errors import LdmError, nearest

MODES = ("concat", "cross_attention", "adaptive_norm", "hybrid")


class CovariateConditioner(Conditioner):
    """Turns encoded covariates into planes, tokens or an embedding.

    A covariate that is not given (NaN) is replaced by its learned null, so any subset may be given when
    sampling; :meth:`drop` hides covariates at random during training, each on its own.

    Modes:
        ``concat``: one plane per continuous or two-level covariate, one per level otherwise.
        ``cross_attention``: one token a covariate.
        ``adaptive_norm``: the tokens, through one hidden layer, as an embedding for adaptive normalisation.
        ``hybrid``: the planes, and the same numbers again as a context of length one (Pinaya et al. 2022).

    Args:
        levels: number of levels of each covariate, 0 for a continuous one.
        mode: see above.
        dim: width of a token or of the embedding (``cross_attention`` and ``adaptive_norm``).
        drop_rate: probability that a covariate is hidden, per sample and per covariate.
    """

    def __init__(
        self,
        levels: Sequence[int],
        mode: str = "adaptive_norm",
        dim: int = 128,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(drop_rate)
        if mode not in MODES:
            raise LdmError(f"condition.mode '{mode}' is unknown; legal: {', '.join(MODES)}.{nearest(mode, MODES)}")
        if not levels:
            raise LdmError("A covariate conditioner needs at least one covariate; name some in data.covariates.")
        self.levels = tuple(int(count) for count in levels)
        self.mode, self.num_uniforms = mode, len(self.levels)
        self.has_embedding = mode == "adaptive_norm"
        if mode in ("concat", "hybrid"):
            self.plane_channels = sum(_width(count) for count in self.levels)
            self.null = nn.Parameter(torch.zeros(self.plane_channels))
        else:
            self.tokens = nn.ModuleList(_Token(count, dim) for count in self.levels)
        self.context_dim = {"cross_attention": dim, "hybrid": self.plane_channels}.get(mode)
        if mode == "adaptive_norm":
            self.merge = nn.Sequential(nn.Linear(len(self.levels) * dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Standardise continuous covariates by their distribution, ``(N, K)`` encoded training values.

        A legal range can be much wider than what occurs, as for a skewed volume; tokens see z-scores, so that what
        occurs spans their input. Planes keep the published [0, 1].
        """
        for k, token in enumerate(getattr(self, "tokens", ())):
            given = values[:, k][~values[:, k].isnan()]
            if not token.levels and len(given) > 1 and given.std() > 0:
                token.centre.copy_(given.mean())
                token.spread.copy_(given.std())

    def drop(self, value: Tensor, uniforms: Tensor) -> Tensor:
        """Hide covariates at random: ``(B, K)`` codes and ``(B, K)`` uniform random numbers -> NaN for hidden ones."""
        return value.masked_fill(uniforms < self.drop_rate, torch.nan)

    def not_given(self, count: int, size: Sequence[int]) -> Tensor:
        """``(count, K)`` of NaN."""
        return torch.full((count, len(self.levels)), torch.nan)

    def forward(self, values: Tensor) -> Conditioning:
        """Condition on ``(B, K)`` encoded covariates; NaN stands for "not given"."""
        if values.shape[1] != len(self.levels):
            raise LdmError(f"Expected {len(self.levels)} covariates a sample, got {values.shape[1]}.")
        if self.mode in ("concat", "hybrid"):
            planes = self._planes(values)  # (B, P)
            return Conditioning(planes=planes, context=planes[:, None] if self.mode == "hybrid" else None)
        tokens = torch.stack([token(values[:, k]) for k, token in enumerate(self.tokens)], dim=1)  # (B, K, E)
        if self.mode == "cross_attention":
            return Conditioning(context=tokens)
        return Conditioning(embedding=self.merge(tokens.flatten(1)))  # (B, E)

    def _planes(self, values: Tensor) -> Tensor:
        columns = [_columns(values[:, k], count) for k, count in enumerate(self.levels)]
        planes = torch.cat(columns, dim=1)  # (B, P)
        return torch.where(planes.isnan(), self.null, planes)


class _Token(nn.Module):
    """One covariate as a vector of width ``dim``; NaN gives the learned null."""

    def __init__(self, levels: int, dim: int, num_frequencies: int = 4) -> None:
        super().__init__()
        self.levels = levels
        self.null = nn.Parameter(0.02 * torch.randn(dim))
        if levels:
            self.embed = nn.Embedding(levels, dim)
        else:
            self.register_buffer("frequencies", torch.pi / 4 * 2.0 ** torch.arange(num_frequencies), persistent=False)
            self.register_buffer("centre", torch.tensor(0.5))
            self.register_buffer("spread", torch.tensor(12**-0.5))  # of a uniform distribution over the range
            self.embed = nn.Sequential(nn.Linear(1 + 2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value: Tensor) -> Tensor:
        given = ~value.isnan()  # (B,)
        value = value.nan_to_num()
        if self.levels:
            token = self.embed(value.long().clamp(0, self.levels - 1))  # (B, E)
        else:
            z = (value[:, None] - self.centre) / self.spread  # (B, 1)
            angles = z * self.frequencies  # (B, F): periods of 8, 4, 2 and 1 standard deviations
            token = self.embed(torch.cat([z, angles.sin(), angles.cos()], dim=1))  # (B, E)
        return torch.where(given[:, None], token, self.null)


def _width(levels: int) -> int:
    return levels if levels > 2 else 1


def _columns(value: Tensor, levels: int) -> Tensor:
    """Planes of one covariate: itself, or one-hot over more than two levels; NaN stays NaN."""
    if levels <= 2:
        return value[:, None]
    one_hot = nn.functional.one_hot(value.nan_to_num().long().clamp(0, levels - 1), levels).to(value)
    return torch.where(value.isnan()[:, None], torch.nan, one_hot)


def build_conditioner(levels: Sequence[int], config: Mapping, embedding_dim: int) -> CovariateConditioner | None:
    """The covariate conditioner that a ``condition`` section describes; None when there is nothing to condition on.

    Args:
        levels: levels of each covariate of the schema.
        config: ``mode``, ``dim`` (token width of cross-attention), ``drop_rate``; ``drop_all_rate`` is not its affair.
        embedding_dim: width of the denoiser's time embedding, the width of ``adaptive_norm``'s output.
    """
    if not levels or config["mode"] == "none":
        return None
    settings = {name: value for name, value in config.items() if name != "drop_all_rate"}
    if settings["mode"] == "adaptive_norm":
        settings["dim"] = embedding_dim
    return CovariateConditioner(levels, **settings)
