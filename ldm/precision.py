"""Which floating-point precision this machine is fast at."""

from __future__ import annotations

import torch

from ldm.errors import LdmError

PRECISIONS = ("auto", "bf16", "float32")


def fast_at_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is native on ``device``."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # torch.cpu.get_capabilities came after torch 2.10; without it the slower, always right float32 is used
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Autocast to bfloat16 where it pays (``auto``), always (``bf16``) or never (``float32``)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve(precision, device) == "bf16")


def resolve(precision: str, device: torch.device) -> str:
    """``bf16`` or ``float32`` for a device.

    Raises:
        LdmError: ``precision`` is none of auto, bf16, float32.
    """
    if precision not in PRECISIONS:
        raise LdmError(f"precision '{precision}' is unknown; legal: {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return "bf16" if fast_at_bf16(device) else "float32"
    return precision
