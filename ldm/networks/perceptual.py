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


class PerceptualLoss(nn.Module):
    """Mean squared distance of channel-normalised features over a MONAI ResNet's levels (Zhang et al. 2018, eq. 1).

    The published MedicalNet weights (3-D, one channel) fit these networks. Nothing is downloaded.

    Args:
        spatial_dims: 2 or 3.
        weights: a local ``.safetensors`` file, or a ``.pth`` file that ``weights_only`` loading accepts.
        backbone: one of resnet10, resnet18, resnet34, resnet50.

    Raises:
        LdmError: no such file, or its tensors do not fit the backbone.
    """

    def __init__(self, spatial_dims: int, weights: str, backbone: str = "resnet10") -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise LdmError(
                f"vae.loss.perceptual_backbone '{backbone}' is unknown; legal: {', '.join(BACKBONES)}."
                f"{nearest(backbone, BACKBONES)}"
            )
        path = Path(weights)
        if not path.is_file():
            raise LdmError(
                f"vae.loss.perceptual_weights: there is no file {path}. Give the weights of a {backbone} as a local "
                "file, or set vae.loss.perceptual_weight=0."
            )
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        shortcut = "A" if backbone in ("resnet18", "resnet34") else "B"  # MedicalNet's choice
        self.net = getattr(nets, backbone)(
            spatial_dims=spatial_dims,
            n_input_channels=1,
            shortcut_type=shortcut,
            bias_downsample=shortcut == "A",
        )
        wanted = {name for name in self.net.state_dict() if not name.startswith("fc.")}
        missing = sorted(wanted - tensors.keys())
        if missing:
            raise LdmError(f"{path} does not hold a {spatial_dims}-D {backbone}: {missing[0]} and others are missing.")
        self.net.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Frozen: always in eval mode."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length features of every level of images ``(B, 1, *S)`` standardised per image."""
        axes = tuple(range(1, x.ndim))
        x = (x - x.mean(axes, keepdim=True)) / (x.std(axes, keepdim=True) + 1e-6)
        x = self.net.maxpool(self.net.act(self.net.bn1(self.net.conv1(x))))
        levels = []
        for layer in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            x = layer(x)
            levels.append(F.normalize(x, dim=1))
        return levels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of two batches ``(B, C, *S)``; channels are compared one by one."""
        x, y = x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None]  # (B C, 1, *S)
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
