"""Schedules by kind, and the pairs that cannot work are refused with what could."""

from __future__ import annotations

import itertools

import pytest

from ldm.diffusion.continuous import EDMSchedule, FlowSchedule
from ldm.diffusion.prediction import PREDICTION_TYPES
from ldm.diffusion.process import check_process, schedule_from_dict
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import LdmError

ZERO_SNR = NoiseSchedule(rescale_zero_terminal_snr=True)
ILLEGAL = {
    (ZERO_SNR, "epsilon"): "zero terminal SNR .* Legal: sample, v_prediction, flow, edm",
    (FlowSchedule(), "epsilon"): "'epsilon' does not go with schedule 'flow'.* Legal: sample, flow, edm",
    (FlowSchedule(), "v_prediction"): "its form for every path is edm. Legal: sample, flow, edm",
    (EDMSchedule(), "v_prediction"): "Legal: epsilon, sample, flow, edm",
}


def test_impossible_pairs_are_refused_by_name_and_all_others_pass():
    for pair in itertools.product([NoiseSchedule(), ZERO_SNR, FlowSchedule(), EDMSchedule()], PREDICTION_TYPES):
        if pair in ILLEGAL:
            with pytest.raises(LdmError, match=ILLEGAL[pair]):
                check_process(*pair)
        else:
            check_process(*pair)
    with pytest.raises(LdmError, match="Did you mean 'v_prediction'"):
        check_process(NoiseSchedule(), "v_predicton")


def test_a_variance_is_learned_between_discrete_steps_only():
    check_process(ZERO_SNR, "v_prediction", learned_variance=True)
    for schedule in (FlowSchedule(), EDMSchedule()):
        with pytest.raises(LdmError, match="needs a discrete schedule"):
            check_process(schedule, "sample", learned_variance=True)
    with pytest.raises(LdmError, match="several steps"):
        check_process(NoiseSchedule(1), "sample", learned_variance=True)


def test_a_description_without_kind_is_a_discrete_schedule():
    """Model files written before there were others."""
    old = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
    assert schedule_from_dict(old) == NoiseSchedule(**old)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "flwo"}, "Did you mean 'flow'"),
        ({"kind": "flow", "beta_start": 0.1}, "Key of a flow schedule, 'beta_start' is not known"),
        ({"kind": "flow", "shift": 0}, "shift must be more than 0"),
        ({"kind": "flow", "shift": "resolutoin"}, "Did you mean 'resolution'"),
        ({"kind": "flow", "time_distribution": "normal"}, "legal: uniform, logit_normal"),
        ({"kind": "flow", "base_positions": 0}, "base_positions must be a whole number"),
        ({"kind": "edm", "sigma_max": 0.001}, "must be less than sigma_max"),
        ({"kind": "edm", "rho": "seven"}, "rho must be a finite number"),
    ],
)
def test_illegal_descriptions_are_refused(values, message):
    with pytest.raises(LdmError, match=message):
        schedule_from_dict(values)
