"""How much the loss at each noise level counts, as a function of the log signal-to-noise ratio.

The loss is the mean squared error of the network's output, so one weight of the error in ``x0`` becomes
another for each prediction type: with ``output = p x0 + q eps`` an error e of the output is one of ``sigma e /
(alpha q - sigma p)`` in x0, for every type a function of the SNR. (For v_prediction on variance-preserving schedules,
the only ones it is trained with.)

Every line holds for log-SNR in [-inf, inf], both ends included. They are limits: pure noise has the weight 0 for all
types but epsilon, whose x0 is without bound there, so a network trained with min_snr hardly learns the first step of a
chain that starts at alpha = 0. Uniform weights on ``edm`` outputs are those of Karras et al. 2022, 1 / c_out^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.checks import check_choice
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.errors import LdmError

LOSS_WEIGHTS = ("uniform", "min_snr")

#: min(SNR, gamma) on the error of x0, by prediction type (Hang et al. 2023). Limits at SNR = 0 and infinity:
#: epsilon 1, 0; sample 0, gamma; v_prediction, edm and flow 0, 0.
_MIN_SNR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "epsilon": lambda log_snr, gamma: (gamma * torch.exp(-log_snr)).clamp(max=1),  # min(SNR, gamma) / SNR
    "sample": lambda log_snr, gamma: torch.exp(log_snr).clamp(max=gamma),
    "v_prediction": lambda log_snr, gamma: torch.exp(log_snr).clamp(max=gamma) / (torch.exp(log_snr) + 1),
    "edm": lambda log_snr, gamma: torch.exp(log_snr).clamp(max=gamma) / (torch.exp(log_snr) + 1),
    "flow": lambda log_snr, gamma: torch.exp(log_snr).clamp(max=gamma) / (torch.exp(log_snr / 2) + 1) ** 2,
}


def loss_weight(kind: str, prediction_type: str, log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of each sample's squared error.

    Args:
        kind: ``"uniform"`` (1 everywhere: the simple loss of Ho et al. 2020, eq. 14) or ``"min_snr"`` (Hang
            et al. 2023).
        prediction_type: what the network outputs.
        log_snr: ``log(alpha^2 / sigma^2)`` of each sample, (B,).
        gamma: where min_snr stops growing; the paper's value is 5.

    Returns:
        (B,), of the dtype of ``log_snr``.

    Raises:
        LdmError: an unknown kind or prediction type, or a gamma that is not positive.
    """
    check_choice("Loss weight", kind, LOSS_WEIGHTS)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if kind == "uniform":
        return torch.ones_like(log_snr)
    if not gamma > 0:
        raise LdmError(f"min_snr needs gamma > 0 (the paper uses 5), got {gamma}.")
    return _MIN_SNR[prediction_type](log_snr, gamma)
