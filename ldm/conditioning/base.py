"""What a conditioner is, and how several become one condition of the denoiser.

The condition of a batch is a mapping {name of the conditioner: tensor}, and every conditioner has a way of saying "not
given" in its tensor (NaN, or -1 among token numbers), for which a learned null of its own stands in. So dropping a
condition in training, leaving it out when sampling, and the null of guidance are one and the same thing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import LdmError, nearest

#: {name of a conditioner: its tensor, (B, ...)}
Condition = Mapping[str, Tensor]

COVARIATES = "covariates"


@dataclass(frozen=True)
class Conditioning:
    """What the conditioners hand to the denoiser; every part may be absent.

    Attributes:
        planes: ``(B, P)`` or ``(B, P, D, H, W)``, concatenated to the noisy latent.
        context: ``(B, tokens, context_dim)``, attended to; a token of NaN is padding.
        embedding: ``(B, E)``, added to the time embedding.
        spade: ``(B, L, D, H, W)``, modulates the decoder's normalisations.
        control: ``(B, P, D, H, W)``, the input of a control; a sample of NaN is not controlled.
    """

    planes: Tensor | None = None
    context: Tensor | None = None
    embedding: Tensor | None = None
    spade: Tensor | None = None
    control: Tensor | None = None


def merge(parts: Sequence[Conditioning]) -> Conditioning:
    """Planes concatenate as channels, contexts as tokens, embeddings add; of the others there is at most one."""
    found = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Conditioning)}
    given = {name: [value for value in values if value is not None] for name, values in found.items()}
    planes, contexts, embeddings = _at_one_size(given["planes"]), given["context"], given["embedding"]
    return Conditioning(
        torch.cat(planes, dim=1) if planes else None,  # (B, P) or (B, P, *S)
        torch.cat(contexts, dim=1) if contexts else None,  # (B, tokens, E)
        torch.stack(embeddings).sum(0) if embeddings else None,  # (B, E)
        *(next(iter(given[name]), None) for name in ("spade", "control")),
    )


def _at_one_size(planes: Sequence[Tensor]) -> list[Tensor]:
    """Planes that are one number each are spread over space, if others are not."""
    size = next((plane.shape[2:] for plane in planes if plane.ndim > 2), ())
    return [p if p.ndim > 2 or not size else p[(..., *(None,) * len(size))].expand(*p.shape, *size) for p in planes]


class Conditioner(nn.Module, ABC):
    """One condition: its tensor, how often it is hidden in training, and what it tells the denoiser.

    Attributes:
        plane_channels: channels that it adds to the denoiser's input.
        spade_channels: classes that modulate the decoder's normalisations.
        control_channels: channels of the input of a control.
        learns_null: whether what stands in for "not given" is learned, so that hiding everything hides this too.
        context_dim: width of its tokens; None without.
        has_padding: whether some of its tokens may be padding.
        has_embedding: whether it adds to the time embedding.
        num_uniforms: uniform random numbers that :meth:`drop` takes a sample.
    """

    plane_channels: int = 0
    spade_channels: int = 0
    control_channels: int = 0
    learns_null: bool = True
    context_dim: int | None = None
    has_padding: bool = False
    has_embedding: bool = False
    num_uniforms: int = 1

    def __init__(self, drop_rate: float = 0.1, where: str = "condition") -> None:
        super().__init__()
        check_rate(f"{where}.drop_rate", drop_rate)
        self.drop_rate = drop_rate

    def blank(self, value: Tensor) -> Tensor:
        """``value`` with nothing given."""
        return torch.full_like(value, torch.nan)

    def is_given(self, value: Tensor) -> Tensor:
        """Whether the whole of it is given: ``(B, ...)`` -> ``(B,)`` bool."""
        return ~value.flatten(1).isnan().any(1)

    def drop(self, value: Tensor, uniforms: Tensor) -> Tensor:
        """Hide the condition of some samples.

        Args:
            value: ``(B, ...)``.
            uniforms: ``(B, num_uniforms)`` uniform random numbers.
        """
        hidden = (uniforms < self.drop_rate).view(-1, *(1,) * (value.ndim - 1))  # (B, 1, ...)
        return torch.where(hidden, self.blank(value), value)

    @abstractmethod
    def not_given(self, count: int, size: Sequence[int]) -> Tensor:
        """``(count, ...)`` with nothing given, for a latent grid of ``size``."""

    @abstractmethod
    def forward(self, value: Tensor) -> Conditioning:
        """What ``(B, ...)`` tells the denoiser.

        Raises:
            LdmError: a tensor of another shape.
        """


class InputConditioner(Conditioner):
    """One that a user gives something of its own, beside the covariates."""

    @abstractmethod
    def encode(self, value: Any, row: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """The tensor of one sample, ``(...)``, without B.

        Args:
            value: what a user gives, None for nothing.
            row: the sample's covariates in physical units.
            size: latent grid.

        Raises:
            LdmError: a value that is not legal.
        """


class Conditioners(nn.ModuleDict):
    """All conditioners of a network, by name, in the order of their planes and tokens.

    Args:
        conditioners: by name, which is the key of their tensor in a condition.
        drop_all_rate: probability that everything is hidden of a sample, so that the network knows what guidance
            compares with.
    """

    def __init__(self, conditioners: Mapping[str, Conditioner], drop_all_rate: float = 0.1) -> None:
        super().__init__(conditioners)
        check_rate("condition.drop_all_rate", drop_all_rate)
        self.drop_all_rate = drop_all_rate
        widths = {name: one.context_dim for name, one in conditioners.items() if one.context_dim is not None}
        if len(set(widths.values())) > 1:
            raise LdmError(f"Conditioners with tokens need one width; theirs are {widths}.")
        self.context_dim = next(iter(widths.values()), None)

    @property
    def plane_channels(self) -> int:
        """Channels that they add to the denoiser's input."""
        return sum(one.plane_channels for one in self.values())

    @property
    def spade_channels(self) -> int:
        """Classes that modulate the decoder's normalisations."""
        return sum(one.spade_channels for one in self.values())

    @property
    def control_channels(self) -> int:
        """Channels of the input of a control; 0 without one."""
        return sum(one.control_channels for one in self.values())

    @property
    def has_padding(self) -> bool:
        """Whether some token may be padding."""
        return any(one.has_padding for one in self.values())

    @property
    def has_embedding(self) -> bool:
        """Whether any adds to the time embedding."""
        return any(one.has_embedding for one in self.values())

    @property
    def num_uniforms(self) -> int:
        """Uniform random numbers that :meth:`drop` takes a sample; the last decides about everything."""
        return sum(one.num_uniforms for one in self.values()) + 1

    def forward(self, condition: Condition) -> Conditioning:
        """What a condition tells the denoiser.

        Raises:
            LdmError: one is missing, or has a wrong shape.
        """
        missing = [name for name in self if name not in condition]
        if missing:
            raise LdmError(f"The condition lacks {', '.join(missing)}; legal: {', '.join(self)}, all of them.")
        return merge([one(condition[name]) for name, one in self.items()])

    def drop(self, condition: Condition, uniforms: Tensor) -> dict[str, Tensor]:
        """Hide conditions at random: each on its own, and all of a sample at once.

        Args:
            condition: ``(B, ...)`` each.
            uniforms: ``(B, num_uniforms)``.
        """
        every = uniforms[:, -1] < self.drop_all_rate  # (B,)
        dropped, start = dict(condition), 0
        for name, one in self.items():
            value = one.drop(condition[name], uniforms[:, start : start + one.num_uniforms])
            if one.learns_null:
                value = torch.where(every.view(-1, *(1,) * (value.ndim - 1)), one.blank(value), value)
            dropped[name] = value
            start += one.num_uniforms
        return dropped

    def null(self, condition: Condition) -> dict[str, Tensor]:
        """``condition`` with nothing given."""
        return {**condition, **{name: one.blank(condition[name]) for name, one in self.items()}}

    def without(self, condition: Condition, name: str) -> dict[str, Tensor]:
        """``condition`` without one of its parts.

        Raises:
            LdmError: there is no such conditioner.
        """
        if name not in self:
            raise LdmError(f"There is no conditioner '{name}'; legal: {', '.join(self)}.{nearest(name, self)}")
        return {**condition, name: self[name].blank(condition[name])}


def stack(conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """Conditions of several batches as that of one: ``(B, ...)`` each -> ``(count * B, ...)``."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}


def check_rate(name: str, rate: float) -> None:
    """Raise LdmError unless ``rate`` is a probability."""
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise LdmError(f"{name} is a probability, got {rate}; legal: 0 to 1.")
