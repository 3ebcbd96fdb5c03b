"""Objects from configuration: only classes on a short list are ever constructed from a ``_target_``."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from ldm.errors import LdmError, nearest

ALLOWED_TARGETS = (
    "pytorch_lightning.callbacks.DeviceStatsMonitor",
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.loggers.CSVLogger",
    "pytorch_lightning.loggers.MLFlowLogger",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.loggers.WandbLogger",
)


def build(config: DictConfig, where: str) -> Any:
    """Instantiate ``config`` after checking every ``_target_`` in it, at any depth.

    Raises:
        LdmError: a target that is not on the list; nothing has been imported or called then.
    """
    _check(config, where)
    return instantiate(config)


def _check(node: Any, where: str) -> None:
    if isinstance(node, DictConfig):
        for key in node:
            if key == "_target_" and node[key] not in ALLOWED_TARGETS:
                raise LdmError(
                    f"{where}._target_ '{node[key]}' is not allowed.{nearest(str(node[key]), ALLOWED_TARGETS)} "
                    f"Legal: {', '.join(ALLOWED_TARGETS)}."
                )
            _check(node[key], f"{where}.{key}")
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            _check(item, f"{where}[{index}]")
