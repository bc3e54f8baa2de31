"""The far process is started once, and again after a test that has killed it."""

import pytest

from tests.faults.peers import Through


@pytest.fixture(scope="session")
def tcp():
    harness = Through("tcp", "127.0.0.1:0")
    yield harness
    harness.close()
