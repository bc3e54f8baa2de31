"""The far process is started once, and again after a test that has killed it."""

import pytest

from tests.faults.keeper import Keeper
from tests.faults.peers import Through


@pytest.fixture(scope="session")
def tcp():
    harness = Through("tcp", "127.0.0.1:0")
    yield harness
    harness.close()


@pytest.fixture
def far():
    """Make processes with an endpoint each, that the test connects itself."""
    made = []

    def make(name, **config):
        made.append(Keeper(name))
        made[-1].call("start", config={"backends": ["tcp"], **config})
        return made[-1]

    yield make
    for side in made:
        side.end()
