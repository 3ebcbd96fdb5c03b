"""Find a misspelt override before anything runs, and name the key that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from ldm.errors import LdmError, nearest

PLAIN = r"[^\s'\"$,]"
#: key=words{name}..., or key={name}words; but key={name:words} is a mapping, and key=choice(...) a function of Hydra's
TEMPLATE = re.compile(rf"^([\w.@/+~]+=)(?!\w+\()([^\s'\"{{}}\[$,]{PLAIN}*\{{[\w:]+\}}{PLAIN}*|\{{[\w:]+\}}{PLAIN}+)$")
# mappings whose names are the user's, or depend on their kind
FREE_FORM = (
    "data.image",
    "data.covariates",
    "data.label_names",
    "data.instrument",
    "ldm.conditioners",
    "models",
    "samplers",
)


def check_overrides(conf_dir: Path, config_name: str, overrides: Sequence[str]) -> None:
    """Compare every override with the composed configuration.

    Args:
        conf_dir: the Hydra tree.
        config_name: the verb's configuration.
        overrides: as typed, without Hydra's own flags.

    Raises:
        LdmError: a key or an option that does not exist, or a value that does not parse.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise LdmError(f"'{error.override}' does not parse: {error}. Quote values with spaces or braces.") from error
    groups = [override for override in parsed if (conf_dir / override.key_or_group).is_dir()]
    for override in groups:
        _check_options(conf_dir, override)
    groups += [override for override in parsed if override.key_or_group.startswith("hydra/")]  # plugins have their own
    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        choices = [f"{group.key_or_group}={_choices(group)[0]}" for group in groups if _choices(group)]
        try:
            config = compose(config_name, choices, return_hydra_config=True)
        except ConfigCompositionException as error:
            raise LdmError(f"The configuration cannot be put together: {error}") from error
    for override in parsed:
        if override not in groups and not (override.is_add() or override.is_force_add()):
            _check_key(config, override.key_or_group, config_name.removeprefix("train-"))


def quote_templates(arguments: Sequence[str]) -> list[str]:
    """``data.image=T1/{participant_id}.nii.gz`` as Hydra wants it, whose grammar gives braces another meaning.

    A shell takes one pair of quotes away, and ``make ARGS=...`` is a second shell.
    """
    return [TEMPLATE.sub(r"\1'\2'", argument) for argument in arguments]


def replace_free_form(arguments: Sequence[str]) -> list[str]:
    """Let ``data.covariates={...}`` replace the whole mapping, or null, as an assignment should.

    Hydra merges a mapping into the old one, and refuses names that the old one does not have.
    """
    result = []
    for argument in arguments:
        key = argument.partition("=")[0]
        result += [f"{key}=null", f"++{argument}"] if key in FREE_FORM else [argument]
    return result


def _check_options(conf_dir: Path, override: Override) -> None:
    folder = conf_dir / override.key_or_group
    for choice in _choices(override):
        if not (folder / f"{choice}.yaml").is_file():
            legal = sorted(
                str(file.relative_to(folder).with_suffix(""))
                for pattern in ("*.yaml", "*/*.yaml")
                for file in folder.glob(pattern)
            )
            raise LdmError(
                f"'{override.key_or_group}={choice}': there is no such option.{nearest(choice, legal)} "
                f"Legal: {', '.join(legal)}."
            )


def _choices(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_iterator()]
    return [] if override.value() is None else [str(override.value())]


def _check_key(config: DictConfig, key: str, section: str) -> None:
    node = config
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            break
        if part not in node.keys():  # noqa: SIM118 ("in" denies a key whose value is still ???)
            keys = _all_keys(config)
            own = [name for name in keys if name == f"{section}.{key}"]  # init_from of train-ldm is ldm.init_from
            hint = nearest(key, own or keys) or nearest(part, map(str, node))
            raise LdmError(f"There is no setting '{key}'.{hint} `--cfg job` prints all settings.")
        node = None if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part) else node[part]


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        if name == "hydra":
            continue
        keys.append(f"{prefix}{name}")
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        if isinstance(config[name], DictConfig):
            keys += _all_keys(config[name], f"{prefix}{name}.")
    return keys
