"""Transformer encoders of text: one that is trained with the denoiser, and BERT, which comes with weights.

Both take token numbers ``(B, N)`` and where padding is ``(B, N)``, and give tokens ``(B, N, width)``; padding is not
attended to.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TextTransformer(nn.Module):
    """Embeddings, learned positions and layers that normalise first (Rombach et al. 2022, text-to-image model).

    Args:
        vocabulary_size: number of tokens.
        max_tokens: longest text.
        dim: width.
        num_layers, num_heads: of the encoder.
        num_head_channels: width of an attention head; None for ``dim / num_heads``.
    """

    def __init__(
        self,
        vocabulary_size: int,
        max_tokens: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_head_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.width = dim
        self.embed = nn.Embedding(vocabulary_size, dim)
        self.positions = nn.Embedding(max_tokens, dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        inner = num_heads * (num_head_channels or dim // num_heads)
        self.layers = nn.ModuleList(_Layer(dim, num_heads, inner) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, numbers: Tensor, padding: Tensor) -> Tensor:
        """``(B, N)`` token numbers and whether each is padding -> ``(B, N, dim)``."""
        x = self.embed(numbers) + self.positions.weight[: numbers.shape[1]]  # (B, N, dim)
        for layer in self.layers:
            x = layer(x, padding)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out_proj(attend(self.to_q(h), self.to_k(h), self.to_v(h), padding, self.num_heads))
        return x + self.mlp(self.norm2(x))


class Bert(nn.Module):
    """BERT's encoder (Devlin et al. 2019) without its pooler: what it says of each token of one text.

    Parameters have the names of the files of Hugging Face's ``BertModel``; so do the arguments, in ``config.json``.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, max_position_embeddings,
            type_vocab_size, layer_norm_eps: as there.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        max_position_embeddings: int,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.width = hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab_size, hidden_size),
                "position_embeddings": nn.Embedding(max_position_embeddings, hidden_size),
                "token_type_embeddings": nn.Embedding(type_vocab_size, hidden_size),
                "LayerNorm": nn.LayerNorm(hidden_size, layer_norm_eps),
            }
        )
        layers = [
            _BertLayer(hidden_size, num_attention_heads, intermediate_size, layer_norm_eps)
            for _ in range(num_hidden_layers)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, numbers: Tensor, padding: Tensor) -> Tensor:
        """``(B, N)`` token numbers and whether each is padding -> last hidden states ``(B, N, hidden_size)``."""
        parts = self.embeddings
        places, kinds = parts["position_embeddings"].weight, parts["token_type_embeddings"].weight
        x = parts["word_embeddings"](numbers) + places[: numbers.shape[1]] + kinds[0]  # (B, N, H); all of kind 0
        x = parts["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, padding)
        return x


class _BertLayer(nn.Module):
    """Attention and a layer of neurons, each normalised after it is added."""

    def __init__(self, width: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        inside = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": inside, "output": _output(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _output(hidden, width, eps)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = (self.attention["self"][name](x) for name in ("query", "key", "value"))  # (B, N, H) each
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](attend(q, k, v, padding, self.num_heads)))
        hidden = F.gelu(self.intermediate["dense"](x))  # (B, N, intermediate_size)
        return self.output["LayerNorm"](x + self.output["dense"](hidden))


def _output(inner: int, width: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps)})


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, num_heads: int) -> Tensor:
    """Attention of ``(B, N, C)`` in heads, to tokens that are no padding ``(B, N)``; every text needs one."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, C / heads)
    mixed = F.scaled_dot_product_attention(q, k, v, ~padding[:, None, None])
    return mixed.transpose(1, 2).flatten(2)  # (B, N, C)
