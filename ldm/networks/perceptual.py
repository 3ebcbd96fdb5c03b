"""Perceptual distance in the features of a residual network whose weights lie in a local file."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.networks import nets
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import LdmError, nearest

BACKBONES = ("resnet10", "resnet18", "resnet34", "resnet50")


def load_resnet(
    spatial_dims: int, weights: str | Path, backbone: str, weights_key: str, backbone_key: str, otherwise: str
) -> nn.Module:
    """A MONAI ResNet for one-channel images with the weights of a local file, frozen; nothing is downloaded.

    The published MedicalNet weights (3-D) fit these networks.

    Args:
        spatial_dims: 2 or 3.
        weights: a ``.safetensors`` file, or a ``.pth`` file that ``weights_only`` loading accepts.
        backbone: one of resnet10, resnet18, resnet34, resnet50.
        weights_key, backbone_key: settings that errors name.
        otherwise: how to do without weights.

    Raises:
        LdmError: no such file, or its tensors do not fit the backbone.
    """
    if backbone not in BACKBONES:
        raise LdmError(
            f"{backbone_key} '{backbone}' is unknown; legal: {', '.join(BACKBONES)}.{nearest(backbone, BACKBONES)}"
        )
    path = Path(weights)
    if not path.is_file():
        raise LdmError(
            f"{weights_key}: there is no file {path}. Give the weights of a {backbone} as a local file, or {otherwise}."
        )
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    shortcut = "A" if backbone in ("resnet18", "resnet34") else "B"  # MedicalNet's choice
    net = getattr(nets, backbone)(
        spatial_dims=spatial_dims, n_input_channels=1, shortcut_type=shortcut, bias_downsample=shortcut == "A"
    )
    wanted = {name for name in net.state_dict() if not name.startswith("fc.")}
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise LdmError(f"{path} does not hold a {spatial_dims}-D {backbone}: {missing[0]} and others are missing.")
    net.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    return net.requires_grad_(False).eval()


def levels(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Features of every level of ``load_resnet``'s network, of images ``(B, 1, *S)`` standardised per image."""
    axes = tuple(range(1, x.ndim))
    x = (x - x.mean(axes, keepdim=True)) / (x.std(axes, keepdim=True) + 1e-6)
    x = net.maxpool(net.act(net.bn1(net.conv1(x))))
    features = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        features.append(x)
    return features


class PerceptualLoss(nn.Module):
    """Mean squared distance of channel-normalised features over a MONAI ResNet's levels (Zhang et al. 2018, eq. 1).

    Args:
        spatial_dims, weights, backbone: see :func:`load_resnet`.

    Raises:
        LdmError: no such file, or its tensors do not fit the backbone.
    """

    def __init__(self, spatial_dims: int, weights: str, backbone: str = "resnet10") -> None:
        super().__init__()
        keys = ("vae.loss.perceptual_weights", "vae.loss.perceptual_backbone")
        self.net = load_resnet(spatial_dims, weights, backbone, *keys, otherwise="set vae.loss.perceptual_weight=0")

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Frozen: always in eval mode."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length features of every level of images ``(B, 1, *S)`` standardised per image."""
        return [F.normalize(level, dim=1) for level in levels(self.net, x)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two batches ``(B, C, *S)``; channels are compared one by one."""
        x, y = x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None]  # (B C, 1, *S)
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
