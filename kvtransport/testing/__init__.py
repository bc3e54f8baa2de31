"""The conformance suite: what every backend must do, as checks that any test runner can call.

A backend's tests make a `Harness` for it and call every one of `CHECKS` with it:

    for check in kvtransport.testing.CHECKS:
        if not harness.lacks(check.needs):
            check(harness)

A check raises AssertionError where the backend fails. Nothing here needs pytest.
"""

from kvtransport.testing import (
    checks_bytes,
    checks_calls,
    checks_ends,
    checks_gates,
    checks_grant_ends,
    checks_grants,
)
from kvtransport.testing.blocks import Blocks
from kvtransport.testing.check import CHECKS, Check
from kvtransport.testing.harness import Harness, InprocHarness, Rig, UnixHarness, harnesses
from kvtransport.testing.side import LocalSide, ProcessSide, Side

__all__ = [
    "CHECKS",
    "Blocks",
    "Check",
    "Harness",
    "InprocHarness",
    "LocalSide",
    "ProcessSide",
    "Rig",
    "Side",
    "UnixHarness",
    "checks_bytes",
    "checks_calls",
    "checks_ends",
    "checks_gates",
    "checks_grant_ends",
    "checks_grants",
    "harnesses",
]
