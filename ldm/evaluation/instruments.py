"""What measures a covariate in an image: a fixed method, or a trained network that segments or predicts."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.preprocessing import Preprocessing
from ldm.data.schema import Covariate, CovariateSchema
from ldm.errors import LdmError, nearest
from ldm.evaluation.external import meshnet_instrument, synthseg_instrument, synthseg_program, units_per_mm3
from ldm.evaluation.ventricles import measure_ventricles
from ldm.model.file import read_header
from ldm.model.predictor import Predictor
from ldm.model.segmenter import Segmenter
from ldm.networks.meshnet import meshnet_files

logger = logging.getLogger(__name__)

EXTERNAL = {"meshnet": meshnet_instrument, "synthseg": synthseg_instrument}
KINDS = ("ventricles", "segmenter", "predictor", *EXTERNAL)
KEYS = ("kind", "path", "measures")
FURTHER_KEYS = {"meshnet": ("classes",), "synthseg": ("robust", "threads", "timeout_s")}
SHARED = ("spatial_dims", "orientation", "spacing", "intensity", "channels")  # what images of two recipes must share
Instrument = Callable[[np.ndarray], dict[str, float | str]]


@dataclass(frozen=True)
class OfAnotherSplit:
    """An instrument that was trained on another split of the data, and may know some of the held-out images.

    Attributes:
        measure: the instrument itself.
    """

    measure: Instrument

    def __call__(self, image: np.ndarray) -> dict[str, float | str]:
        return self.measure(image)


Sections = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None  # of ``data.instrument``


def instrument_sections(config: Sections) -> list[Mapping[str, Any]]:
    """The sections of ``data.instrument``, which is one, a list of them, or None."""
    return [] if config is None else [config] if isinstance(config, Mapping) else list(config)


def quick_sections(config: Sections) -> list[Mapping[str, Any]]:
    """Those that may measure while a model trains: external ones take seconds to minutes an image."""
    return [
        one for one in instrument_sections(config) if not (isinstance(one, Mapping) and one.get("kind") in EXTERNAL)
    ]


def instrument_hashes(config: Sections) -> str | None:
    """SHA-256 of the weights, or the program, behind each section whose files are there; None where no section is.

    Of a ``model.safetensors`` that of its tensors, of a meshnet that of its two files, one after the other.
    """
    found = [_hash(section) for section in instrument_sections(config)]
    return " ".join(one for one in found if one) or None


def _hash(section: Mapping[str, Any]) -> str | None:
    kind, path = section.get("kind"), section.get("path")
    if kind in ("segmenter", "predictor") and path and Path(path).is_file():
        return read_header(Path(path))["tensors_sha256"]
    program = synthseg_program(section) if kind == "synthseg" else None
    files = meshnet_files(path) if kind == "meshnet" and path else [Path(program)] if program else []
    if not files or not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def find_instruments(
    config: Sections,
    preprocessing: Preprocessing,
    schema: CovariateSchema,
    split_sha256: str | None = None,
) -> dict[str, Instrument]:
    """Title -> instrument of a ``data.instrument`` section, which may be a list; see :func:`find_instrument`.

    The title is the kind, numbered where a kind comes several times.
    """
    found: dict[str, Instrument] = {}
    for section in instrument_sections(config):
        instrument = find_instrument(section, preprocessing, schema, split_sha256)
        if instrument is None:
            continue
        before = sum(title.split(" ")[0] == section["kind"] for title in found)
        found[f"{section['kind']} {before + 1}" if before else section["kind"]] = instrument
    return found


def merged(instruments: Mapping[str, Instrument]) -> Instrument | None:
    """One instrument that measures what several do; of a covariate that more than one measures, the first's value.

    Instruments that turn out to measure nothing that those before them do not are not used again.
    """
    if not instruments:
        return None
    used = list(instruments.values())

    def measure(image: np.ndarray) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for instrument in tuple(used):
            values = instrument(image)
            if found and values.keys() <= found.keys():
                used.remove(instrument)
            found = {**values, **found}
        return found

    return measure


def find_instrument(
    config: Mapping[str, Any] | None,
    preprocessing: Preprocessing,
    schema: CovariateSchema,
    split_sha256: str | None = None,
) -> Instrument | None:
    """The instrument that a ``data.instrument`` section describes.

    Args:
        config: ``{kind: ventricles}`` (simulated brains), ``{kind: segmenter, path: model.safetensors, measures:
            {covariate: [classes whose volumes add up to it]}}`` (without ``measures``: none), ``{kind: predictor,
            path: model.safetensors, measures: [covariates]}`` (without ``measures``: all that it predicts), or None;
            ``{kind: meshnet, ...}`` and ``{kind: synthseg, ...}`` are described in :mod:`ldm.evaluation.external`.
        preprocessing: of the images that will be measured.
        schema: gives the unit or the levels of each covariate.
        split_sha256: of the cohort, where the instrument's own error on held-out images is of interest: a trained one
            that could have been trained on some of them is an :class:`OfAnotherSplit`, with a warning.

    Returns:
        Function of an image ``(C, *S)`` giving ``{covariate: value in its unit, or level}``, NaN for an image that
        cannot be measured; None when there is no instrument.

    Raises:
        LdmError: an unknown kind or key, or a covariate, class or unit that does not exist; a predictor of images that
            were prepared in another way.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise LdmError(f"data.instrument holds {config!r}; each instrument is a mapping, e.g. {{kind: ventricles}}.")
    kind = config.get("kind")
    if kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise LdmError(f"data.instrument.kind '{kind}' is unknown; legal: {', '.join(KINDS)}.{hint}")
    legal = (*KEYS, *FURTHER_KEYS.get(kind, ()))
    for key in config:
        if key not in legal:
            raise LdmError(f"data.instrument.{key} is not a setting.{nearest(key, legal)} Legal: {', '.join(legal)}.")
    if kind == "ventricles":
        return _ventricles(preprocessing)
    if kind in EXTERNAL:
        return EXTERNAL[kind](config, preprocessing, schema)
    return _trained(kind, config, preprocessing, schema, split_sha256)


def _trained(
    kind: str,
    config: Mapping[str, Any],
    preprocessing: Preprocessing,
    schema: CovariateSchema,
    split_sha256: str | None,
) -> Instrument | None:
    """The instrument of a model file of ``ldm train-segmenter`` or ``train-predictor``; see :func:`find_instrument`."""
    if not config.get("path"):
        raise LdmError(f"data.instrument.path is not set; it names the model file that ldm train-{kind} writes.")
    path = Path(config["path"])
    if not path.is_file():
        logger.warning("There is no %s %s yet (ldm train-%s): nothing is measured.", kind, path, kind)
        return None
    trained = Segmenter.load(path) if kind == "segmenter" else Predictor.load(path)
    if kind == "segmenter":
        _expect_like_images(path, trained.preprocessing.to_dict(), preprocessing.to_dict(), "train-segmenter")
        instrument = _segmenter(trained, path, config.get("measures") or {}, schema)
    else:
        instrument = _predictor(trained, path, config.get("measures"), preprocessing, schema)
    if split_sha256 in (None, trained.facts.get("split_sha256")):
        return instrument
    logger.warning(
        "%s was trained on another split of the data: it may know some of the held-out images, on which it would "
        "then seem better than it is.",
        path,
    )
    return OfAnotherSplit(instrument)


def _ventricles(preprocessing: Preprocessing) -> Instrument:
    affine = np.asarray(preprocessing.reference.affine)

    def measure(image: np.ndarray) -> dict[str, float]:
        try:
            return {"ventricles_mm3": measure_ventricles(image[0], affine)}
        except LdmError as error:  # early in training a sample is no brain yet
            logger.debug("%s", error)
            return {"ventricles_mm3": math.nan}

    return measure


def _segmenter(
    segmenter: Segmenter, path: Path, measures: Mapping[str, Sequence[str]], schema: CovariateSchema
) -> Instrument:
    scale, known = units_per_mm3(measures, schema), segmenter.labels.names
    for label in (label for classes in measures.values() for label in classes):
        if label not in known:
            raise LdmError(f"{path} has no class '{label}'.{nearest(label, known)} It has: {', '.join(known)}.")

    def measure(image: np.ndarray) -> dict[str, float]:
        volumes = segmenter.volumes(image)
        return {name: scale[name] * sum(volumes[label] for label in measures[name]) for name in scale}

    return measure


def _predictor(
    predictor: Predictor,
    path: Path,
    measures: Sequence[str] | None,
    preprocessing: Preprocessing,
    schema: CovariateSchema,
) -> Instrument:
    known = predictor.targets.schema
    names = known.names if measures is None else measures
    if isinstance(names, str | Mapping):
        raise LdmError(f"data.instrument.measures is {names!r}; a predictor takes a list of covariates, e.g. [class].")
    for name in names:
        if name not in known.names:
            raise LdmError(
                f"{path} does not predict '{name}'.{nearest(name, known.names)} It predicts: {', '.join(known.names)}."
            )
        for key in ("kind", "unit", "levels"):
            own, asked = getattr(known[name], key), getattr(schema[name], key)
            if own != asked:
                raise LdmError(f"{path} was trained with {name}.{key} {own!r}, data.covariates.{name} has {asked!r}.")
    _expect_like_images(path, predictor.preprocessing.to_dict(), preprocessing.to_dict(), "train-predictor")

    def measure(image: np.ndarray) -> dict[str, float | str]:
        found = predictor.predict(image[None])
        return {name: _reading(found[name][0], schema[name]) for name in names}

    return measure


def _reading(found: torch.Tensor, covariate: Covariate) -> float | str:
    """The most probable level of probabilities ``(L,)``, or the value ``()`` itself."""
    return covariate.levels[int(found.argmax())] if covariate.kind == "categorical" else float(found)


def _expect_like_images(path: Path, trained: Mapping[str, Any], given: Mapping[str, Any], verb: str) -> None:
    key = unlike(trained, given)
    if key is not None:
        raise LdmError(
            f"{path} was trained on images with {key} {trained[key]}, these have {given[key]}. Train it again on "
            f"images like these: ldm {verb}."
        )


def unlike(trained: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first thing in which two recipes of images differ that have to share :data:`SHARED`; None where none does."""
    return next((key for key in SHARED if trained[key] != given[key]), None)
