"""What others do to a listening endpoint: it refuses them, stays up, and lets its peers in meanwhile."""

import logging
import os
import socket
import struct
import threading
import time

import msgspec
import pytest

from kvtransport.backends.tcp import TcpBackend
from kvtransport.errors import (
    AuthenticationError,
    ConnectTimeout,
    DowngradeError,
    HandshakeError,
    RemoteProtocolError,
    VersionMismatch,
)
from kvtransport.protocol import messages
from kvtransport.protocol.auth import NullSuite
from kvtransport.protocol.handshake import Handshake, PeerKnown, ProveLink
from kvtransport.protocol.messages import Accept, Hello, Kind, Preamble, Reachability, Role
from tests.unit.other_user import NOBODY, as_nobody, squatter

PREAMBLE = Preamble(1, 1, Kind.CONTROL, 1).encode()


@pytest.fixture
def listening(endpoint):
    one = endpoint()
    return one, one.listen("127.0.0.1:0")


def stranger(where):
    host, _, port = where.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def hello(**changes):
    base = Hello(
        incarnation=os.urandom(16),
        version_min=1,
        version_max=1,
        protection="plain",
        lanes=1,
        chunk_nbytes=4096,
        reachability=Reachability(),
    )
    return msgspec.structs.replace(base, **changes)


def framed(record):
    return messages.frame_record(messages.encode_record(record))


def closed_after(sock):
    """Read until the other end closes; return what it said."""
    said = b""
    try:
        while data := sock.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    return said


def still_serves(endpoint, where):
    """A legitimate peer connects, within a second of the endpoint's own."""
    before = time.monotonic()
    assert endpoint().connect(where, timeout=10).state == "open"
    assert time.monotonic() - before < 1


def greet(sock, ours, *, upto=None):
    """Be the initiator of a handshake, up to an event of type `upto`; return its events."""
    machine = Handshake(Role.INITIATOR, ours, NullSuite())
    events, seen = machine.start(), []
    while events:
        event = events.pop(0)
        seen.append(event)
        if upto and isinstance(event, upto):
            break
        if isinstance(event, ProveLink):
            events += machine.proved()
        elif isinstance(event, PeerKnown):
            events += machine.proceed()
        sock.sendall(machine.outgoing())
        while not events and (size := machine.wants()):
            data = sock.recv(size)
            events += machine.receive(data) if data else machine.close()
        sock.sendall(machine.outgoing())
    return seen


# --- M1: what isn't ours ---


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
        os.urandom(4096),
        b"KVTRNSP0" + PREAMBLE[8:],
        PREAMBLE[:12] + b"\3" + PREAMBLE[13:],
        PREAMBLE[:13] + b"\2" + PREAMBLE[14:],  # keys only
        PREAMBLE[:8] + struct.pack("<HH", 2, 1) + PREAMBLE[12:],
        PREAMBLE[:12] + b"\2" + PREAMBLE[13:] + bytes(64),  # JOIN of no session
    ],
    ids=["http", "tls", "noise", "old magic", "role", "suite", "versions", "join"],
)
def test_m1_is_closed_without_a_word(endpoint, said):
    one = endpoint(handshake_timeout_s=0.3)
    where = one.listen("127.0.0.1:0")
    with stranger(where) as sock:
        sock.sendall(said)
        assert closed_after(sock) in (b"", b"KVTJOIN\0" + bytes(4) + b"\1\0\0\0")
    still_serves(endpoint, where)


@pytest.mark.parametrize(
    "said",
    [
        b"\0\0\0\0",
        b"\1\x40\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\x80",
        framed(messages.Confirm()),
        framed(Accept(session_id=bytes(16), version=1, protection="plain", lanes=1, chunk_nbytes=4096)),
        messages.frame_record(b"\x80\x04\x95" + bytes(20)),
        messages.frame_record(b"\x91" * 16_000),
        messages.frame_record(msgspec.msgpack.encode({"type": "hello", "incarnation": bytes(15)})),
    ],
    ids=["0", "16385", "2^32-1", "2^31", "confirm", "accept", "pickle", "deep", "short id"],
)
def test_bad_records_end_their_handshake_only(endpoint, listening, said):
    one, where = listening
    with stranger(where) as sock:
        sock.sendall(PREAMBLE + bytes(32))
        sock.sendall(said)
        closed_after(sock)
    still_serves(endpoint, where)
    assert one.stats()["handshakes_refused"] == 1


def test_m8_cut_at_every_byte(endpoint, listening):
    one, where = listening
    whole = PREAMBLE + bytes(32) + framed(hello())
    for cut in range(len(whole)):
        with stranger(where) as sock:
            sock.sendall(whole[:cut])
    still_serves(endpoint, where)
    assert len(one.connections()) == 1


def test_m8_slow_strangers_are_closed_in_time(endpoint):
    one = endpoint(handshake_timeout_s=1.0)
    where = one.listen("127.0.0.1:0")
    slow = [stranger(where) for _ in range(64)]
    before = time.monotonic()
    for number, sock in enumerate(slow):
        sock.sendall(PREAMBLE if number % 2 else PREAMBLE[:20])
    stop = threading.Event()

    def drip():
        while not stop.wait(0.1):
            for sock in slow:
                try:
                    sock.send(b"\0", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
                except OSError:
                    continue

    dripping = threading.Thread(target=drip)
    dripping.start()
    still_serves(endpoint, where)
    for sock in slow:
        closed_after(sock)
    taken = time.monotonic() - before
    stop.set()
    dripping.join(10)
    for sock in slow:
        sock.close()
    assert taken < 2.5
    assert not one._acceptor._strangers


def test_strangers_of_whom_nothing_is_known_are_limited(endpoint):
    one = endpoint(insecure=True, max_pending_handshakes_per_address=3)
    where = one.listen("127.0.0.1:0")
    held = []
    for _ in range(6):
        sock = stranger(where)
        sock.sendall(PREAMBLE + bytes(32))
        assert sock.recv(32, socket.MSG_WAITALL)
        held.append(sock)
    for sock in held[:3]:
        closed_after(sock)  # the oldest
    assert len(one._acceptor._strangers) == 3
    for sock in held:
        sock.close()


def test_log_lines_about_strangers_are_few_and_clean(endpoint, listening, caplog):
    _, where = listening
    bad = msgspec.msgpack.encode({"type": "hel\x1b[31m\nlo"})
    for _ in range(30):
        with stranger(where) as sock:
            sock.sendall(PREAMBLE + bytes(32) + messages.frame_record(bad))
            closed_after(sock)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert 1 <= len(lines) <= 10
    assert all(line.isprintable() for line in lines)
    still_serves(endpoint, where)


# --- peers that don't fit ---


def test_f27_disjoint_versions(listening):
    with stranger(listening[1]) as sock, pytest.raises(VersionMismatch, match="1 to 1 there"):
        greet(sock, hello(version_min=2, version_max=3))


def test_protection_without_a_key(listening):
    with stranger(listening[1]) as sock, pytest.raises(HandshakeError, match="needs a key"):
        greet(sock, hello(protection="aead"))


def test_a_second_session_is_refused_by_name(listening):
    _, where = listening
    ours = hello()
    with stranger(where) as first, stranger(where) as second:
        greet(first, ours)
        assert listening[0].accept().peer.incarnation == ours.incarnation
        with pytest.raises(HandshakeError, match="session"):
            greet(second, ours)


def test_a_newer_dial_takes_an_unfinished_ones_place(listening):
    one, where = listening
    ours = hello()
    with stranger(where) as first, stranger(where) as second:
        machine = Handshake(Role.INITIATOR, ours, NullSuite())
        machine.start(), machine.proved()
        first.sendall(machine.outgoing())
        while machine.state.name != "DECIDE":
            machine.receive(first.recv(machine.wants()))
        machine.proceed()
        first.sendall(machine.outgoing())
        assert first.recv(4)  # of ACCEPT: it holds the entry
        greet(second, ours)
        closed_after(first)
        assert one.accept().state == "open"


def test_our_own_incarnation_is_refused(listening):
    one, where = listening
    with stranger(where) as sock, pytest.raises(HandshakeError, match="itself"):
        greet(sock, hello(incarnation=one.incarnation))


def test_no_more_peers_than_max_connections(endpoint):
    one = endpoint(max_connections=2)
    where = one.listen("127.0.0.1:0")
    held = [endpoint() for _ in range(2)]
    for peer in held:
        peer.connect(where)
    third = endpoint()
    with pytest.raises(ConnectTimeout, match="too many peers"):
        third.connect(where, timeout=0.5)
    held[0].close()
    third.connect(where, timeout=10)


# --- who listens isn't ours ---


class Listener:
    """A server of the test's own: `serve` is called with each accepted socket, in a thread."""

    def __init__(self, serve):
        self._serve = serve
        self._server = socket.create_server(("127.0.0.1", 0))
        self.where = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(10)
                try:
                    self._serve(sock)
                except OSError:
                    continue

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)


def answer(sock, records, nonce=bytes(32)):
    """Be a responder that reads what a null suite begins with, and says what it is told to."""
    sock.recv(64, socket.MSG_WAITALL)
    sock.sendall(nonce + records)
    closed_after(sock)


def test_another_protocol_is_told_at_once(endpoint):
    one = endpoint()
    greeting = b"220 example.com ESMTP ready, and more than 32 bytes\r\n"
    with (
        Listener(lambda s: (s.sendall(greeting), closed_after(s))) as other,
        pytest.raises(RemoteProtocolError),
    ):
        one.connect(other.where, timeout=10)


def test_a_responder_of_another_version(endpoint):
    one = endpoint()
    theirs = framed(hello(version_min=5, version_max=6))
    with Listener(lambda s: answer(s, theirs)) as other, pytest.raises(VersionMismatch, match="5 to 6 there"):
        one.connect(other.where, timeout=10)


def test_m5_a_responder_that_accepts_less(endpoint):
    def serve(sock):
        sock.recv(64, socket.MSG_WAITALL)
        sock.sendall(bytes(32) + framed(hello(protection="digest")))
        size = messages.parse_record_length(sock.recv(4, socket.MSG_WAITALL))
        sock.recv(size, socket.MSG_WAITALL)
        sock.sendall(
            framed(Accept(session_id=bytes(16), version=1, protection="plain", lanes=1, chunk_nbytes=4096))
        )
        closed_after(sock)

    one = endpoint()
    with Listener(serve) as other, pytest.raises(DowngradeError):
        one.connect(other.where, timeout=10)
    assert one.connections() == []


def test_a_responder_that_closes_is_tried_again(endpoint):
    tries = []
    one = endpoint()
    served = Listener(lambda s: (tries.append(1), s.recv(64, socket.MSG_WAITALL)))
    with served as other, pytest.raises(ConnectTimeout, match="closed"):
        one.connect(other.where, timeout=0.5)
    assert len(tries) > 2


def test_random_responders_never_break_the_thread(endpoint, listening):
    one = endpoint()
    with Listener(lambda s: (s.recv(64, socket.MSG_WAITALL), s.sendall(os.urandom(200)))) as other:
        for _ in range(5):
            with pytest.raises((RemoteProtocolError, ConnectTimeout)):
                one.connect(other.where, timeout=0.5)
    assert one.connect(listening[1]).state == "open"


# --- M19: another user ---


def test_m19_another_user_dials_us(endpoint, listening, caplog):
    one, where = listening

    def dial():
        with stranger(where) as sock:
            sock.sendall(PREAMBLE + bytes(32))
            if closed_after(sock):
                raise AssertionError("it was answered")

    assert os.waitpid(as_nobody(dial), 0)[1] == 0
    assert one.stats()["handshakes_refused"] == 1
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(f"uid {NOBODY}" in line and "run both ends as one user" in line for line in lines)
    still_serves(endpoint, where)


@pytest.mark.parametrize("accepts", [True, False], ids=["answers", "closes"])
def test_m19_another_user_squats_the_port(endpoint, accepts):
    def serve(sock):
        if accepts and sock.recv(1):
            raise AssertionError("it was spoken to")
        sock.close()

    with (
        squatter("127.0.0.1", serve) as (port, _),
        pytest.raises(AuthenticationError, match=f"uid {NOBODY}.*run both ends as one user"),
    ):
        endpoint().connect(f"127.0.0.1:{port}", timeout=10)


def test_a_lane_of_another_user_is_not_taken(endpoint, listening, monkeypatch):
    one, known, proofs = endpoint(), TcpBackend.prove, []
    thread = one._acceptor.loop._thread

    def prove(self, sock, policy):
        if threading.current_thread() is thread:
            proofs.append(known(self, sock, policy))
            if len([p for p in proofs if p]) > 1:
                raise AuthenticationError("the lane's other end is another user")
            return proofs[-1]
        return known(self, sock, policy)

    monkeypatch.setattr(TcpBackend, "prove", prove)
    with pytest.raises(AuthenticationError, match="lane"):
        one.connect(listening[1], timeout=10)
    assert one.connections() == []
