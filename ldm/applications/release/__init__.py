"""A synthetic data set of many volumes with their conditions, made by any number of processes and resumed at will.

Nothing that is written depends on who writes it: a volume's bytes are fixed by the plan and its number. So the locks of
:mod:`~ldm.applications.release.claims` only save work, and every step may be done twice or again.
"""

from ldm.applications.release.audit import audit_copy, read_audit
from ldm.applications.release.conditions import Conditions, asked_of, conditions_from
from ldm.applications.release.evaluation import read_evaluation
from ldm.applications.release.plan import Plan, bids_suffixes, check_model, check_volume_count
from ldm.applications.release.work import Release, Session

__all__ = [
    "Conditions",
    "Plan",
    "Release",
    "Session",
    "asked_of",
    "audit_copy",
    "bids_suffixes",
    "check_model",
    "check_volume_count",
    "conditions_from",
    "read_audit",
    "read_evaluation",
]
