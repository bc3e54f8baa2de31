"""The far process is started once, and again after a test that has killed it."""

import pytest

from tests.faults.keeper import Keeper
from tests.faults.peers import Through


@pytest.fixture(scope="session")
def tcp():
    harness = Through("tcp", "127.0.0.1:0")
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def shm():
    harness = Through("shm", "127.0.0.1:0", config={"backends": ["shm", "tcp"]})
    yield harness
    harness.close()


@pytest.fixture(params=["tcp", "shm"])
def way(request):
    """Each way between two processes of a host, for what doesn't need bytes on a lane."""
    return request.getfixturevalue(request.param)


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
