"""Instruments that were trained elsewhere: published brain segmenters, a MeshNet of brainchop or an installed SynthSeg.

A segmenter that learned from a cohort's own labels shares their habits, and was made on images of the same kind as the
models under test; these networks were not. They take T1-weighted brains at 1 mm, and seconds to minutes an image.
"""

from __future__ import annotations

import csv
import logging
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ldm.data.geometry import Geometry
from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError, nearest
from ldm.networks.meshnet import MeshNet, load_meshnet, meshnet_files

logger = logging.getLogger(__name__)

PER_MM3 = {"mm3": 1.0, "ml": 1e-3, "cm3": 1e-3}
CONFORMED = "LIA"  # orientation, at 1 mm, of the volumes that FreeSurfer calls conformed
FOREGROUND = 0.02  # of the way from background to bright tissue: what is darker may be noise
QUANTILES = (0.02, 0.98)
MARGIN_MM = 8  # of background that is computed around a brain
PROGRAM = "mri_synthseg"
TIMEOUT_S = 3600.0

SUBCORTICAL = (
    "Unknown",
    "Cerebral-White-Matter",
    "Cerebral-Cortex",
    "Lateral-Ventricle",
    "Inferior-Lateral-Ventricle",
    "Cerebellum-White-Matter",
    "Cerebellum-Cortex",
    "Thalamus",
    "Caudate",
    "Putamen",
    "Pallidum",
    "3rd-Ventricle",
    "4th-Ventricle",
    "Brain-Stem",
    "Hippocampus",
    "Amygdala",
    "Accumbens-area",
    "VentralDC",
)
CLASSES = {"model18cls": SUBCORTICAL, "model5_gw_ae": ("Background", "White-Matter", "Grey-Matter")}
"""Classes of the networks of brainchop that are known by the name of their file."""

Measure = Callable[[np.ndarray], dict[str, float]]


# --- what both need of the images and the covariates ------------------------------------------------


def expect_brain_volumes(kind: str, preprocessing: Preprocessing) -> int:
    """The channel of the images that an instrument reads: the only one, or that which is called T1.

    Raises:
        LdmError: the images are pictures, have no affine, or several channels of which none is called T1.
    """
    channels = preprocessing.channels
    if preprocessing.spatial_dims != 3 or preprocessing.reference.affine is None:
        raise LdmError(f"data.instrument.kind '{kind}' measures volumes of 3-D images with an affine, not pictures.")
    if len(channels) == 1:
        return 0
    if "T1" not in channels:
        raise LdmError(
            f"data.instrument.kind '{kind}' reads one channel, but the images have {', '.join(channels)}; legal: "
            "images of one channel, or one of several called T1 (data.image)."
        )
    return channels.index("T1")


def units_per_mm3(measures: Mapping[str, Sequence[Any]], schema: CovariateSchema) -> dict[str, float]:
    """Covariate -> how many of its unit a mm3 is.

    Raises:
        LdmError: ``measures`` is no mapping of covariates to lists, or a covariate does not exist or is no volume.
    """
    if not isinstance(measures, Mapping):
        raise LdmError(f"data.instrument.measures is {measures!r}; it is {{covariate: [parts that add up to it]}}.")
    for name, parts in measures.items():
        unit = schema[name].unit
        if unit not in PER_MM3:
            raise LdmError(f"data.covariates.{name}.unit is {unit!r}; a measured volume is in {', '.join(PER_MM3)}.")
        if isinstance(parts, str | Mapping) or not isinstance(parts, Sequence):
            raise LdmError(f"data.instrument.measures.{name} is {parts!r}; it is a list of parts that add up to it.")
    return {name: PER_MM3[schema[name].unit] for name in measures}


# --- MeshNet ----------------------------------------------------------------------------------------


def meshnet_instrument(
    config: Mapping[str, Any], preprocessing: Preprocessing, schema: CovariateSchema
) -> Measure | None:
    """The instrument of ``{kind: meshnet, path: NAME.npz, classes: [...], measures: {covariate: [classes]}}``.

    ``classes`` names all that the network tells apart, in its order; without them :data:`CLASSES` of the file's name,
    or their numbers. Classes of the networks of brainchop are those of FreeSurfer.

    Returns:
        See :func:`~ldm.evaluation.instruments.find_instrument`; None, with a warning, when there is no such file.

    Raises:
        LdmError: images, covariates or classes that it cannot measure, or files that are no MeshNet.
    """
    if not config.get("path"):
        raise LdmError("data.instrument.path is not set; it names NAME.npz of a MeshNet, beside which is NAME.json.")
    files = meshnet_files(config["path"])
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        logger.warning("There is no %s of a meshnet: nothing is measured.", " and no ".join(missing))
        return None
    channel, measures = expect_brain_volumes("meshnet", preprocessing), config.get("measures") or {}
    scale, network = units_per_mm3(measures, schema), load_meshnet(files[0])
    names = _class_names(config.get("classes"), files[0], network.num_classes)
    wanted = {name: [_class_number(one, names, files[0]) for one in measures[name]] for name in scale}
    way = conformed_geometry(preprocessing)

    def measure(image: np.ndarray) -> dict[str, float]:
        background = preprocessing.intensity.background(image[channel])
        volumes = _class_volumes(network, way.forward(image[channel][None].astype(np.float32))[0], background)  # (K,)
        return {name: scale[name] * float(volumes[wanted[name]].sum()) for name in scale}

    return measure


def conformed_geometry(preprocessing: Preprocessing) -> Geometry:
    """The way from the model's grid to voxels of 1 mm, of which i runs to the left, j down and k to the front.

    The field of view stays what it is, while FreeSurfer's has 256 voxels a side: the rest would be background.
    """
    reference = preprocessing.reference
    return Geometry.plan(preprocessing.shape, reference.affine, CONFORMED, 1.0)


def scaled(volume: np.ndarray, background: float) -> tuple[np.ndarray, float] | None:
    """A conformed volume whose quantiles :data:`QUANTILES` are 0 and 1, float32, and what background becomes.

    The quantiles are those of the foreground: those of all voxels depend on how much air and skull is in the image, and
    on brains without skulls the networks told white from grey matter less well with them.
    None where nothing is brighter than the background, as in an image of nothing.
    """
    bright = np.quantile(volume, QUANTILES[1])
    foreground = volume[volume > background + FOREGROUND * (bright - background)]
    if not bright > background or np.ptp(foreground) == 0:
        return None
    low, high = np.quantile(foreground, QUANTILES)
    return ((volume - low) / (high - low)).astype(np.float32), float((background - low) / (high - low))


def segment_conformed(network: MeshNet, volume: np.ndarray, background: float) -> np.ndarray | None:
    """Class numbers ``(I, J, K)`` uint8 of a conformed volume; None of one of nothing.

    Only the box that holds all that is brighter than the background is computed, with a margin; beyond it the
    background continues. On a scan of 2 mm the volumes of ventricles and brain were within 0.1 % of those in 256 voxels
    a side, in a quarter of the time.
    """
    found = scaled(volume, background)
    if found is None:
        return None
    values, outside = found
    box = tuple(slice(max(k.min() - MARGIN_MM, 0), k.max() + 1 + MARGIN_MM) for k in np.nonzero(volume > background))
    x = torch.from_numpy(values[box])[None, None].contiguous(memory_format=torch.channels_last_3d)  # (1, 1, i, j, k)
    with torch.inference_mode():
        classes = network(x, outside).argmax(1)[0]  # (i, j, k)
    segmented = np.zeros(volume.shape, np.uint8)
    segmented[box] = classes.to(torch.uint8).numpy()
    return segmented


def _class_volumes(network: MeshNet, volume: np.ndarray, background: float) -> np.ndarray:
    """mm3 of each class ``(K,)`` in a conformed volume, NaN in one of nothing."""
    segmented = segment_conformed(network, volume, background)
    if segmented is None:
        return np.full(network.num_classes, math.nan)
    return np.bincount(segmented.ravel(), minlength=network.num_classes).astype(np.float64)  # voxels of 1 mm3


def _class_names(given: Sequence[Any] | None, path: Path, count: int) -> list[str]:
    names = given if given is not None else CLASSES.get(path.stem, range(count))
    if isinstance(names, str | Mapping) or len(names) != count:
        raise LdmError(
            f"data.instrument.classes is {given!r}; {path} tells {count} classes apart and needs a name for each of "
            "them, in their order."
        )
    return [str(name) for name in names]


def _class_number(name: Any, names: Sequence[str], path: Path) -> int:
    if str(name) not in names:
        raise LdmError(f"{path} has no class '{name}'.{nearest(name, names)} It has: {', '.join(names)}.")
    return names.index(str(name))


# --- SynthSeg ---------------------------------------------------------------------------------------


def synthseg_instrument(
    config: Mapping[str, Any], preprocessing: Preprocessing, schema: CovariateSchema
) -> Measure | None:
    """The instrument of ``{kind: synthseg, measures: {covariate: [columns of its table of volumes]}}``.

    It runs ``mri_synthseg`` of FreeSurfer (SynthSeg, Billot et al. 2023) on every image: the one on PATH, or ``path``.
    ``robust`` asks for its slower variant, ``threads`` (1) is how many it uses, ``timeout_s`` how many seconds an image
    may take.

    Returns:
        See :func:`~ldm.evaluation.instruments.find_instrument`; None, with a warning, when there is no such program.

    Raises:
        LdmError: images or covariates that it cannot measure; from the instrument itself: the program fails, takes too
            long, or its table lacks a column.
    """
    program = synthseg_program(config)
    if program is None:
        logger.warning(
            "There is no program %s (SynthSeg, part of FreeSurfer): nothing is measured.", config.get("path") or PROGRAM
        )
        return None
    channel, measures = expect_brain_volumes("synthseg", preprocessing), config.get("measures") or {}
    scale, timeout = units_per_mm3(measures, schema), float(config.get("timeout_s") or TIMEOUT_S)
    options = ["--threads", str(config.get("threads") or 1), "--cpu", *(["--robust"] if config.get("robust") else [])]
    affine = np.asarray(preprocessing.reference.affine)

    def measure(image: np.ndarray) -> dict[str, float]:
        volumes = _run_synthseg(program, options, image[channel], affine, timeout)
        for column in (column for name in scale for column in measures[name] if column not in volumes):
            hint = nearest(column, volumes)
            raise LdmError(f"{program} gives no volume '{column}'.{hint} It gives: {', '.join(volumes)}.")
        return {name: scale[name] * sum(volumes[column] for column in measures[name]) for name in scale}

    return measure


def synthseg_program(config: Mapping[str, Any]) -> str | None:
    """Path of the program that a section of kind synthseg runs; None when there is none."""
    return shutil.which(str(config.get("path") or PROGRAM))


def _run_synthseg(
    program: str, options: Sequence[str], image: np.ndarray, affine: np.ndarray, timeout: float
) -> dict[str, float]:
    """Structure -> mm3 in an image ``(D, H, W)``."""
    with tempfile.TemporaryDirectory(prefix="synthseg_") as folder:
        scan, labels, table = (Path(folder) / name for name in ("image.nii.gz", "labels.nii.gz", "volumes.csv"))
        nifti = nib.Nifti1Image(image.astype(np.float32), affine)
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, scan)
        command = [program, "--i", str(scan), "--o", str(labels), "--vol", str(table), *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise LdmError(f"{program} took over {timeout:g} s for an image (data.instrument.timeout_s).") from error
        except OSError as error:
            raise LdmError(f"{program} cannot be run ({error}); data.instrument.path names mri_synthseg.") from error
        if done.returncode:
            said = " ".join(done.stderr.strip().splitlines()[-3:]) or "it does not say why"
            raise LdmError(f"{program} failed with exit code {done.returncode}: {said}")
        return _read_volumes(table, program)


def _read_volumes(table: Path, program: str) -> dict[str, float]:
    """Structure -> mm3 of the table that SynthSeg writes: a row of names, and one of the image, whose name is first."""
    try:
        with table.open(newline="") as file:
            names, values = list(csv.reader(file))[:2]
        return {name.strip(): float(value) for name, value in zip(names[1:], values[1:], strict=True)}
    except (OSError, ValueError) as error:
        raise LdmError(f"{program} wrote no table of volumes that can be read ({error}).") from error
