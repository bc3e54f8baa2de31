"""F17: another endpoint is found at a peer's address: has the peer restarted, or do both live behind it?"""

import contextlib

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from kvtransport.acceptor.acceptor import Acceptor
from kvtransport.acceptor.roster import SILENT_S
from kvtransport.errors import PeerLost
from kvtransport.protocol.descriptor import Descriptor
from tests.faults.proxy import Fault, Proxy
from tests.waiting import until

LIMIT_S = 20
PATIENT = Config(backends=("tcp",), dead_after_s=60)
pytestmark = pytest.mark.timeout(60)


class Front:
    """An address behind which is `before`, then `after`; `ours` is connected with `before` by it."""

    def __init__(self, held: contextlib.ExitStack, *faults: Fault) -> None:
        self.ours, self.before, self.after = (held.enter_context(Endpoint(PATIENT)) for _ in range(3))
        self._proxy = held.enter_context(Proxy(self.before.listen("127.0.0.1:0"), faults))
        self.before.listen("127.0.0.1:0", advertise=(self._proxy.address,))
        self.old = self.ours.connect(self._proxy.address, timeout=LIMIT_S)
        self.accepted = self.before.accept(LIMIT_S)

    def connect_to_after(self):
        host, _, port = self.after.listen("127.0.0.1:0", advertise=(self._proxy.address,)).rpartition(":")
        self._proxy._target = (host, int(port))
        where = Descriptor(self.after.incarnation, (self._proxy.address,))
        return self.ours.connect(str(where), timeout=LIMIT_S)


@pytest.fixture
def looks(monkeypatch):
    """Return the times at which acceptors were to look who is gone."""
    seen, retire = [], Acceptor._retire

    def look(acceptor, hello, address):
        retire(acceptor, hello, address)
        if address is not None:
            seen.append(acceptor.loop.now())

    monkeypatch.setattr(Acceptor, "_retire", look)
    return seen


def test_f17_two_that_live_behind_one_address(looks):
    with contextlib.ExitStack() as held:
        front = Front(held)
        looks.clear()
        new = front.connect_to_after()
        until(lambda: len(looks) == 2)
        assert looks[1] - looks[0] >= SILENT_S * 0.99
        assert front.old.state == front.accepted.state == new.state == "open"
        front.old.send_message(b"there").result(LIMIT_S)
        front.accepted.send_message(b"back").result(LIMIT_S)
        new.send_message(b"to the other").result(LIMIT_S)


def test_f17_one_that_is_silent_has_restarted():
    """Its host has lost power, say: nobody tells of its end."""
    fault = Fault("control", "down", None, "hold")
    with contextlib.ExitStack() as held:
        front = Front(held, fault)
        waits = front.old.recv_blocks(front.ours.register(np.zeros((4, 64), np.uint8)), [0], key="k")
        fault.armed.set()
        assert fault.reached.wait(LIMIT_S)
        new = front.connect_to_after()
        with pytest.raises(PeerLost) as failed:
            waits.result(LIMIT_S)
        assert failed.value.cause == "restarted"
        until(lambda: front.old.state == "lost")
        with pytest.raises(PeerLost) as failed:
            front.old.send_message(b"late")
        assert failed.value.cause == "restarted"
        new.send_message(b"there").result(LIMIT_S)


def test_f17_one_that_was_lost_has_restarted():
    with contextlib.ExitStack() as held:
        front = Front(held)
        front._proxy.cut()
        until(lambda: front.old._error is not None)
        assert front.old._error.cause == "reset"
        front.connect_to_after()
        with pytest.raises(PeerLost) as failed:
            front.old.send_message(b"late")
        assert failed.value.cause == "restarted"


@pytest.mark.parametrize("cause", ["closed", "local"])
def test_f17_what_was_closed_stays_so(cause):
    with contextlib.ExitStack() as held:
        front = Front(held)
        (front.accepted if cause == "closed" else front.old).close()
        until(lambda: front.old._error is not None and not front.ours.connections())
        before = front.old._error
        front.connect_to_after()
        assert front.old._error is before


def test_f17_a_process_that_stood_still_looks_again(looks):
    with contextlib.ExitStack() as held:
        acceptor, timers = held.enter_context(Endpoint(PATIENT))._acceptor, []
        acceptor.loop.call_at = lambda when, call: timers.append((when, call))
        acceptor._look_later(acceptor.hello("plain"), "there:7")
        (due, look) = timers.pop()
        look(due + 3)
        assert not looks
        (due, look) = timers.pop()
        look(due)
        assert len(looks) == 1
