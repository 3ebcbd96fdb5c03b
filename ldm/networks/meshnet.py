"""MeshNet (Fedorov et al. 2017): few channels, no pooling, and dilated convolutions that see far all the same.

A file pair holds one: ``NAME.npz``, the plain arrays ``....weight`` (and ``....bias``) in the order of the layers, and
``NAME.json``, what brainchop (Masoud et al. 2023) writes beside its models: ``layers``, each with ``in_channels``,
``out_channels``, ``kernel_size``, ``padding``, ``dilation`` and ``stride``; ``elu`` or ``gelu`` where it is not ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.stored import READ_ERRORS, cause
from ldm.errors import LdmError
from ldm.files import read_json
from ldm.networks.frozen import freeze

ACTIVATIONS = {"relu": F.relu_, "elu": F.elu_, "gelu": F.gelu}  # in place where there is such a one
WEIGHT, BIAS = ".weight", ".bias"


class MeshNet(nn.Module):
    """Convolutions with an activation after each but the last, all at the resolution of the image.

    Args:
        layers: ``in_channels``, ``out_channels``, ``kernel_size`` and ``dilation`` of each.
        activation: ``relu``, ``elu`` or ``gelu``.
    """

    def __init__(self, layers: Sequence[Mapping[str, int]], activation: str = "relu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(
            nn.Conv3d(
                layer["in_channels"],
                layer["out_channels"],
                layer["kernel_size"],
                padding=layer["kernel_size"] // 2 * layer["dilation"],
                dilation=layer["dilation"],
            )
            for layer in layers
        )

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return self.layers[-1].out_channels

    def forward(self, x: Tensor, outside: float | None = None) -> Tensor:
        """``(B, 1, D, H, W)`` -> class scores ``(B, K, D, H, W)``.

        Args:
            x: image.
            outside: its value beyond its borders, which every layer then continues without end: a part of an image is
                segmented as within the whole, if all around it is constant. None pads every layer with 0.
        """
        x = x.clone()  # the rest works in place: a volume with all its channels fills gigabytes
        beyond = None if outside is None else x.new_full((1,), outside)  # (C,), what each channel is out there
        for number, layer in enumerate(self.layers, 1):
            x, beyond = _convolved(layer, x, beyond)
            if number < len(self.layers):
                x = self.activation(x)  # (B, C, D, H, W)
                beyond = None if beyond is None else self.activation(beyond)
        return x


def _convolved(layer: nn.Conv3d, x: Tensor, beyond: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``layer`` of ``x``, which changes, and of what is beyond it; as it is linear, their difference can be padded."""
    if beyond is None:
        return layer(x), None
    constant = layer.weight.sum((2, 3, 4)) @ beyond  # (C',)
    constant = constant if layer.bias is None else constant + layer.bias
    x.sub_(beyond[:, None, None, None])  # (B, C, D, H, W), 0 far out
    return F.conv3d(x, layer.weight, constant, padding=layer.padding, dilation=layer.dilation), constant


def meshnet_files(path: str | Path) -> tuple[Path, Path]:
    """Arrays and layer list of the pair that ``path``, the name of either or without a suffix, stands for."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".npz", ".json") else path
    return stem.with_name(f"{stem.name}.npz"), stem.with_name(f"{stem.name}.json")


def load_meshnet(path: str | Path) -> MeshNet:
    """The frozen network of a file pair; nothing is unpickled.

    Raises:
        LdmError: a file is missing or damaged, or they do not describe one network; says what does not fit.
    """
    arrays_path, layers_path = meshnet_files(path)
    description = read_json(layers_path, "the layer list of a MeshNet")
    weights = _read_weights(arrays_path)
    layers = _checked_layers(description, layers_path)
    if len(layers) != len(weights):
        raise LdmError(f"{layers_path} lists {len(layers)} layers, but {arrays_path} has weights of {len(weights)}.")
    activation = next((name for name in ("elu", "gelu") if description.get(name)), "relu")
    network = MeshNet(layers, activation)
    for layer, (name, weight, bias) in zip(network.layers, weights, strict=True):
        if layer.weight.shape != weight.shape or (bias is not None and bias.shape != weight.shape[:1]):
            raise LdmError(f"{arrays_path}: {name} has shape {tuple(weight.shape)}, not {tuple(layer.weight.shape)}.")
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)
    # twice as fast on a CPU, where these few channels do not fill what oneDNN works on at once
    return freeze(network.to(memory_format=torch.channels_last_3d))


def _read_weights(path: Path) -> list[tuple[str, Tensor, Tensor | None]]:
    """Name, weight ``(C', C, k, k, k)`` and bias ``(C',)`` of each layer, in the order of the numbers in the names."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: torch.from_numpy(archive[name].astype(np.float32)) for name in archive.files}
    except READ_ERRORS + (AttributeError,) as error:  # the last: an .npy under this name is no archive
        raise LdmError(f"{path} cannot be read as the arrays of a MeshNet ({cause(error)}).") from error
    names = sorted((name for name in arrays if name.endswith(WEIGHT)), key=_numbers)
    return [(name, arrays[name], arrays.get(name.removesuffix(WEIGHT) + BIAS)) for name in names]


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _checked_layers(description: Mapping[str, Any], path: Path) -> list[Mapping[str, int]]:
    """The layers of ``description``, unless they are of another kind of network."""
    if description.get("bnorm"):
        raise LdmError(f"{path}: bnorm is true; legal: networks without normalisation.")
    layers = description.get("layers")
    if not isinstance(layers, list) or not layers:
        raise LdmError(f"{path}: layers is {layers!r}; it has to list the convolutions.")
    for number, layer in enumerate(layers):
        try:
            kernel, dilation, padding = (layer[key] for key in ("kernel_size", "dilation", "padding"))
            legal = kernel % 2 == 1 and layer.get("stride", 1) == 1 and padding == kernel // 2 * dilation
            channels = [layer[key] for key in ("in_channels", "out_channels")]
        except (KeyError, TypeError, AttributeError) as error:
            raise LdmError(f"{path}: layer {number} is {layer!r}; {cause(error)} is missing or no number.") from error
        if not legal or channels != [size for size in channels if isinstance(size, int) and size > 0]:
            raise LdmError(
                f"{path}: layer {number} is {layer}; legal: odd kernel_size, padding of half of it times dilation, "
                "stride 1, at least one channel in and out."
            )
    if layers[0]["in_channels"] != 1:
        raise LdmError(f"{path}: takes {layers[0]['in_channels']} channels; legal: 1, a T1-weighted image.")
    return layers
