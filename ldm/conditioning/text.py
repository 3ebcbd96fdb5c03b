"""Text as a condition: WordPiece tokens, a small transformer that is trained with the denoiser, cross-attention.

As Rombach et al. 2022 (section 3.3): a BERT tokenizer and a transformer encoder that is trained from scratch, whose
output tokens the U-Net attends to.
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

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PAD, UNKNOWN, FIRST, LAST)
NOT_GIVEN = -1  # in the place of all token numbers of a sample


class WordPiece:
    """BERT's tokenizer for a vocabulary: lower case, words and punctuation apart, longest known pieces first.

    Args:
        vocabulary: tokens in order of their numbers, with [PAD], [UNK], [CLS] and [SEP] among them; pieces that
            continue a word start with ``##``.

    Raises:
        LdmError: the package ``tokenizers`` is not installed, or a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        try:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
        except ImportError as error:
            raise LdmError("Text conditions need the package tokenizers: pip install 'ldm[text]'.") from error
        self.numbers = {token: number for number, token in enumerate(vocabulary)}
        missing = [token for token in SPECIAL if token not in self.numbers]
        if missing:
            raise LdmError(f"The vocabulary lacks {', '.join(missing)}; legal: a BERT vocabulary, one token a line.")
        self.tokenizer = Tokenizer(models.WordPiece(self.numbers, unk_token=UNKNOWN))
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
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
    return Path(path).read_text(encoding="utf-8").splitlines()


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
        vocabulary: see :class:`WordPiece`.
        caption: how a row of covariates is said, for samples that come without a text; None for not at all.
        context_dim: width of the tokens that the denoiser attends to.
        dim, num_layers, num_heads: of the encoder.
        max_tokens: longest text, [CLS] and [SEP] included.
        drop_rate: probability that a sample's caption is hidden.
        where: its place in the configuration, for messages.

    Raises:
        LdmError: an impossible size.
    """

    has_padding = True

    def __init__(
        self,
        vocabulary: Sequence[str],
        caption: Caption | None,
        context_dim: int,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        max_tokens: int = 64,
        drop_rate: float = 0.1,
        where: str = "ldm.conditioners",
    ) -> None:
        super().__init__(drop_rate, where)
        for name, size, least in (("dim", dim, 1), ("num_layers", num_layers, 1), ("max_tokens", max_tokens, 3)):
            if not isinstance(size, int) or size < least:
                raise LdmError(f"{where}.{name} is {size}; legal: {least} or more.")
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise LdmError(f"{where}.num_heads is {num_heads}; legal: a divisor of dim, which is {dim}.")
        self.tokenize, self.caption, self.where = WordPiece(vocabulary), caption, where
        self.context_dim, self.max_tokens = context_dim, max_tokens
        self.padding = self.tokenize.numbers[PAD]
        self.embed = nn.Embedding(len(vocabulary), dim)
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens, dim))
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.project = nn.Linear(dim, context_dim)
        self.null = nn.Parameter(0.02 * torch.randn(context_dim))

    def blank(self, value: Tensor) -> Tensor:
        """No captions: -1 everywhere."""
        return torch.full_like(value, NOT_GIVEN)

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
        given = value[:, :1] != NOT_GIVEN  # (B, 1)
        padding = (value == self.padding) | ~given  # (B, N)
        first = torch.arange(self.max_tokens, device=value.device) == 0  # (N,): never padding, so never without a token
        tokens = self.embed(value.clamp(min=0)) + self.positions  # (B, N, dim)
        tokens = self.project(self.encoder(tokens, src_key_padding_mask=padding & ~first))  # (B, N, E)
        tokens = torch.where(given[..., None] | ~first[:, None], tokens, self.null.to(tokens.dtype))
        return Conditioning(context=tokens.masked_fill((padding & ~first)[..., None], torch.nan))
