"""Every check of kvtransport.testing, over every way that this version has."""

from collections.abc import Iterator

import pytest

from kvtransport.testing import CHECKS, Check, Harness, harnesses


@pytest.fixture(scope="module", params=list(harnesses()))
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = harnesses()[request.param]
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conformance(harness: Harness, check: Check) -> None:
    if lacking := harness.lacks(check.needs):
        pytest.skip(f"{check}: {harness.backend} has no process to {' or '.join(sorted(lacking))}")
    check(harness)
