"""A lane on its way: whom it waits for, and what ends a try."""

import socket
from types import SimpleNamespace

import pytest

from kvtransport.acceptor.lanes import Lane, LaneState
from kvtransport.backends.base import Policy
from kvtransport.backends.tcp import TcpBackend

LIMIT_S = 20
pytestmark = pytest.mark.timeout(60)


class NeverKnown(TcpBackend):
    """The other end is never accepted, as far as one can see."""

    def prove(self, sock, policy):
        return None


def lane_to(server, acceptor):
    backend = NeverKnown()
    (target,) = backend.resolve(f"127.0.0.1:{server.getsockname()[1]}")
    asked = SimpleNamespace(loop=acceptor.loop, policy=Policy())
    return Lane(asked, backend, target, SimpleNamespace(id=b"s" * 16), 0, lambda: None)


def test_who_hangs_up_before_he_is_known_is_dialled_again(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        acceptor = endpoint()._acceptor
        lane = lane_to(server, acceptor)
        acceptor.loop.post(lane.dial)
        for _ in range(3):
            server.accept()[0].close()
        acceptor.loop.post(lane.close)
    assert lane.error is None
    assert lane.reason == "closed by the peer before it was known"


def test_a_look_that_was_meant_for_an_earlier_socket(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as earlier:
        lane = lane_to(server, endpoint()._acceptor)
        looks = []
        lane.on_ready = lambda: looks.append(lane._sock)
        with socket.socket() as now:
            lane.state, lane._sock = LaneState.PROVE, now
            lane._prove_again(earlier)
            assert not looks
            lane._prove_again(now)
            assert looks == [now]
