"""A control on a frozen model: nothing at first, nothing without its input, and the only thing that learns."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm.conditioning.build import as_control, complete
from ldm.conditioning.covariates import MODES
from ldm.data.schema import CovariateSchema
from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions
from ldm.model.network import ConditionalDenoiser
from ldm.training.latent_diffusion import LatentDiffusion
from tests.conditioning.test_conditioners import LABELS
from tests.model.test_transfer import AGE, SEX, model
from tests.networks.test_denoiser import SCHEMA, awake
from tests.training.test_latent_diffusion import LOSS
from tests.training.test_stages import OPTIMIZER

TEXT = {"caption": "a [{age:.0f}-year-old ]{sex:woman|man}", "dim": 16, "num_heads": 2, "max_tokens": 12}
KINDS = {"mask": {}, "image": {"channels": ["T2"]}}
OPTIONS = {"num_inference_steps": 2, "precision": "float32"}


def described(kind, schema, **others):
    """(conditioners of the frozen model, of the controlled one)"""
    base = complete(others, schema, LABELS, ("T1", "T2"), 2)
    return base, {**base, **as_control(complete({kind: KINDS[kind]}, schema, LABELS, ("T1", "T2"), 2))}


def networks(kind, mode, size, **denoiser):
    frozen, controlled = described(kind, SCHEMA, **({"text": TEXT} if mode == "cross_attention" else {}))
    header = {
        "denoiser": {
            "channels": [16, 32],
            "num_res_blocks": 1,
            "attention_levels": [False, True],
            "norm_num_groups": 16,
            "num_head_channels": 16,
            **denoiser,
        },
        "condition": {"mode": mode, "dim": 8, "drop_rate": 0.1, "drop_all_rate": 0.1},
        "latent_shape": [3, *size],
    }
    torch.manual_seed(0)
    frozen = awake(ConditionalDenoiser({**header, "conditioners": frozen}, SCHEMA))
    controlled = ConditionalDenoiser({**header, "conditioners": controlled}, SCHEMA)
    controlled.start_control(frozen)
    return frozen, controlled


def batch(controlled, kind, size):
    generator = torch.Generator().manual_seed(0)
    channels = controlled.conditioners.control_channels
    given = {
        "covariates": torch.tensor([[0.2, 0.0, 1.0], [torch.nan, 1.0, 2.0]]),
        kind: torch.rand(2, channels, *size, generator=generator),
    }
    if "text" in controlled.conditioners:
        given["text"] = torch.stack([controlled.conditioners["text"].encode(t, {}, size) for t in ("a man", "")])
    return torch.randn(2, 3, *size, generator=generator), torch.tensor([500, 20]), given


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "size", "denoiser"),
    [
        ("mask", (8, 8), {}),
        ("mask", (8, 8), {"patch_size": 2}),
        ("image", (4, 4, 4), {"resblock_updown": True, "position_frequencies": 1}),
    ],
    ids=["mask", "patches", "image"],
)
@torch.no_grad()
def test_it_is_the_frozen_model_at_first_and_without_its_input(kind, size, denoiser, mode):
    frozen, controlled = networks(kind, mode, size, **denoiser)
    x, t, given = batch(controlled, kind, size)
    expected = frozen(x, t, given)
    assert (controlled(x, t, given) == expected).all()
    awake(controlled.control)
    assert ((controlled(x, t, given) - expected).abs().flatten(1).amax(1) > 1e-4).all()
    nothing = controlled.conditioners.without(given, kind)
    assert (controlled(x, t, nothing) == expected).all()
    one = {**given, kind: torch.stack([given[kind][0], nothing[kind][1]])}
    difference = (controlled(x, t, one) - expected).abs().flatten(1).amax(1)
    assert difference[0] > 1e-4
    assert difference[1] == 0


def test_the_controls_encoder_is_a_copy_and_starts_at_the_frozen_one():
    frozen, controlled = networks("mask", "adaptive_norm", (8, 8))
    own, theirs = controlled.control.net.state_dict(), frozen.denoiser.unet.state_dict()
    copied = [name for name in own if name.startswith(("conv_in", "time_embed", "down_blocks", "middle_block"))]
    assert {name for name in own if not name.startswith("controlnet")} == set(copied)
    assert all((own[name] == theirs[name]).all() for name in copied)
    assert not {p.data_ptr() for p in controlled.control.parameters()} & {p.data_ptr() for p in frozen.parameters()}


def controlled_model(**settings):
    frozen, controlled = described("mask", CovariateSchema([SEX, AGE]), text=TEXT)
    base = model([SEX, AGE], "adaptive_norm", conditioners=frozen, **settings)
    base.header["conditioners"] = controlled
    made = LatentDiffusionModel(base.header, base.latent_space, base.preprocessing, base.schema).eval()
    base.header["conditioners"] = frozen
    made.header["conditioners"]["mask"]["factor"] = made.network.conditioners["mask"].factor = 1
    made.network.start_control(base.network)
    return base, made


def test_only_the_control_learns():
    _, made = controlled_model()
    module = LatentDiffusion(made, OPTIMIZER, LOSS).train()
    network = module.network
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"control.{name}" for name, _ in network.control.named_parameters()}
    assert not network.denoiser.training
    assert network.control.training
    awake(network.control).train()
    condition = made.encode_condition([{"age": 70.0, "sex": "F"}] * 2, {"mask": [np.eye(8)] * 2})
    network(torch.randn(2, 3, 8, 8), torch.tensor([10, 20]), condition).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.control.parameters())
    silent = [name for name, parameter in network.control.named_parameters() if not parameter.grad.any()]
    assert not silent
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module.configure_optimizers().step()
    module.ema.update(network)
    changed = {name for name, value in network.state_dict().items() if (value != before[name]).any()}
    assert changed
    assert all(name.startswith("control.") for name in changed)
    assert module.ema.module.denoiser is network.denoiser
    assert module.ema.module.control is not network.control
    kept = {name.removeprefix("network.") for name in module.state_dict() if name.startswith("network.")}
    assert kept == {f"control.{name}" for name in network.control.state_dict()}


def test_the_control_is_given_while_all_else_is_hidden():
    _, made = controlled_model()
    conditioners = made.network.conditioners
    condition = made.encode_condition([{"age": 70.0, "sex": "F"}], {"mask": [np.eye(8)]})
    dropped = conditioners.drop(condition, torch.zeros(1, conditioners.num_uniforms))
    assert dropped["covariates"].isnan().all()
    assert (dropped["text"] == -1).all()
    assert (dropped["mask"] == condition["mask"]).all()


def test_guidance_compares_with_the_frozen_model():
    base, made = controlled_model()
    awake(made.network.control)
    condition = made.encode_condition([{"age": 50.0, "sex": "F"}] * 2, {"mask": [np.eye(8)] * 2})
    step = next(iter(made.schedule.grid(3)))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (whole,), (alone,) = (one.denoise_many(x, step, [condition]) for one in (made, base))
        found = made.guided_denoise(condition, SamplingOptions(guidance_scale={"mask": 2.5}))(x, step)
    assert (whole.eps - alone.eps).abs().max() > 1e-4
    torch.testing.assert_close(found.eps, whole.eps + 1.5 * (whole.eps - alone.eps), rtol=1e-3, atol=1e-3)


def test_a_model_without_learned_nulls_can_be_guided_by_its_control():
    _, made = controlled_model(learned_null=False)
    condition = made.encode_condition([{"age": 50.0, "sex": "F"}], {"mask": [np.eye(8)]})
    made.guided_denoise(condition, SamplingOptions(guidance_scale={"mask": 2.0}))
    with pytest.raises(Exception, match="never learned to go without its covariates"):
        made.guided_denoise(condition, SamplingOptions(guidance_scale={"age": 2.0, "mask": 2.0}))


def test_one_file_is_enough_and_holds_the_frozen_model_once(tmp_path):
    base, made = controlled_model()
    awake(made.network.control)
    made.save(tmp_path / "m.safetensors")
    base.save(tmp_path / "base.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file, safe_open(tmp_path / "base.safetensors", "pt") as other:
        added = set(file.keys()) - set(other.keys())
        assert not set(other.keys()) - set(file.keys())
    assert added == {f"network.control.{name}" for name in made.network.control.state_dict()}
    again = LatentDiffusionModel.load(tmp_path / "m.safetensors")
    mask, row = np.eye(8, dtype=np.uint8), {"age": 50.0}
    first, second = (one.sample(row, mask=mask, n=2, **OPTIONS).images for one in (made, again))
    assert (first == second).all()
    without, alone = (one.sample(row, n=2, **OPTIONS).images for one in (again, base))
    assert (without == alone).all()
    assert np.abs(first - alone).max() > 1e-4
