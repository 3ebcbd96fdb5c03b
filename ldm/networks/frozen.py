"""Frozen modules: eval mode for ever, no gradients, and one of them however often what holds it is copied.

A frozen module is part of a network, so that the model's file has it, but not of its training: the optimizer and the
averages leave it out, and so does the resume checkpoint (`keep_out_of_checkpoints`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.func import functional_call


def freeze(module: nn.Module) -> nn.Module:
    """Put ``module`` into eval mode without gradients, in a way that ``train()`` cannot undo; returns it.

    A deep copy of what holds it, such as a moving average, has the same module and not another.
    """
    module.requires_grad_(False).eval()
    module.train = types.MethodType(_stay_in_eval, module)
    module.__deepcopy__ = types.MethodType(_stay_one, module)
    module.is_frozen = True
    return module


def without_own_gradients(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """``module(*arguments)`` whose gradient reaches the arguments and never the module's parameters."""
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return functional_call(module, {**tensors, **dict(module.named_buffers())}, arguments, options)


def frozen_tensors(module: nn.Module) -> set[str]:
    """Names, in the state dict of ``module``, of what belongs to frozen parts of it."""
    parts = {name: one for name, one in module.named_modules(remove_duplicate=False) if hasattr(one, "is_frozen")}
    return {f"{name}.{tensor}" for name, one in parts.items() for tensor in one.state_dict()}


def keep_out_of_checkpoints(module: nn.Module) -> None:
    """Leave what is frozen out of the state dict of ``module``, and do not miss it when one is loaded."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_post_hook(_do_not_miss)


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _stay_one(module: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    return module


def _leave_out(module: nn.Module, tensors: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    for name in frozen_tensors(module):
        del tensors[prefix + name]


def _do_not_miss(module: nn.Module, incompatible: Any) -> None:
    frozen = frozen_tensors(module)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]
