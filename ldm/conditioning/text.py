"""Text as a condition: WordPiece tokens, a transformer encoder, cross-attention.

As Rombach et al. 2022 (section 3.3): a BERT tokenizer and a transformer encoder that is trained from scratch, whose
output tokens the U-Net attends to. Or a BERT that comes with weights and stays as it is, as the encoder of Saharia et
al. 2022 does.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.base import Conditioning, InputConditioner
from ldm.conditioning.captions import Caption
from ldm.errors import LdmError
from ldm.networks.frozen import freeze
from ldm.networks.text import Bert, TextTransformer

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, FIRST, LAST)
NOT_GIVEN = -1  # in the place of all token numbers of a sample


class WordPiece:
    """BERT's tokenizer for a vocabulary: words and punctuation apart, longest known pieces first.

    Args:
        vocabulary: tokens in order of their numbers, with [PAD], [UNK], [CLS] and [SEP] among them; pieces that
            continue a word start with ``##``.
        lowercase: whether the vocabulary knows lower case only.

    Raises:
        LdmError: the package ``tokenizers`` is not installed, or a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str], lowercase: bool = True) -> None:
        try:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        except ImportError as error:
            raise LdmError("Text conditions need the package tokenizers: pip install -e '.[text]'.") from error
        self.numbers = {token: number for number, token in enumerate(vocabulary)}
        missing = [token for token in SPECIAL if token not in self.numbers]
        if missing:
            raise LdmError(f"The vocabulary lacks {', '.join(missing)}; legal: a BERT vocabulary, one token a line.")
        self.tokenizer = Tokenizer(models.WordPiece(self.numbers, unk_token=UNKNOWN))
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def __call__(self, text: str) -> list[int]:
        """Token numbers of a text, between [CLS] and [SEP]."""
        inside = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.numbers[FIRST], *inside, self.numbers[LAST]]


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens of a BERT ``vocab.txt``, one a line.

    Raises:
        LdmError: no such file.
    """
    if not Path(path).is_file():
        raise LdmError(f"There is no vocabulary {path}; give a BERT vocab.txt, or null for the caption's own words.")
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # and at nothing else: a token may be a strange space
    return lines if lines[-1] else lines[:-1]


def own_vocabulary(texts: Iterable[str]) -> list[str]:
    """The words of ``texts`` whole, and single characters for everything else, numbers among them."""
    from tokenizers import normalizers, pre_tokenizers

    normalize, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normalize.normalize_str(text))}
    letters = string.ascii_lowercase + string.digits
    characters = [*letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    return [*SPECIAL, *characters, *sorted(words - set(characters))]


class TextConditioner(InputConditioner):
    """A caption, as the output tokens of a transformer encoder.

    The condition's tensor is token numbers ``(B, max_tokens)`` padded with [PAD], or -1 everywhere for no caption,
    for which one learned token stands in. Padding is neither attended to in here nor by the denoiser.

    Args:
        encoder: gives ``(B, N, encoder.width)`` for token numbers and where padding is; see `trained_encoder` and
            `frozen_encoder`.
        tokenize: its tokenizer.
        caption: how a row of covariates is said, for samples that come without a text; None for not at all.
        context_dim: width of the tokens that the denoiser attends to.
        max_tokens: longest text, [CLS] and [SEP] included.
        drop_rate: probability that a sample's caption is hidden.
        where: its place in the configuration, for messages.
    """

    has_padding = True

    def __init__(
        self,
        encoder: nn.Module,
        tokenize: WordPiece,
        caption: Caption | None,
        context_dim: int,
        max_tokens: int = 64,
        drop_rate: float = 0.1,
        where: str = "ldm.conditioners",
    ) -> None:
        super().__init__(drop_rate, where)
        self.encoder, self.tokenize, self.caption, self.where = encoder, tokenize, caption, where
        self.context_dim, self.max_tokens = context_dim, max_tokens
        self.padding = tokenize.numbers[PAD]
        self.project = nn.Linear(encoder.width, context_dim)
        self.null = nn.Parameter(0.02 * torch.randn(context_dim))

    def blank(self, value: Tensor) -> Tensor:
        """No captions: -1 everywhere."""
        return torch.full_like(value, NOT_GIVEN)

    def is_given(self, value: Tensor) -> Tensor:
        """Whether there is a caption: ``(B, max_tokens)`` -> ``(B,)`` bool."""
        return value[:, 0] != NOT_GIVEN

    def not_given(self, count: int, size: Sequence[int]) -> Tensor:
        """``(count, max_tokens)`` of -1."""
        return torch.full((count, self.max_tokens), NOT_GIVEN)

    def encode(self, value: Any, row: Mapping[str, Any], size: Sequence[int]) -> Tensor:
        """Token numbers ``(max_tokens,)`` of a text; None asks for the caption of the row, "" for none.

        Raises:
            LdmError: no text, or one that is too long.
        """
        if value is None and self.caption is not None:
            value = self.caption(row)
        if not value:
            return self.not_given(1, size)[0]
        if not isinstance(value, str):
            raise LdmError(f"{self.where}: {value!r} is not a text.")
        numbers = self.tokenize(value)
        if len(numbers) > self.max_tokens:
            raise LdmError(
                f"{self.where}: '{value}' has {len(numbers)} tokens, [CLS] and [SEP] included; legal: at most "
                f"{self.max_tokens} (max_tokens)."
            )
        return torch.tensor(numbers + [self.padding] * (self.max_tokens - len(numbers)))

    def forward(self, value: Tensor) -> Conditioning:
        """Condition on ``(B, max_tokens)`` token numbers."""
        if value.ndim != 2 or value.shape[1] != self.max_tokens:
            raise LdmError(f"{self.where}: expected (B, {self.max_tokens}) tokens, got {tuple(value.shape)}.")
        given = self.is_given(value)[:, None]  # (B, 1)
        padding = (value == self.padding) | ~given  # (B, N)
        first = torch.arange(self.max_tokens, device=value.device) == 0  # (N,): never padding, so never without a token
        tokens = self.project(self.encoder(value.clamp(min=0), padding & ~first))  # (B, N, E)
        tokens = torch.where(given[..., None] | ~first[:, None], tokens, self.null.to(tokens.dtype))
        return Conditioning(context=tokens.masked_fill((padding & ~first)[..., None], torch.nan))


def trained_encoder(
    vocabulary: Sequence[str],
    max_tokens: int = 64,
    dim: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_head_channels: int | None = None,
    where: str = "ldm.conditioners",
) -> TextTransformer:
    """A small transformer that is trained with the denoiser.

    Raises:
        LdmError: an impossible size.
    """
    for name, size, least in (("dim", dim, 1), ("num_layers", num_layers, 1), ("max_tokens", max_tokens, 3)):
        if not isinstance(size, int) or size < least:
            raise LdmError(f"{where}.{name} is {size}; legal: {least} or more.")
    if not isinstance(num_heads, int) or num_heads < 1 or (dim % num_heads and not num_head_channels):
        raise LdmError(
            f"{where}.num_heads is {num_heads}; legal: a divisor of dim, which is {dim}, or any with num_head_channels."
        )
    if num_head_channels is not None and (not isinstance(num_head_channels, int) or num_head_channels < 1):
        raise LdmError(f"{where}.num_head_channels is {num_head_channels}; legal: 1 or more, or null.")
    return TextTransformer(len(vocabulary), max_tokens, dim, num_layers, num_heads, num_head_channels)


def frozen_encoder(sizes: Mapping[str, int], max_tokens: int = 64, where: str = "ldm.conditioners") -> Bert:
    """A BERT that is never trained; its weights come from a model file, or from where it was trained.

    Raises:
        LdmError: texts may be longer than the encoder has places for.
    """
    places = sizes["max_position_embeddings"]
    if not isinstance(max_tokens, int) or not 3 <= max_tokens <= places:
        raise LdmError(f"{where}.max_tokens is {max_tokens}; legal: 3 to {places}, the encoder's places.")
    return freeze(Bert(**sizes))
