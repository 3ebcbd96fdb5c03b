"""Weights of MONAI's own networks become a model of ours that draws the same images."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler

from ldm.diffusion import noise
from ldm.errors import LdmError
from ldm.model.file import read_header
from ldm.model.import_weights import old_name, read_state_dict, with_new_names
from ldm.model.latent_diffusion import LatentDiffusionModel, SamplingOptions
from tests.model.make_brain_160_manifest import manifest

EXPERIMENT = "experiment=brain_160/released"
#: the released model in small: 16 x 24 x 16 voxels, latents of 3 x 4 x 6 x 4
SMALL = (
    EXPERIMENT,
    "data.shape=[16,24,16]",
    "vae.network={channels: [8, 16, 16], num_res_blocks: 1, attention_levels: [false, false, false]}",
    "vae.network.norm_num_groups=8",
    "ldm.network={channels: [16, 32], num_res_blocks: 1, attention_levels: [false, true], num_head_channels: [0, 32]}",
    "ldm.network.norm_num_groups=16",
)
ASKED = {"sex": "M", "age": 70, "ventricles_mm3": 60000, "brain_normalised_mm3": 1.5e6}
#: by hand: male is 1; (70 - 44) / (82 - 44); the volumes within their published ranges
CODES = [1.0, 26 / 38, (60000 - 6995.68) / (171375 - 6995.68), (1.5e6 - 1144240) / (1793910 - 1144240)]


def monai_networks():
    """MONAI's networks with the sizes of SMALL, every parameter random (some start at zero)."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        channels=(8, 16, 16),
        num_res_blocks=1,
        attention_levels=(False, False, False),
        latent_channels=3,
        norm_num_groups=8,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    unet = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=7,
        out_channels=3,
        channels=(16, 32),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=(0, 32),
        norm_num_groups=16,
        resblock_updown=True,
        with_conditioning=True,
        transformer_num_layers=1,
        cross_attention_dim=4,
    )
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return autoencoder.eval(), unet.eval()


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """State dicts of MONAI's networks, under today's names and plain."""
    paths = {}
    for name, network in zip(("autoencoder", "diffusion"), monai_networks(), strict=True):
        paths[name] = tmp_path / f"{name}.pt"
        torch.save(network.state_dict(), paths[name])
    return paths


def run_import(ldm, files, *overrides):
    given = [f"{name}={path}" for name, path in files.items()]
    return ldm("import-weights", *SMALL, *given, "out=model.safetensors", *overrides)


def as_old(tensors):
    return {old_name(name): value for name, value in tensors.items()}


@torch.no_grad()
def monai_sample(autoencoder, unet, x, steps):
    """The released sampler's loop, by hand: DDIM of MONAI Generative, whose times are multiples of T // steps."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        schedule="scaled_linear_beta",
        beta_start=0.0015,
        beta_end=0.0205,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    codes = torch.tensor([CODES], dtype=torch.float32)  # (1, 4)
    planes = codes[..., None, None, None].expand(1, 4, *x.shape[2:])
    for t in reversed(range(0, 1000, 1000 // steps)):
        eps = unet(torch.cat([x, planes], dim=1), torch.tensor([t]), context=codes[:, None])
        x, _ = scheduler.step(eps, t, x)
    return x, autoencoder.decode_stage_2_outputs(x)


@pytest.mark.parametrize("names", ["new", "old"])
def test_an_imported_model_draws_what_monai_draws(ldm, files, tmp_path, names):
    if names == "old":
        for path in files.values():
            torch.save({"state_dict": as_old(torch.load(path))}, path)
    code, text = run_import(ldm, files)
    assert not code, text
    model = LatentDiffusionModel.load(tmp_path / "model.safetensors")
    x = noise.draw(noise.generators(seed=3, indices=[0]), (3, 4, 6, 4))  # (1, 3, 4, 6, 4)
    latent, image = monai_sample(*monai_networks(), x, steps=5)

    settings = SamplingOptions(**{**vars(model.defaults), "num_inference_steps": 5})
    ours = model.sample_latents(model.encode_condition([ASKED]), 3, [0], settings)
    torch.testing.assert_close(ours, latent, rtol=1e-3, atol=1e-3 * float(latent.abs().max()))
    torch.testing.assert_close(model.first_stage.decode(latent).detach(), image, rtol=1e-4, atol=1e-4)

    drawn = model.sample(ASKED, n=1, seed=3, num_inference_steps=5, precision="float32").images
    assert drawn.shape == (1, 1, 16, 24, 16)
    np.testing.assert_allclose(drawn, image.clamp(0, 1).numpy(), atol=5e-3)
    assert np.mean((drawn > 0) & (drawn < 1)) > 0.1  # not all of it is cut off


def test_every_covariate_has_to_be_asked_for(ldm, files, tmp_path):
    assert run_import(ldm, files)[0] == 0
    model = LatentDiffusionModel.load(tmp_path / "model.safetensors")
    with pytest.raises(LdmError, match="go without sex, brain_normalised_mm3: ask"):
        model.sample({"age": 70, "ventricles_mm3": 60000}, n=1, num_inference_steps=1)
    with pytest.raises(LdmError, match="guidance_scale is 2"):
        model.sample(ASKED, n=1, num_inference_steps=1, guidance_scale=2)
    code, text = ldm("sample", "model=model.safetensors", "n=1", "steps=1", "out=out")
    assert code
    assert "never learned to go without" in text


def test_samples_are_written_on_the_template_s_grid(ldm, files, tmp_path):
    import nibabel as nib

    assert run_import(ldm, files)[0] == 0
    rows = "covariates={sex: F, age: 60, ventricles_mm3: 30000, brain_normalised_mm3: 1.5e6}"
    code, text = ldm("sample", "model=model.safetensors", rows, "n=1", "steps=2", "out=out")
    assert not code, text
    image = nib.load(next((tmp_path / "out").glob("*.nii.gz")))
    assert image.shape == (16, 24, 16)
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    assert image.header["sform_code"] == 4
    np.testing.assert_allclose(image.affine @ [7.5, 11.5, 7.5, 1], [-0.5, -17.5, 18.5, 1])


def test_the_file_says_what_was_imported(ldm, files, tmp_path):
    assert run_import(ldm, files, "origin_mm=[1,2,3]")[0] == 0
    header = read_header(tmp_path / "model.safetensors", "latent_diffusion")
    assert header["imported"]["diffusion"]["file"] == "diffusion.pt"
    assert header["sampling"]["timestep_spacing"] == "leading"
    assert [row[3] for row in header["preprocessing"]["reference"]["original_affine"][:3]] == [1, 2, 3]
    code, text = run_import(ldm, files)
    assert code
    assert "There is a model at model.safetensors already" in text


def test_misfits_are_named(ldm, files, tmp_path):
    tensors = torch.load(files["diffusion"])
    tensors["conv_in.conv.wieght"] = tensors.pop("conv_in.conv.weight")
    tensors["time_embed.0.bias"] = torch.zeros(3)
    torch.save(tensors, files["diffusion"])
    code, text = run_import(ldm, files)
    assert code
    assert "missing: conv_in.conv.weight (16, 7, 3, 3, 3) Did you mean 'conv_in.conv.wieght'?" in text
    assert "unexpected: conv_in.conv.wieght" in text
    assert "shape: time_embed.0.bias is (3,) in the file, (64,) in the network" in text
    assert not (tmp_path / "model.safetensors").exists()


def test_a_mode_with_weights_of_its_own_is_refused(ldm, files):
    code, text = run_import(ldm, files, "ldm.condition.mode=adaptive_norm")
    assert code
    assert "ldm.condition.mode 'adaptive_norm' has weights of its own" in text


class Hostile:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_hostile_file_is_not_executed(ldm, files, tmp_path, protocol):
    content = {"state_dict": torch.load(files["diffusion"]), "hook": Hostile(tmp_path / "trace")}
    if protocol == "torch":
        torch.save(content, files["diffusion"])
    else:
        files["diffusion"].write_bytes(pickle.dumps(content))
    code, text = run_import(ldm, files)
    assert code
    assert "is not a file of plain tensors" in text
    assert not (tmp_path / "trace").exists()
    if protocol == "torch":  # the trap works
        torch.load(files["diffusion"], weights_only=False)["hook"].close()
    else:
        pickle.loads(files["diffusion"].read_bytes())["hook"].close()
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1, 2], "holds a list and no state dict"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "not tensors: epoch"),
        ({"model": {}}, "no state dict"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, expected):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(LdmError, match=expected):
        read_state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize("attention", ["self", "transformer"])
def test_old_names_are_those_that_monai_reads(attention):
    """MONAI's own loader of old state dicts takes ours apart and gets the same tensors out."""
    conditioned = attention == "transformer"
    networks = [
        DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(8, 16),
            num_res_blocks=1,
            attention_levels=(True, True),
            num_head_channels=8,
            norm_num_groups=8,
            with_conditioning=conditioned,
            cross_attention_dim=3 if conditioned else None,
        ),
        AutoencoderKL(
            spatial_dims=2, channels=(8, 16), num_res_blocks=1, attention_levels=(False, True), norm_num_groups=8
        ),
    ]
    for network in networks:
        wanted = {name: value.clone() for name, value in network.state_dict().items()}
        old = as_old(wanted)
        assert old.keys() != wanted.keys()
        new = with_new_names(old, wanted)
        assert new.keys() == wanted.keys()
        assert all(new[name] is wanted[name] for name in wanted)
        for parameter in network.parameters():
            torch.nn.init.zeros_(parameter)
        network.load_old_state_dict(dict(old))
        loaded = network.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


def test_the_manifest_is_what_monai_builds_today():
    committed = json.loads((Path(__file__).parent / "brain_160_manifest.json").read_text())
    assert committed == manifest()


def test_an_imported_model_is_not_evaluated_on_subjects_it_may_have_seen(ldm, files):
    code, text = run_import(ldm, files)
    assert not code, text
    code, text = ldm("evaluate", *SMALL, "model=model.safetensors")
    assert code
    assert "was imported" in text
    assert "ldm evaluate real=DIR synthetic=DIR" in text
