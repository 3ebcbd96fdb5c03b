"""A diffusion process from its description: which schedule, predicted how; what cannot work is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.diffusion.checks import check_choice, check_count
from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.diffusion.schedule import NoiseSchedule, Schedule
from ldm.errors import LdmError

SCHEDULES: dict[str, type[Schedule]] = {cls.kind: cls for cls in (NoiseSchedule, FlowSchedule, EDMSchedule)}

#: Positions of the latent for which a flow with ``shift: resolution`` is not shifted: 32 x 32, that of the 256 x 256
#: pictures from which Esser et al. 2024, section 5.3.2, start, at 8x.
BASE_POSITIONS = 1024


def schedule_from_dict(values: Mapping[str, Any], positions: int = BASE_POSITIONS) -> Schedule:
    """The schedule that ``values`` describe: ``kind`` and its parameters.

    Args:
        values: without ``kind``, a discrete schedule. A flow's ``shift`` may be ``"resolution"``: sqrt(positions /
            base_positions), with ``base_positions`` (by default `BASE_POSITIONS`) among the values.
        positions: elements of a latent's channel, D x H x W.

    Raises:
        LdmError: an unknown kind or parameter, or one outside its range.
    """
    kind = values.get("kind", NoiseSchedule.kind)
    check_choice("Schedule kind", kind, SCHEDULES)
    if kind == FlowSchedule.kind:
        values = _resolve_shift(dict(values), positions)
    return SCHEDULES[kind].from_dict(values)


def _resolve_shift(values: dict[str, Any], positions: int) -> dict[str, Any]:
    base = values.pop("base_positions", BASE_POSITIONS)
    check_count("base_positions", base)
    if isinstance(values.get("shift"), str):
        check_choice("shift must be a number or 'resolution':", values["shift"], ("resolution",))
        values["shift"] = math.sqrt(positions / base)
    return values


def check_process(schedule: Schedule, prediction_type: str, learned_variance: bool = False) -> None:
    """Refuse what cannot be trained or sampled.

    Raises:
        LdmError: an unknown prediction type; ``epsilon`` where a chain starts from pure noise, of which it says nothing
            about x0; ``v_prediction`` on a path with ``alpha^2 + sigma^2 != 1``; a learned variance in continuous
            time, where there is no step between whose two variances it could choose.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    discrete = isinstance(schedule, NoiseSchedule)
    illegal = {
        "epsilon": schedule.ends_in_pure_noise and "says nothing of x0 at pure noise, where the chain starts",
        "v_prediction": not discrete and "is defined for alpha^2 + sigma^2 = 1; its form for every path is edm",
    }
    if reason := illegal.get(prediction_type):
        legal = [name for name in PREDICTION_TYPES if not illegal.get(name)]
        name = "zero terminal SNR (rescale_zero_terminal_snr)" if discrete else f"schedule '{schedule.kind}'"
        raise LdmError(
            f"prediction_type '{prediction_type}' does not go with {name}: it {reason}. Legal: {', '.join(legal)}."
        )
    if learned_variance and not (discrete and schedule.num_train_timesteps > 1):
        raise LdmError(
            f"learned_variance does not go with schedule '{schedule.kind}': it needs a discrete schedule of several "
            "steps. Legal: schedule=scaled_linear, linear, cosine or sigmoid."
        )
