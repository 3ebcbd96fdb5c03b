"""Feature networks that were trained on photographs: Inception-v3 and DINOv2, for pictures and for slices of volumes.

Both take 8-bit RGB pictures. What becomes of an image of another kind is decided here, once for both, and is said in
the ``identity`` of the network. Weights are local files; nothing is downloaded and nothing in a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError
from ldm.model.file import tensors_hash
from ldm.model.import_weights import read_state_dict
from ldm.networks.inception import Inception
from ldm.networks.tensors import differences

SLICES = 3  # of each axis of a volume
PLANES = f"{SLICES} slices across each axis, at 1/4, 1/2 and 3/4 of it; the mean of their features"

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a folder in the layout of Hugging Face
# What of config.json describes the network. The rest is left unread: it could name code or files elsewhere.
ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "use_swiglu_ffn",
    "use_mask_token",
)
SIDE = 224  # pixels, what DINOv2 is shown
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PictureFeatures:
    """Features that a network for 8-bit RGB pictures has of images of any kind, ``(B, C, *S)``.

    The shown range of the images is spread over 0..255 and rounded, as in a file of a picture. An RGB picture is taken
    as it is; each channel of any other image alone, as a grey picture, and the features of all channels stand side by
    side. A volume is shown by :data:`PLANES`.

    Args:
        network: ``(N, 3, H, W)`` uint8 -> ``(N, F)``, with ``kind``, ``resize`` and ``trained_on``.
        path: where its weights come from.
        preprocessing: of the images.
    """

    preprocessing = None

    def __init__(self, network: nn.Module, path: str | Path, preprocessing: Preprocessing) -> None:
        self.network, self.is_rgb = network, preprocessing.is_rgb
        self.value_range = preprocessing.shown_range
        self.identity = {
            "name": str(path),
            "sha256": tensors_hash(network.state_dict()),
            "kind": network.kind,
            "spatial_dims": preprocessing.spatial_dims,
            "trained_on": network.trained_on,
            "shown": f"{self.value_range[0]:g} to {self.value_range[1]:g} as 0 to 255, rounded; "
            + ("red, green and blue" if self.is_rgb else "each channel alone, in grey"),
            "resize": network.resize,
            "planes": PLANES if preprocessing.spatial_dims == 3 else "the picture itself",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, F)`` of an RGB picture, else ``(B, C F)``."""
        device = next(self.network.parameters()).device
        pictures = to_bytes(images.to(device), self.value_range)  # (B, C, *S)
        if self.is_rgb:
            return self.network(pictures)
        # The mean over slices: a volume stays one point with as many features as a picture, and they are many already.
        features = torch.cat([self._of_slices(slices) for slices in slices_of(pictures)], 2)  # (B, C, slices, F)
        return features.mean(2).flatten(1)  # (B, C F)

    def _of_slices(self, slices: Tensor) -> Tensor:
        """``(B, C, K, H, W)`` -> ``(B, C, K, F)``."""
        grey = slices.flatten(0, 2)[:, None].expand(-1, 3, -1, -1)  # (B C K, 3, H, W)
        return self.network(grey).unflatten(0, slices.shape[:3])


def to_bytes(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Images of any shape as uint8, ``value_range`` spread over 0..255."""
    low, high = value_range
    return ((images.float() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def slices_of(images: Tensor) -> list[Tensor]:
    """Pictures ``(B, C, H, W)`` as they are, or slices of volumes across each axis: ``(B, C, K, H, W)`` each."""
    if images.ndim == 4:
        return [images[:, :, None]]
    slices = []
    for axis in (2, 3, 4):
        at = [images.shape[axis] * (k + 1) // (SLICES + 1) for k in range(SLICES)]
        slices.append(images.index_select(axis, torch.tensor(at, device=images.device)).movedim(axis, 2))
    return slices


def load_inception(path: str | Path) -> nn.Module:
    """Inception-v3 with the weights of a local file, frozen; see :mod:`ldm.networks.inception`.

    Raises:
        LdmError: the file holds anything but tensors, or not those of this network.
    """
    net = Inception()
    own = net.state_dict()
    # The classifier behind the features, and a counter of training steps that some copies lack, are of no use here.
    tensors = {name: tensor for name, tensor in read_state_dict(path).items() if not name.startswith("fc.")}
    tensors |= {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    faults = differences(own, tensors)
    if faults:
        shown = "\n  ".join(faults)
        raise LdmError(f"features.path={path}: is not the Inception-v3 of the FID literature:\n  {shown}")
    net.load_state_dict(tensors)
    net.kind, net.resize = "inception", "299 x 299, bilinear as in TensorFlow 1"
    net.trained_on = "photographs of ImageNet (Inception-v3 of 2015-12-05), if these are its weights"
    return net.requires_grad_(False).eval()


class Dinov2(nn.Module):
    """The CLS token of a DINOv2 (Oquab et al. 2024), which ranks images as people do (Stein et al. 2023).

    Args:
        folder: ``config.json`` and ``model.safetensors`` as on Hugging Face.

    Raises:
        LdmError: the package ``transformers`` is not installed, or the folder does not hold a DINOv2.
    """

    kind = "dinov2"
    resize = f"{SIDE} x {SIDE}, bicubic with antialiasing"
    trained_on = "142 million photographs (DINOv2), if these are its weights"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.model = load_dinov2(Path(folder))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """``(B, 3, H, W)`` uint8 -> ``(B, hidden_size)`` float32."""
        x = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
        x = (x.clamp(0, 255) / 255 - self.mean) / self.std  # bicubic overshoots
        return self.model(pixel_values=x).last_hidden_state[:, 0]


def load_dinov2(folder: Path) -> nn.Module:
    """The network of a folder, in float32, frozen.

    Raises:
        LdmError: see :class:`Dinov2`.
    """
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise LdmError(
            f"features.kind=dinov2 needs the package transformers: pip install -e '.[features]' ({error})."
        ) from error
    architecture = _architecture(folder / CONFIG)
    try:
        config = Dinov2Config(**architecture)
        model, found = Dinov2Model.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types for files that are broken or of another network
        raise LdmError(f"features.path={folder}: cannot be read as a DINOv2 ({error}).") from error
    for fault, names in (("lacks", found["missing_keys"]), ("has, unlike its " + CONFIG, found["unexpected_keys"])):
        if names:
            raise LdmError(f"features.path={folder}: {WEIGHTS} {fault}: {', '.join(sorted(names)[:3])}.")
    return model.float().requires_grad_(False).eval()


def _architecture(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LdmError(f"features.path={path.parent}: {CONFIG} cannot be read ({error}).") from error
    kind = content.get("model_type") if isinstance(content, Mapping) else None
    if kind != "dinov2" or content.get("num_channels", 3) != 3:
        raise LdmError(f"features.path={path.parent}: {CONFIG} describes '{kind}'; legal: a dinov2 of 3 channels.")
    return {name: content[name] for name in ARCHITECTURE if name in content}


LOADERS: dict[str, Callable[[str | Path], nn.Module]] = {"inception": load_inception, "dinov2": Dinov2}


def weights_file(kind: str, path: str | Path) -> Path:
    """The file that has to be there for ``features.path``, which is a folder for a DINOv2."""
    return Path(path) / WEIGHTS if kind == "dinov2" else Path(path)


def load_picture_features(
    kind: str, path: str | Path, device: str | torch.device, preprocessing: Preprocessing | None
) -> PictureFeatures:
    """Features of a kind of :data:`LOADERS`, of images that were prepared by ``preprocessing``.

    Raises:
        LdmError: it is not known how images are prepared, or see :func:`load_inception` and :class:`Dinov2`.
    """
    if preprocessing is None:
        raise LdmError(
            f"features.kind '{kind}' does not say how files become images; to compare folders take "
            "features.kind=predictor, which does."
        )
    return PictureFeatures(LOADERS[kind](path).to(device), path, preprocessing)
