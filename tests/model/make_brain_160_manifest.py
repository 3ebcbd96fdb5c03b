"""Names and shapes of the released brain model's parameters, from MONAI's own classes; nothing of ours is imported.

    python tests/model/make_brain_160_manifest.py > tests/model/brain_160_manifest.json

The arguments are those of the bundle's ``configs/inference.json`` (``brain_image_synthesis_latent_diffusion_model``).
"""

import json

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet


def manifest() -> dict[str, dict[str, list[int]]]:
    """``{network: {parameter: shape}}``."""
    with torch.device("meta"):
        networks = {
            "autoencoder": AutoencoderKL(
                spatial_dims=3,
                in_channels=1,
                out_channels=1,
                latent_channels=3,
                channels=(64, 128, 128, 128),
                num_res_blocks=2,
                norm_num_groups=32,
                norm_eps=1e-6,
                attention_levels=(False, False, False, False),
                with_encoder_nonlocal_attn=False,
                with_decoder_nonlocal_attn=False,
            ),
            "diffusion": DiffusionModelUNet(
                spatial_dims=3,
                in_channels=7,
                out_channels=3,
                channels=(256, 512, 768),
                num_res_blocks=2,
                attention_levels=(False, True, True),
                norm_num_groups=32,
                norm_eps=1e-6,
                resblock_updown=True,
                num_head_channels=(0, 512, 768),
                with_conditioning=True,
                transformer_num_layers=1,
                cross_attention_dim=4,
                upcast_attention=True,
            ),
        }
    return {
        name: {key: list(value.shape) for key, value in sorted(network.state_dict().items())}
        for name, network in networks.items()
    }


def text() -> str:
    """The manifest as JSON, one parameter a line."""
    parts = []
    for name, shapes in manifest().items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in shapes.items())
        parts.append(f'"{name}": {{\n{lines}\n}}')
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    print(text())
