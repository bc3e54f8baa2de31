"""One of a peer's addresses is silent, or another user's by now; addresses that no HELLO could carry."""

import socket
import threading
from types import SimpleNamespace

import pytest

from kvtransport.acceptor import dialler
from kvtransport.acceptor.lanes import Lane
from kvtransport.backends.base import Policy
from kvtransport.backends.tcp import TcpBackend
from kvtransport.errors import AuthenticationError, ConnectTimeout
from kvtransport.protocol.descriptor import parse_descriptor

LIMIT_S = 20
LOOPBACK = "127.0.0.1:0"
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["not accepted", "accepted and silent"])
def silent(request):
    """The address of a listener that never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def accept():
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        if request.param != "not accepted":
            thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        if thread.ident:
            thread.join(LIMIT_S)
        for sock in held:
            sock.close()


@pytest.mark.parametrize("first", [True, False])
def test_a_silent_address_starves_no_other(endpoint, turns, monkeypatch, silent, free_port, first):
    monkeypatch.setattr(dialler, "TRY_S", 0.05)
    ours, theirs = endpoint(), endpoint()
    good = f"127.0.0.1:{free_port}"
    where = [silent, good] if first else [good, silent]
    future = ours._acceptor.connect(where, 60)
    turns.until(lambda: any(d._reason != "no try was made" for d in ours._acceptor._dials.values()))
    theirs.listen(good)  # only after the first tries
    assert future.result(LIMIT_S).peer.incarnation == theirs.incarnation


def test_the_reason_tells_which_was_silent(endpoint, monkeypatch, silent):
    monkeypatch.setattr(dialler, "TRY_S", 0.05)
    with pytest.raises(ConnectTimeout, match=rf"{silent} took longer than 0\.\d+ s: the "):
        endpoint().connect([silent, silent.replace("127.0.0.1", "127.1")], timeout=0.3)


@pytest.mark.parametrize(
    ("where", "advertise"),
    [
        ("unix:{tmp}/a\tb", ()),
        (LOOPBACK, ("x" * 300 + ":7000",)),
        (LOOPBACK, ("a\x1bb:7000",)),
        (LOOPBACK, ("name:99999",)),
        (LOOPBACK, ("name:\uff18\uff10",)),
        (LOOPBACK, ("name:",)),
        (LOOPBACK, ("127.0.0.1:7000", "fe80::1:7000")),
        (LOOPBACK, ("unix:",)),
        (LOOPBACK, tuple("é" * 240 + f"{n}:7000" for n in range(16)) + ("y" * 240 + ":7000",)),
    ],
)
def test_listen_refuses_what_peers_cannot_be_told(endpoint, tmp_path, where, advertise):
    ours, theirs = endpoint(), endpoint()
    with pytest.raises(ValueError):
        ours.listen(where.format(tmp=tmp_path), advertise=advertise)
    assert not list(tmp_path.iterdir())
    good = ours.listen(LOOPBACK)
    assert ours._acceptor.addresses() == (good,)
    assert theirs.connect(good, timeout=LIMIT_S).state == "open"


def test_all_addresses_together_fit_a_hello(endpoint):
    ours, theirs = endpoint(), endpoint()
    good = ours.listen(LOOPBACK)
    ours.listen(LOOPBACK, advertise=[f"{'x' * 240}{n}:7000" for n in range(15)])
    assert len(parse_descriptor(ours.descriptor()).addresses) == 16
    assert theirs.connect(good, timeout=LIMIT_S).state == "open"
    again = endpoint()
    with pytest.raises(ValueError, match="all addresses of an endpoint together"):
        again.listen(LOOPBACK, advertise=[f"{'é' * 240}{n}:7000" for n in range(16)])


def test_a_zero_in_a_name(endpoint):
    ours = endpoint()
    for where in ("a\0b:80", ["127.0.0.1:1", "a\0b:80"]):
        with pytest.raises(ValueError, match="is written"):
            ours.connect(where, timeout=LIMIT_S)


def test_a_name_that_no_name_service_can_be_asked_for(endpoint):
    with pytest.raises(ConnectTimeout, match="label"):
        endpoint().connect("x" * 70 + ".example:80", timeout=0.3)


class AnothersPort(TcpBackend):
    """At the first look the other end isn't accepted yet, then it is found to be another user's."""

    def __init__(self):
        self.looks = 0

    def prove(self, sock, policy):
        self.looks += 1
        if self.looks < 10:
            return
        raise AuthenticationError("another user's")


def test_a_lane_says_nothing_to_who_is_not_proved(endpoint):
    ours, changed = endpoint(), threading.Event()
    backend, session = AnothersPort(), SimpleNamespace(id=b"s" * 16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        (target,) = backend.resolve(f"127.0.0.1:{server.getsockname()[1]}")
        acceptor = SimpleNamespace(loop=ours._acceptor.loop, policy=Policy())
        lane = Lane(acceptor, backend, target, session, 0, changed.set)
        ours._acceptor.loop.post(lane.dial)
        other, _ = server.accept()
        with other:
            assert changed.wait(LIMIT_S)
            other.settimeout(LIMIT_S)
            assert other.recv(100) == b""
    assert isinstance(lane.error, AuthenticationError)
    assert backend.looks == 10
