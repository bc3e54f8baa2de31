"""Two containers of one host, with a directory that both have, and without: which way bytes go, and what is said."""

import contextlib

import pytest

from tests.faults.contained import Contained, cable, why_impossible
from tests.faults.sharing import BOTH, SMALL
from tests.waiting import until

IDS = range(SMALL.count)


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    if why := why_impossible():
        pytest.skip(why)


@pytest.fixture
def two():
    """Return two processes, each in namespaces of its own, that have answered: they are there."""
    with contextlib.ExitStack() as held:
        made = []
        for name in ("a", "b"):
            made.append(Contained(name))
            held.callback(made[-1].end)
        for one in made:
            assert one.call("counts")["threads"] >= 1
        yield made


def start(a, b, address, **config):
    for one in (a, b):
        one.call("start", config={**BOTH, **config})
    b.call("connect", address=a.call("listen", address=address))
    a.call("accept")


def move(source, destination, kind: str, key: str) -> str:
    """Send all blocks; return the way that they went."""
    source.call("pool_of", kind=kind, name=f"{key} of", blocks=SMALL.to_json())
    destination.pool(f"{key} to", SMALL)
    destination.recv(key, f"{key} to", IDS)
    source.send(key, f"{key} of", reversed(IDS))
    ways = {side.result(key)["backend"] for side in (source, destination)}
    assert len(ways) == 1
    destination.holds(f"{key} to", SMALL.after(SMALL, IDS, reversed(IDS)))
    return ways.pop()


def test_with_a_shared_directory_memory_is_shared(two, tmp_path):
    a, b = two
    start(a, b, f"unix:{tmp_path}/kvt.sock")
    until(lambda: a.call("shared") and b.call("shared"))
    for n, (source, destination) in enumerate(((a, b), (b, a))):
        assert move(source, destination, "allocate", f"mapped {n}") == "shm"
        assert move(source, destination, "register", f"plain {n}") == "tcp"
    for side in two:
        told = side.call("explain")
        assert "host memory: shm" in told
        assert "it is in another pid namespace" in told
        assert "allocate it with Endpoint.allocate" in told


def test_without_one_it_is_tcp_and_explain_says_what_to_mount(two):
    a, b = two
    address, _ = cable(a, b)
    start(a, b, f"{address}:0", insecure=True)
    assert move(a, b, "allocate", "allocated") == move(b, a, "register", "plain") == "tcp"
    for side in two:
        told = side.call("explain")
        assert "host memory: tcp" in told
        assert "shm: refused: the peer is in another network namespace; mount one directory into both" in told


def test_one_that_ends_is_known(two, tmp_path):
    """No pid of it is visible here: its sockets tell, and what was mapped of it stays readable."""
    a, b = two
    start(a, b, f"unix:{tmp_path}/kvt.sock")
    until(lambda: a.call("shared") and b.call("shared"))
    assert move(a, b, "allocate", "k") == "shm"
    a.kill()
    until(lambda: b.call("connection_state") == "lost")
    b.holds("k to", SMALL.after(SMALL, IDS, reversed(IDS)))
