"""A text encoder that comes with weights: computes what BERT does, stays as it is, refused if it does not fit."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ldm.conditioning.build import complete
from ldm.conditioning.pretrained import describe_encoder, load_encoder
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.model.transfer import start_from
from ldm.networks.text import Bert
from ldm.training.ema import EMA
from ldm.training.latent_diffusion import LatentDiffusion
from tests.conditioning.bert_folder import CONFIG, VOCABULARY, bert_tensors, write_bert
from tests.model.test_transfer import AGE, SEX, model
from tests.training.test_latent_diffusion import LOSS
from tests.training.test_stages import OPTIMIZER

CAPTION = "MRI of a [{age:.0f}-year-old ]{sex:woman|man}"


def read(folder):
    described, _ = describe_encoder(folder, "here")
    sizes = {name: value for name, value in described.items() if name not in ("lowercase", "sha256")}
    encoder = Bert(**sizes).eval()
    load_encoder(encoder, folder, "here")
    return encoder


def as_torch_computes(tensors, numbers):
    """BERT of torch's own layers: (N,) token numbers without padding -> (N, H)."""
    width, heads, hidden = (CONFIG[n] for n in ("hidden_size", "num_attention_heads", "intermediate_size"))
    embeddings = {name.removeprefix("embeddings."): value for name, value in tensors.items()}
    x = embeddings["word_embeddings.weight"][numbers] + embeddings["position_embeddings.weight"][: len(numbers)]
    x = x + embeddings["token_type_embeddings.weight"][0]
    norm = embeddings["LayerNorm.weight"], embeddings["LayerNorm.bias"]
    x = nn.functional.layer_norm(x, (width,), *norm, CONFIG["layer_norm_eps"])[None]
    for k in range(CONFIG["num_hidden_layers"]):
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, 0.0, "gelu", layer_norm_eps=CONFIG["layer_norm_eps"], batch_first=True
        )
        own = {
            n.removeprefix(f"encoder.layer.{k}."): v for n, v in tensors.items() if n.startswith(f"encoder.layer.{k}.")
        }
        state = {}
        for part in ("weight", "bias"):
            inside = [own[f"attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"self_attn.in_proj_{part}"] = torch.cat(inside)
            for theirs, ours in (
                ("self_attn.out_proj", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("linear1", "intermediate.dense"),
                ("linear2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ):
                state[f"{theirs}.{part}"] = own[f"{ours}.{part}"]
        layer.load_state_dict(state)
        x = layer.eval()(x)
    return x[0]


@torch.no_grad()
def test_it_computes_what_bert_does_and_does_not_see_padding(tmp_path):
    tensors = bert_tensors()
    numbers = torch.tensor([[2, 4, 5, 10, 3, 0, 0], [2, 6, 3, 7, 8, 9, 11]])
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    hidden = read(write_bert(tmp_path / "bert"))(numbers, padding)
    torch.testing.assert_close(hidden[0, :5], as_torch_computes(tensors, numbers[0, :5]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden[1], as_torch_computes(tensors, numbers[1]), rtol=1e-4, atol=1e-4)
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    again = read(write_bert(tmp_path / "old", {**old, "cls.predictions.bias": torch.zeros(3)}))(numbers, padding)
    assert (again == hidden).all()  # part of a larger model, with older names


def conditioned(folder, **text):
    settings = {"text": {"caption": CAPTION, "encoder": str(folder), "dim": 12, "max_tokens": 16, **text}}
    described = complete(settings, CovariateSchema([AGE, SEX]), None, ("a", "b", "c"), 1)
    made = model([AGE, SEX], "adaptive_norm", conditioners=described)
    load_encoder(made.network.conditioners["text"].encoder, folder, "here")
    return made


def test_frozen_means_frozen(tmp_path):
    folder = write_bert(tmp_path / "bert")
    made = conditioned(folder)
    module = LatentDiffusion(made, OPTIMIZER, LOSS, (0.5, 0.9))
    text = module.train().network.conditioners["text"]
    assert not any(part.training for part in text.encoder.modules())
    assert text.training
    before = {name: value.clone() for name, value in text.encoder.state_dict().items()}
    optimizer = module.configure_optimizers()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in text.encoder.parameters()}
    assert id(text.project.weight) in trained

    condition = made.encode_condition([{"age": 70.0, "sex": "F"}] * 2, {"text": [None, ""]})
    module.network(torch.randn(2, 3, 8, 8), torch.tensor([10, 20]), condition).square().mean().backward()
    assert text.project.weight.grad.any()
    assert text.null.grad.any()
    optimizer.step()
    module.ema.update(module.network)
    for average in module.ema.averages:
        assert average.conditioners["text"].encoder is text.encoder
        assert average.conditioners["text"].project.weight is not text.project.weight
    after = text.encoder.state_dict()
    assert all((after[name] == value).all() for name, value in before.items())

    checkpoint = module.state_dict()
    assert not [name for name in checkpoint if ".text.encoder." in name]
    assert "network.conditioners.text.project.weight" in checkpoint
    module.load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match="project.weight"):
        module.load_state_dict({n: v for n, v in checkpoint.items() if n != "network.conditioners.text.project.weight"})


def test_one_file_is_enough_and_holds_the_encoder_once(tmp_path):
    made = conditioned(write_bert(tmp_path / "bert"))
    made.save(tmp_path / "m.safetensors")
    (tmp_path / "bert").rename(tmp_path / "gone")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys() if ".encoder." in name}  # noqa: SIM118
    wanted = {f"network.conditioners.text.encoder.{name}": value for name, value in bert_tensors().items()}
    unused = {name for name in wanted if "pooler" in name or "position_ids" in name}
    assert stored.keys() == wanted.keys() - unused
    assert all((stored[name] == wanted[name]).all() for name in stored)
    again = LatentDiffusionModel.load(tmp_path / "m.safetensors")
    options = {"n": 1, "num_inference_steps": 2, "precision": "float32"}
    first, second, other = (
        one.sample(text=text, **options).images for one, text in ((made, "a man"), (again, "a man"), (again, "a woman"))
    )
    assert (first == second).all()
    assert (first != other).any()


def test_a_start_from_another_model_leaves_the_encoder_alone(tmp_path):
    made = conditioned(write_bert(tmp_path / "bert"))
    write_bert(tmp_path / "other", bert_tensors(seed=5))
    conditioned(tmp_path / "other").save(tmp_path / "m.safetensors")
    before = made.network.conditioners["text"].encoder.state_dict()["embeddings.word_embeddings.weight"].clone()
    start_from(made, tmp_path / "m.safetensors")
    assert (made.network.conditioners["text"].encoder.embeddings["word_embeddings"].weight == before).all()


def test_upper_case_is_kept_where_the_tokenizer_says_so(tmp_path):
    folder = write_bert(tmp_path / "bert", vocabulary=["MRI" if word == "mri" else word for word in VOCABULARY])
    for lowercase, found in ((True, 1), (False, VOCABULARY.index("mri"))):
        (folder / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lowercase).lower()}}}')
        assert conditioned(folder).network.conditioners["text"].tokenize("MRI") == [2, found, 3]


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_bert(tmp_path / "bert")
    (folder / name).unlink()
    with pytest.raises(LdmError, match=rf"text.encoder: there is no .*bert/{name}; legal: a folder with config.json"):
        conditioned(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": VOCABULARY[:-1]}, r"vocab.txt has 31 tokens, the encoder knows 32"),
        ({"model_type": "roberta"}, "has model_type 'roberta'; legal: 'bert'"),
        ({"hidden_act": "relu"}, "has hidden_act 'relu'; legal: 'gelu'"),
        ({"hidden_size": None}, "lacks hidden_size; a BERT has all of vocab_size, hidden_size"),
        ({"num_attention_heads": 3}, "hidden_size 16 in 3 num_attention_heads"),
        (
            {"intermediate_size": 25},
            r"shape: encoder.layer.0.intermediate.dense.bias is \(24,\) in the file, \(25,\) in",
        ),
    ],
)
def test_what_is_no_bert_or_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(LdmError, match=message):
        conditioned(write_bert(tmp_path / "bert", **change))


def test_a_missing_or_strange_tensor_is_named(tmp_path):
    tensors = bert_tensors()
    value = tensors.pop("encoder.layer.1.output.dense.weight")
    with pytest.raises(LdmError, match=r"missing: encoder.layer.1.output.dense.weight \(16, 24\)"):
        conditioned(write_bert(tmp_path / "bert", tensors))
    tensors = {**bert_tensors(), "encoder.layer.2.output.dense.weight": value}
    with pytest.raises(LdmError, match="unexpected: encoder.layer.2.output.dense.weight"):
        conditioned(write_bert(tmp_path / "bert", tensors))
    (tmp_path / "bert/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(LdmError, match="model.safetensors is not a readable safetensors file"):
        conditioned(tmp_path / "bert")


def test_settings_that_the_encoder_has_itself_are_refused(tmp_path):
    folder = write_bert(tmp_path / "bert")
    with pytest.raises(LdmError, match="text.num_layers: the encoder of ldm.conditioners.text.encoder has its own"):
        conditioned(folder, num_layers=3)
    with pytest.raises(LdmError, match="max_tokens is 21; legal: 3 to 20, the encoder's places"):
        conditioned(folder, max_tokens=21)


def test_a_copy_shares_what_is_frozen_only():
    made = model([AGE], "concat")
    average = EMA(made.network).module
    assert not {id(p) for p in average.parameters()} & {id(p) for p in made.network.parameters()}
    assert copy.deepcopy(made).first_stage is made.first_stage
