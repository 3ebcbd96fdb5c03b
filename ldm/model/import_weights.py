"""One model file from weights that were trained elsewhere: state dicts of MONAI's two networks.

This is the only place where a pickle that a user gives is read, and only as plain tensors
(``weights_only=True``): a file that holds anything else is refused before anything of it runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError
from ldm.latents.space import LatentSpace
from ldm.model.file import tensors_hash
from ldm.model.latent_diffusion import LatentDiffusionModel
from ldm.networks.tensors import differences

logger = logging.getLogger(__name__)

#: Keys under which a state dict may lie in a checkpoint.
WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "autoencoder", "diffusion", "unet")

#: (today's name in MONAI, name in MONAI Generative): what ``load_old_state_dict`` of the two networks maps.
OLD_NAMES = (
    (re.compile(r"\.attn\.(to_[qkv])\."), r".\1."),  # self-attention
    (re.compile(r"\.attn\.out_proj\."), ".proj_attn."),
    (re.compile(r"(\.transformer_blocks\.\d+\.attn[12])\.out_proj\."), r"\1.to_out.0."),  # inside a transformer
    (re.compile(r"\.postconv\."), ".conv."),  # convolution behind an upsampling
)

#: Modes of conditioning without weights outside the U-Net (but the nulls), which foreign files do not have.
MODES = ("none", "concat", "hybrid")

#: Centre of the MNI152 template's 1 mm grid (182 x 218 x 182; x from 90 to -91, y from -126 to 91, z from -72 to 109).
MNI152_CENTRE_MM = (-0.5, -17.5, 18.5)
MNI = 4  # NIfTI's code of the space


def import_model(
    header: Mapping[str, Any],
    preprocessing: Preprocessing,
    schema: CovariateSchema,
    autoencoder: str | Path,
    diffusion: str | Path,
) -> LatentDiffusionModel:
    """The model that ``header`` describes with the weights of two foreign files.

    Latents are not scaled, as in training without a scaling factor. The model has learned no null: all covariates
    have to be asked for.

    Args:
        header: model description as training writes it, without the hashes.
        preprocessing: complete, with the grid that samples are written on.
        schema: with ranges and levels, in the order of the weights' input channels.
        autoencoder, diffusion: state dicts of MONAI's ``AutoencoderKL`` and ``DiffusionModelUNet``, with today's names
            or those of MONAI Generative.

    Raises:
        LdmError: a file that is not a plain state dict, or names or shapes that do not fit; all are listed by kind.
    """
    mode = header["condition"]["mode"]
    if len(schema) and mode not in MODES:
        raise LdmError(
            f"ldm.condition.mode '{mode}' has weights of its own, which MONAI's networks lack; "
            f"legal: {', '.join(MODES)}."
        )
    if header.get("conditioners"):
        raise LdmError(
            f"ldm.conditioners has {', '.join(header['conditioners'])}: weights are imported for covariates only. "
            "Legal: {}."
        )
    unready = [covariate.name for covariate in schema if not covariate.fitted]
    if unready:
        raise LdmError(f"data.covariates: give the range or the levels of {', '.join(unready)}; there is no cohort.")
    space = LatentSpace.identity(header["latent_shape"][0])
    with torch.device("meta"):  # 567 million parameters need no random start
        model = LatentDiffusionModel(
            {**header, "learned_null": False, "learned_nulls": []}, space, preprocessing, schema
        )
    sources = {
        "autoencoder": _load(model.first_stage, autoencoder, "autoencoder"),
        "diffusion": _load(model.network.denoiser.unet, diffusion, "diffusion"),
    }
    for conditioner in model.network.conditioners.values():
        conditioner.null = nn.Parameter(torch.zeros(conditioner.plane_channels))
    model.header |= {"imported": sources, "first_stage_sha256": sources["autoencoder"]["tensors_sha256"]}
    return model.eval()


def template_grid(
    preprocessing: Preprocessing, channels: Sequence[str], origin_mm: Sequence[float] | None = None
) -> Preprocessing:
    """``preprocessing`` with a reference grid that no cohort is needed for.

    Args:
        preprocessing: 3-D, with orientation, spacing and shape.
        channels: channel names.
        origin_mm: world coordinates (RAS+) of the first voxel's centre; None puts the centre of the grid on the centre
            of the MNI152 template's grid.

    Raises:
        LdmError: pictures, or orientation, spacing or shape is not set.
    """
    if preprocessing.spatial_dims != 3:
        raise LdmError("data.spatial_dims is 2: weights are imported for volumes only. Legal: 3.")
    for name in ("orientation", "spacing", "shape"):
        if getattr(preprocessing, name) is None:
            key = "spacing_mm" if name == "spacing" else name
            raise LdmError(f"data.{key} has to be set: imported weights bring no images to take it from.")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(preprocessing.orientation)):
        affine[int(world), axis] = sign * preprocessing.spacing[axis]
    middle = affine[:3, :3] @ ((np.array(preprocessing.shape) - 1) / 2)
    affine[:3, 3] = np.array(MNI152_CENTRE_MM) - middle if origin_mm is None else origin_mm
    reference = Geometry.plan(
        preprocessing.shape, affine, preprocessing.orientation, preprocessing.spacing, preprocessing.shape, MNI
    )
    return replace(preprocessing, channels=tuple(channels), reference=reference)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` or ``.pth`` file, also when they lie one level deeper; nothing in it is executed.

    Raises:
        LdmError: no such file, or not a plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise LdmError(f"There is no weights file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is cut short or hostile
        raise LdmError(
            f"{path} is not a file of plain tensors ({type(error).__name__}), and nothing else is opened. A whole "
            "pickled model has to be saved anew where it is trusted: torch.save(model.state_dict(), path)."
        ) from error
    while isinstance(content, Mapping):
        inside = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inside:
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not content:
        raise LdmError(f"{path} holds a {type(content).__name__} and no state dict: names with tensors.")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise LdmError(
            f"{path} is not a state dict, its values are not tensors: {', '.join(strange[:6])}. A state dict may lie "
            f"under one of the keys {', '.join(WRAPPERS)}."
        )
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def with_new_names(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with those that have a name of MONAI Generative under today's; ``wanted`` has today's names."""
    result = dict(tensors)
    for name in wanted:
        old = old_name(name)
        if name not in tensors and old in tensors:
            result[name] = result.pop(old)
    return result


def old_name(name: str) -> str:
    """What MONAI Generative called the parameter ``name``."""
    for pattern, replacement in OLD_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _load(module: nn.Module, path: str | Path, key: str) -> dict[str, str]:
    """Put the file's tensors in place of the module's; returns where they came from."""
    own = module.state_dict()
    tensors = with_new_names(read_state_dict(path), own)
    faults = differences(own, tensors)
    if faults:
        shown = "\n  ".join(faults)
        raise LdmError(f"{key}={path} does not fit the network that the configuration describes:\n  {shown}")
    module.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    count = sum(value.numel() for value in tensors.values())
    logger.info("%s: %d tensors, %.2f M numbers, all names and shapes fit.", path, len(tensors), count / 1e6)
    return {"file": Path(path).name, "tensors_sha256": tensors_hash(module.state_dict())}
