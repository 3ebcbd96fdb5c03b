"""The models that ``ldm compare`` is asked for: read, named and checked before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.commands.held_out import expect_a_split
from ldm.commands.sample import SAMPLING_KEYS, expect_known_options, sampling_options
from ldm.data.datamodule import CohortDataModule
from ldm.errors import LdmError, nearest
from ldm.evaluation.distances import FLOOR, PRIOR
from ldm.evaluation.features import FeatureNetwork, check_features
from ldm.model import gan
from ldm.model.file import read_header
from ldm.model.generative import Generative
from ldm.model.load import MODELS, load_generative

REFERENCE = "training images"  # name of the row that all are measured against
PREPARED = ("orientation", "spacing", "shape", "intensity")  # what all models have to share with the cohort
ENTRY_KEYS = ("path", *SAMPLING_KEYS)


@dataclass(frozen=True)
class Entry:
    """A model that is compared, as asked for.

    Attributes:
        name: of its row.
        path: its file.
        options: of sampling, by the names of ``ldm sample``.
        header: of its file.
        group: the name that it was asked for under, which several trainings may share.
    """

    name: str
    path: Path
    options: Mapping[str, Any]
    header: Mapping[str, Any] = field(repr=False)
    group: str

    @functools.cached_property
    def outline(self) -> Generative:
        """The model without its weights: enough for everything but to compute with it."""
        return MODELS[self.header["kind"]].outline(self.path)

    def load(self) -> Generative:
        """The model, read anew and not kept here: of many models only one is in memory at a time."""
        return load_generative(self.path, "cuda" if torch.cuda.is_available() else "cpu")

    @property
    def asked(self) -> DictConfig:
        """The options as a configuration of ``ldm sample`` has them."""
        return OmegaConf.create(dict(self.options))

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """What its images depend on."""
        settings = vars(self.outline.settings(sampling_options(self.asked)))
        return {"model": self.header["tensors_sha256"], "sampling": settings}

    @property
    def facts(self) -> dict[str, Any]:
        """What its row says of it."""
        return {"model_sha256": self.key["model"], "sampling": self.key["sampling"], "steps": self.header.get("steps")}


def read_entries(models: Mapping[str, Any] | None) -> list[Entry]:
    """The models that are asked for: name -> file, or name -> {path: file or files, steps: 10, ...}.

    Raises:
        LdmError: none, an unknown key, or a file that is no model that draws images.
    """
    entries = []
    for name, given in (models or {}).items():
        options = dict(given) if isinstance(given, Mapping) else {"path": given}
        for key in options:
            if key not in ENTRY_KEYS:
                hint = nearest(key, ENTRY_KEYS)
                raise LdmError(f"models.{name}.{key} is not a setting.{hint} Legal: {', '.join(ENTRY_KEYS)}.")
        if not options.get("path"):
            raise LdmError(f"models.{name} names no file; give a path, or {{path: FILE, steps: 10}}.")
        if str(name).startswith((FLOOR, PRIOR, REFERENCE)) or "|" in str(name):
            raise LdmError(f"models.{name}: another row is called like this, or it has a '|'; choose another name.")
        entries += trainings(str(name), options.pop("path"), options)
    if len({entry.name for entry in entries}) < len(entries):
        raise LdmError(f"models: two rows would have one name ({', '.join(entry.name for entry in entries)}).")
    if not entries:
        raise LdmError("models is empty: name files, e.g. models='{LDM: FILE, LDM 10 steps: {path: FILE, steps: 10}}'.")
    return entries


def trainings(name: str, paths: str | Sequence[str], options: Mapping[str, Any]) -> list[Entry]:
    """One entry a file; several files, such as trainings with other seeds, are numbered.

    Raises:
        LdmError: no file, or one that is no model that draws images.
    """
    paths, found = [paths] if isinstance(paths, str) else list(paths), []
    for number, path in enumerate(map(Path, paths), 1):
        if not path.is_file():
            raise LdmError(f"models.{name}: there is no model file {path}.")
        header = read_header(path)
        kind = header.get("kind")
        if kind not in MODELS:
            raise LdmError(f"models.{name}: {path} holds a model of kind '{kind}', which draws no images.")
        found.append(Entry(name if len(paths) == 1 else f"{name} {number}", path, options, header, name))
    return found


def check_entries(entries: Sequence[Entry], datamodule: CohortDataModule, network: FeatureNetwork) -> None:
    """Refuse models of another split or of images that were prepared otherwise, and options that they do not know.

    Raises:
        LdmError: naming the model.
    """
    ours, channels = datamodule.preprocessing.to_dict(), entries[0].header["preprocessing"]["channels"]
    for entry in entries:
        expect_a_split(entry.outline, entry.path)
        theirs = entry.header["preprocessing"]
        if entry.header["split_sha256"] != datamodule.cohort.split_hash:
            raise LdmError(
                f"models.{entry.name}: was trained on another split of the cohort than data.split gives now; its "
                "training subjects could be among the held-out ones. Use the same data settings as for training."
            )
        differing = [part for part in PREPARED if ours[part] != theirs[part]]
        if differing or theirs["channels"] != channels:
            said = "; ".join(f"{part} {theirs[part]} there, {ours[part]} here" for part in differing)
            said = said or f"channels {theirs['channels']}, {channels} of {entries[0].name}"
            raise LdmError(f"models.{entry.name}: was trained on images that were prepared otherwise ({said}).")
        expect_known_options(entry.outline, entry.asked)
        entry.outline.settings(sampling_options(entry.asked))
    cohort = datamodule.cohort
    check_features(network, entries[0].outline.preprocessing, cohort.name, cohort.split_hash)


def reconstructing(entries: Sequence[Entry]) -> list[Entry]:
    """One model of each first stage that is no identity, and every VAE-GAN."""
    found = {}
    for entry in entries:
        first_stage = entry.header.get("first_stage", {}).get("kind")
        if first_stage == "autoencoder_kl":
            found.setdefault(entry.header["first_stage_sha256"], entry)
        elif entry.header["kind"] == gan.KIND and entry.outline.reconstructs:
            found.setdefault(entry.header["tensors_sha256"], entry)
    return list(found.values())
