"""How long a call may wait, as its user says it.

Here: what `timeout=` means, the same at every call that has one. Not here: the limits of a transfer (native),
settings (`config`).

Invariant: what comes out can be compared and added: it is never negative and never NaN.
"""

from __future__ import annotations

import threading

FOREVER = float("inf")


def to_wait(timeout: float | None) -> float:
    """Return the seconds to wait: None and infinity are for ever, a negative number is a look without a wait.

    ValueError for NaN: it would be one or the other by accident.
    """
    if timeout is None:
        return FOREVER
    if timeout != timeout:
        raise ValueError(f"timeout={timeout!r} is not a number of seconds")
    return max(0.0, timeout)


def for_locks(seconds: float) -> float | None:
    """Return them as Python's locks take them: None beyond what they can count."""
    return seconds if seconds < threading.TIMEOUT_MAX else None
