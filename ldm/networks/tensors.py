"""What hinders the tensors of a file from being those of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ldm.errors import nearest


def differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], shown: int = 6) -> list[str]:
    """What hinders ``tensors`` from being loaded as ``own``: one line a fault, at most ``shown`` of a kind.

    A missing name comes with the nearest unexpected one, and the other way round.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [name for name in sorted(own.keys() & tensors.keys()) if own[name].shape != tensors[name].shape]
    lines = [f"missing: {name} {tuple(own[name].shape)}{nearest(name, unexpected)}" for name in missing[:shown]]
    lines += _left_out("missing", missing, shown)
    lines += [f"unexpected: {name} {tuple(tensors[name].shape)}{nearest(name, missing)}" for name in unexpected[:shown]]
    lines += _left_out("unexpected", unexpected, shown)
    lines += [
        f"shape: {name} is {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the network"
        for name in reshaped[:shown]
    ]
    return lines + _left_out("of another shape", reshaped, shown)


def _left_out(kind: str, names: Sequence[str], shown: int) -> list[str]:
    return [f"... and {len(names) - shown} more {kind}"] if len(names) > shown else []
