"""Feature networks, in whose features distributions of images are compared."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.preprocessing import Preprocessing
from ldm.errors import LdmError, nearest
from ldm.evaluation.picture_features import LOADERS, load_picture_features, weights_file
from ldm.model.file import tensors_hash
from ldm.model.predictor import Predictor
from ldm.networks.perceptual import levels, load_resnet

logger = logging.getLogger(__name__)

KINDS = ("predictor", "medicalnet", *LOADERS)
REMEDIES = {
    "predictor": "Train one with `ldm train-predictor`, for the same data",
    "medicalnet": "Download the MedicalNet weights",
    "inception": "Download pt_inception-2015-12-05-6726825d.pth, the weights of the FID literature",
    "dinov2": "Download config.json and model.safetensors of a DINOv2, e.g. dinov2-large, into one folder",
}
KEYS = ("kind", "path", "backbone")


class FeatureNetwork(Protocol):
    """What turns images into features.

    Attributes:
        identity: ``name``, ``sha256`` (of the tensors), ``kind``, ``spatial_dims``, ``trained_on``; goes beside every
            number that is measured with it. Networks for pictures add ``shown``, ``resize`` and ``planes``.
        preprocessing: how files become its input; None for a network that takes images however they were prepared.
    """

    identity: dict[str, Any]
    preprocessing: Preprocessing | None

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, F)`` of images ``(B, C, *S)`` in the model's value range."""


def find_features(
    config: Mapping[str, Any], device: str | torch.device = "cpu", preprocessing: Preprocessing | None = None
) -> FeatureNetwork | None:
    """The network that a ``features`` section describes.

    Args:
        config: ``{kind: predictor, path: model.safetensors}`` (``ldm train-predictor``), or ``{kind: medicalnet, path:
            weights, backbone: resnet10}``, ``{kind: inception, path: weights}``, ``{kind: dinov2, path: folder}``.
        device: where it computes.
        preprocessing: of the images; inception and dinov2 have to know their value range and whether they are RGB.

    Returns:
        None, with a warning that says what to run, when there is no such file.

    Raises:
        LdmError: an unknown kind or key, or a file that is not what it should be.
    """
    if not config:
        return None
    for key in config:
        if key not in KEYS:
            raise LdmError(f"features.{key} is not a setting.{nearest(key, KEYS)} Legal: {', '.join(KEYS)}.")
    kind, path = config.get("kind"), config.get("path")
    if kind not in KINDS:
        raise LdmError(f"features.kind '{kind}' is unknown; legal: {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
    if path is None or not weights_file(kind, path).is_file():
        logger.warning("There are no feature weights %s: distances are left out. %s.", path, REMEDIES[kind])
        return None
    if kind in LOADERS:
        return load_picture_features(kind, path, device, preprocessing)
    if kind == "predictor":
        return PredictorFeatures(path, device)
    return MedicalNetFeatures(path, config.get("backbone") or "resnet10", device)


class PredictorFeatures:
    """Pooled features of a network that was trained to predict a cohort's covariates.

    Args:
        path: ``model.safetensors`` of ``ldm train-predictor``.
        device: where it computes.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.predictor = Predictor.load(path, device)
        self.preprocessing = self.predictor.preprocessing
        facts = self.predictor.facts
        self.identity = {
            "name": str(path),
            "sha256": self.predictor.sha256,
            "kind": "predictor",
            "spatial_dims": self.preprocessing.spatial_dims,
            "trained_on": {
                "cohort": facts.get("cohort"),
                "split": "train",
                "split_sha256": facts.get("split_sha256"),
                "targets": list(self.predictor.targets.schema.names),
            },
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, F)`` of preprocessed images ``(B, C, *S)``."""
        return self.predictor.features(images)


class MedicalNetFeatures:
    """Last level of a 3-D residual network with published weights (Chen et al. 2019), averaged over space.

    Each channel of each image is standardised, and taken alone; the features of all channels stand side by side.

    Args:
        path: weights, ``.pth`` or ``.safetensors``.
        backbone: which network they are of.
        device: where it computes.
    """

    preprocessing = None

    def __init__(self, path: str | Path, backbone: str = "resnet10", device: str | torch.device = "cpu") -> None:
        keys = ("features.path", "features.backbone")
        self.net = load_resnet(3, path, backbone, *keys, otherwise="set features.kind=predictor").to(device)
        self.identity = {
            "name": str(path),
            "backbone": backbone,
            "sha256": tensors_hash({k: v for k, v in self.net.state_dict().items() if not k.startswith("fc.")}),
            "kind": "medicalnet",
            "spatial_dims": 3,
            "trained_on": "23 segmentation sets of CT and MR (MedicalNet), if these are its weights",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, C F)`` of images ``(B, C, D, H, W)``."""
        device = next(self.net.parameters()).device
        channels = images.to(device, torch.float32).flatten(0, 1)[:, None]  # (B C, 1, D, H, W)
        *_, last = levels(self.net, channels)  # (B C, F, D / 8, ...)
        return last.flatten(2).mean(2).unflatten(0, images.shape[:2]).flatten(1)  # (B, C F)


def check_features(network: FeatureNetwork, preprocessing: Preprocessing, cohort: str, split_sha256: str) -> None:
    """Refuse a network that was made for other images, or whose training subjects could be held out here.

    Raises:
        LdmError: it was trained on images that were prepared otherwise, or on another split of the same cohort.
    """
    name, dims = network.identity["name"], network.identity["spatial_dims"]
    if dims != preprocessing.spatial_dims:
        raise LdmError(f"features.path={name}: is for {dims}-D images, these are {preprocessing.spatial_dims}-D.")
    if network.preprocessing is not None:
        ours, theirs = preprocessing.to_dict(), network.preprocessing.to_dict()
        parts = ("orientation", "spacing", "shape", "intensity", "channels")
        differing = [part for part in parts if ours[part] != theirs[part]]
        if differing:
            said = "; ".join(f"{part} {theirs[part]} there, {ours[part]} here" for part in differing)
            raise LdmError(f"features.path={name}: was trained on images that were prepared otherwise ({said}).")
    trained_on = network.identity["trained_on"]
    same_cohort = isinstance(trained_on, Mapping) and trained_on.get("cohort") == cohort
    if same_cohort and trained_on.get("split_sha256") != split_sha256:
        raise LdmError(
            f"features.path={name}: was trained on another split of {cohort}; subjects that are held out here could be "
            "among those it was trained on. Train it again with the same data settings."
        )


def extract(network: FeatureNetwork, images: Iterable[np.ndarray], batch_size: int = 4) -> np.ndarray:
    """Features ``(N, F)`` in float64 of images, each ``(C, *S)``.

    Raises:
        LdmError: there are no images.
    """
    features, batch = [], []
    for image in images:
        batch.append(torch.from_numpy(np.ascontiguousarray(image, np.float32)))
        if len(batch) == batch_size:
            features.append(network(torch.stack(batch)).double().cpu().numpy())
            batch = []
    if batch:
        features.append(network(torch.stack(batch)).double().cpu().numpy())
    if not features:
        raise LdmError("there are no images to take features of.")
    return np.concatenate(features)  # (N, F)
