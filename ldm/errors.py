"""The one error type that a user can cause, and the hint that goes with a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LdmError(ValueError):
    """Something the user can mend: bad data, an unknown name, an impossible combination.

    The command line prints the message alone, without a traceback, so the message has to name the
    file or key, say what is wrong, and say what would be right.
    """


def nearest(name: str, legal: Iterable[str]) -> str:
    """Return ``" Did you mean 'age'?"`` for the legal name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(str(name), [str(item) for item in legal], n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
