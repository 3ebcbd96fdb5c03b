"""A small BERT as a folder, in the layout of Hugging Face; its names are written down here and nowhere built."""

import json
import string

import torch
from safetensors.torch import save_file

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "woman", "year", "old", "mri", "##s", "-"]
VOCABULARY = WORDS + list(string.digits) + [f"##{digit}" for digit in string.digits]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
}


def bert_tensors(seed=0):
    width, hidden = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], width),
        "embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **layer_norm("embeddings", width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    for k in range(CONFIG["num_hidden_layers"]):
        start = f"encoder.layer.{k}"
        for name in ("query", "key", "value"):
            shapes |= dense(f"{start}.attention.self.{name}", width, width, "")
        shapes |= dense(f"{start}.attention.output", width, width) | layer_norm(f"{start}.attention.output", width)
        shapes |= dense(f"{start}.intermediate", hidden, width)
        shapes |= dense(f"{start}.output", width, hidden) | layer_norm(f"{start}.output", width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return tensors | {"embeddings.position_ids": torch.arange(CONFIG["max_position_embeddings"])[None]}


def dense(name, out, inside, suffix=".dense"):
    return {f"{name}{suffix}.weight": (out, inside), f"{name}{suffix}.bias": (out,)}


def layer_norm(name, width):
    return {f"{name}.LayerNorm.weight": (width,), f"{name}.LayerNorm.bias": (width,)}


def write_bert(folder, tensors=None, vocabulary=VOCABULARY, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    save_file(bert_tensors() if tensors is None else tensors, folder / "model.safetensors")
    return folder
