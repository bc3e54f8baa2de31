"""An address that leads to several endpoints: a session's lanes find another one than the session. It is told."""

import contextlib
import time

import numpy as np
import pytest

import kvtransport as kvt
from kvtransport.acceptor import acceptor
from kvtransport.errors import ConnectionClosed, ConnectTimeout, HandshakeError
from kvtransport.protocol import messages
from tests.faults.proxy import Balancer
from tests.waiting import until

pytestmark = pytest.mark.timeout(60)
LIMIT_S = 20


@pytest.fixture
def balanced():
    """Yield an endpoint, and the address of a balancer in front of two others."""
    with contextlib.ExitStack() as stack:
        ours, *theirs = (
            stack.enter_context(kvt.Endpoint(kvt.Config(backends=("tcp",), lanes=2))) for _ in range(3)
        )
        addresses = [endpoint.listen("127.0.0.1:0") for endpoint in theirs]
        yield ours, stack.enter_context(Balancer(*addresses)).address, addresses


def test_the_dialler_is_told_at_once(balanced):
    ours, address, _ = balanced
    start = time.monotonic()
    with pytest.raises(HandshakeError, match=f"load-balanced address: {address} leads to several endpoints"):
        ours.connect(address, timeout=LIMIT_S)
    assert time.monotonic() - start < LIMIT_S / 2


def test_a_connection_that_was_there_before_explains_it(balanced):
    ours, address, _ = balanced
    connection = ours.connect(address, timeout=LIMIT_S, wait=False)
    transfer = connection.recv_blocks(ours.register(np.zeros((1, 64), np.uint8)), [0], key="t")
    until(lambda: connection.state == "lost")
    assert "load-balanced address: " in connection.explain()
    with pytest.raises(ConnectionClosed):
        transfer.result(LIMIT_S)


def test_endpoints_by_their_own_addresses(balanced):
    ours, _, addresses = balanced
    assert len({ours.connect(address, timeout=LIMIT_S).peer.incarnation for address in addresses}) == 2


def test_where_a_peer_does_not_know_of_it_the_reason_is_that_it_hung_up(balanced, monkeypatch):
    """A responder of before closes a JOIN that names somebody, so none is named; lanes come as before, or in vain."""
    monkeypatch.setattr(
        acceptor.messages, "CAPABILITIES", messages.CAPABILITIES & ~messages.JOINS_NAME_RESPONDER
    )
    ours, address, addresses = balanced
    with pytest.raises(ConnectTimeout, match=r"lane 0 .* hasn't joined"):
        ours.connect(address, timeout=0.5)
    ours.connect(addresses[0], timeout=LIMIT_S).close()
