"""The list of conditioners that a configuration or a model file describes.

``condition`` describes the covariates; ``conditioners`` is a mapping of the others, one of each kind: ``mask``,
``image`` and ``text``. `complete` adds what only the cohort knows (label values, vocabulary), so that the description
in a model file is enough to build the list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.conditioning.base import COVARIATES, Conditioner, Conditioners, check_rate
from ldm.conditioning.captions import Caption
from ldm.conditioning.covariates import build_conditioner
from ldm.conditioning.planes import ImageConditioner, MaskConditioner
from ldm.conditioning.pretrained import describe_encoder, require_files
from ldm.conditioning.text import (
    TextConditioner,
    WordPiece,
    frozen_encoder,
    own_vocabulary,
    read_vocabulary,
    trained_encoder,
)
from ldm.data.labels import LabelClasses
from ldm.data.schema import CovariateSchema
from ldm.errors import LdmError, nearest

#: kind -> its settings and their defaults
SETTINGS: dict[str, dict[str, Any]] = {
    "mask": {"mode": "concat", "drop_rate": 0.1},
    "image": {"channels": None, "drop_rate": 0.1},
    "text": {
        "caption": None,
        "encoder": None,
        "vocabulary": None,
        "dim": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_head_channels": None,
        "max_tokens": 64,
        "drop_rate": 0.1,
    },
}
#: of text: what an encoder that comes with weights has already
TRAINED_ONLY = ("vocabulary", "num_layers", "num_heads", "num_head_channels")
MASK_MODES = ("concat", "spade")
WHERE = "ldm.conditioners"


def with_defaults(config: Mapping[str, Mapping[str, Any] | None] | None) -> dict[str, dict[str, Any]]:
    """``ldm.conditioners`` with every setting; needs no cohort.

    Raises:
        LdmError: an unknown kind or setting, a rate that is none, or a setting that has to be given.
    """
    settings = {}
    for kind, given in (config or {}).items():
        if kind not in SETTINGS:
            raise LdmError(f"{WHERE}.{kind} is no conditioner; legal: {', '.join(SETTINGS)}.{nearest(kind, SETTINGS)}")
        legal = SETTINGS[kind]
        for name in given or {}:
            if name not in legal:
                raise LdmError(
                    f"{WHERE}.{kind}.{name} is not a setting.{nearest(name, legal)} Legal: {', '.join(legal)}."
                )
        settings[kind] = {**legal, **(given or {})}
        check_rate(f"{WHERE}.{kind}.drop_rate", settings[kind]["drop_rate"])
    checks = {"mask": _check_mask, "image": _check_image, "text": _check_text}
    for kind, one in settings.items():
        checks[kind](one)
    return settings


def _check_mask(mask: Mapping[str, Any]) -> None:
    if mask["mode"] not in MASK_MODES:
        raise LdmError(
            f"{WHERE}.mask.mode is '{mask['mode']}'; legal: {', '.join(MASK_MODES)}. A control is asked for by "
            "ldm.control.model."
        )


def _check_image(image: Mapping[str, Any]) -> None:
    if not image["channels"]:
        raise LdmError(f"{WHERE}.image.channels: name the channels of data.image that are given, e.g. [T2].")


def _check_text(text: Mapping[str, Any]) -> None:
    where = f"{WHERE}.text"
    if not text["caption"]:
        raise LdmError(f"{where}.caption: say how a row is told, e.g. 'a {{age:.0f}}-year-old {{sex:woman|man}}'.")
    if text["encoder"] is not None:
        require_files(text["encoder"], f"{where}.encoder")
        clash = [name for name in TRAINED_ONLY if text[name] != SETTINGS["text"][name]]
        if clash:
            raise LdmError(f"{where}.{clash[0]}: the encoder of {where}.encoder has its own; leave it out.")
    elif text["vocabulary"] is not None:
        read_vocabulary(text["vocabulary"])


def complete(
    config: Mapping[str, Mapping[str, Any] | None] | None,
    schema: CovariateSchema,
    label_names: Mapping[str, Any] | None,
    channels: Sequence[str],
    factor: int,
    label_values: Collection[int] = (),
    all_given: bool = False,
) -> dict[str, dict[str, Any]]:
    """The conditioners as a model file describes them.

    Args:
        config: ``ldm.conditioners``.
        schema: fitted covariates.
        label_names: ``data.label_names``.
        channels: of the cohort's images.
        factor: of the first stage: sides of an image over those of the latent.
        label_values: that the cohort's label maps have.
        all_given: whether every channel may be given, because something else is generated.

    Raises:
        LdmError: see :func:`with_defaults`; no label names, unknown channels, or a caption that does not fit.
    """
    settings = with_defaults(config)
    clash = [kind for kind in settings if kind in schema.names]
    if clash:
        raise LdmError(f"data.covariates.{clash[0]} has the name of a conditioner; give the covariate another.")
    if "mask" in settings:
        settings["mask"]["factor"] = factor
        classes = LabelClasses.from_config(label_names)
        settings["mask"]["labels"] = {name: list(values) for name, values in classes.values.items()}
        settings["mask"]["unnamed"] = classes.unknown(label_values)
    if "image" in settings:
        _check_channels(settings["image"]["channels"], channels, all_given)
        settings["image"]["factor"] = factor
    if "text" in settings:
        settings["text"] = _complete_text(settings["text"], schema)
    return settings


def as_control(conditioners: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Conditioners of :func:`complete` as what controls a frozen model; they are never hidden in training.

    Hiding would teach nothing: without its control a model is the frozen one.
    """
    return {kind: {**one, "mode": "control", "drop_rate": 0.0} for kind, one in conditioners.items()}


def _complete_text(text: Mapping[str, Any], schema: CovariateSchema) -> dict[str, Any]:
    """With the vocabulary itself, and with what the encoder is if it comes with weights."""
    caption, path = Caption.parse(text["caption"], schema, f"{WHERE}.text.caption"), text["vocabulary"]
    if text["encoder"] is not None:
        encoder, vocabulary = describe_encoder(text["encoder"], f"{WHERE}.text.encoder")
        kept = {name: value for name, value in text.items() if name not in TRAINED_ONLY}
        return {**kept, "encoder": encoder, "vocabulary": vocabulary}
    kept = {name: value for name, value in text.items() if name != "encoder"}
    return {**kept, "vocabulary": own_vocabulary(caption.texts()) if path is None else read_vocabulary(path)}


def build_conditioners(
    schema: CovariateSchema,
    condition: Mapping[str, Any],
    conditioners: Mapping[str, Mapping[str, Any]],
    spatial_dims: int,
    embedding_dim: int,
) -> Conditioners:
    """The list: covariates first, then the others.

    Args:
        schema: covariates; none are conditioned on if it is empty or ``condition.mode`` is ``none``.
        condition: ``mode``, ``dim``, ``drop_rate`` and ``drop_all_rate``.
        conditioners: of :func:`complete`.
        spatial_dims: 2 or 3.
        embedding_dim: width of the denoiser's time embedding.

    Raises:
        LdmError: a setting that is not legal.
    """
    built: dict[str, Conditioner] = {}
    covariates = build_conditioner([len(one.levels or ()) for one in schema], condition, embedding_dim)
    if covariates is not None:
        built[COVARIATES] = covariates
    for kind, given in conditioners.items():
        settings, where = dict(given), f"{WHERE}.{kind}"
        if kind == "text":
            width = settings["dim"] if covariates is None else covariates.context_dim or settings["dim"]
            built[kind] = _build_text(settings, schema, width, where)
        elif kind == "image":
            built[kind] = ImageConditioner(spatial_dims=spatial_dims, where=where, **settings)
        else:
            built[kind] = MaskConditioner(where=where, **settings)
    return Conditioners(built, condition.get("drop_all_rate", 0.1))


def _build_text(settings: dict[str, Any], schema: CovariateSchema, width: int, where: str) -> TextConditioner:
    caption = Caption.parse(settings.pop("caption"), schema, f"{where}.caption")
    vocabulary, drop_rate = settings.pop("vocabulary"), settings.pop("drop_rate")
    tokens = settings.get("max_tokens", 64)
    if "encoder" in settings:
        sizes = {name: value for name, value in settings["encoder"].items() if name not in ("lowercase", "sha256")}
        encoder = frozen_encoder(sizes, tokens, where)
        tokenize = WordPiece(vocabulary, settings["encoder"]["lowercase"])
    else:
        encoder, tokenize = trained_encoder(vocabulary, where=where, **settings), WordPiece(vocabulary)
    return TextConditioner(encoder, tokenize, caption, width, tokens, drop_rate, where)


def _check_channels(chosen: Sequence[str], channels: Sequence[str], all_given: bool) -> None:
    for name in chosen:
        if name not in channels:
            raise LdmError(
                f"{WHERE}.image.channels: there is no channel '{name}' in data.image; legal: {', '.join(channels)}."
                f"{nearest(name, channels)}"
            )
    if len(set(chosen)) != len(chosen) or (len(chosen) == len(channels) and not all_given):
        raise LdmError(
            f"{WHERE}.image.channels is {list(chosen)}; name each once, and leave one of {', '.join(channels)} to be "
            "generated."
        )
