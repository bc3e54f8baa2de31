"""M17, M18, M19: who joins a session's channel of shared memory, and says there what it may not."""

import array
import contextlib
import fcntl
import os
import re
import socket
import struct

import pytest

from kvtransport import Config, Endpoint
from kvtransport.acceptor.reachability import here
from kvtransport.backends.shm import SEALS, channel_target
from kvtransport.errors import RemoteProtocolError, ResourceLimit
from kvtransport.protocol import messages
from kvtransport.protocol.auth import SUITE_NULL
from kvtransport.protocol.messages import Kind, Preamble
from tests.faults.hostile import LIMIT_S, Hostile
from tests.faults.sharing import Held
from tests.unit.other_user import as_nobody
from tests.waiting import until

MAGIC = 0x314D4853
SEGMENT, GONE, PROBE, PROBED, BOARD, POOL, POOL_GONE = range(1, 8)
PAGE = 4096
pytestmark = pytest.mark.timeout(60)


class Joined(Hostile):
    """A session with its channel, which this side dials as an initiator would."""

    def __init__(self, endpoint: Endpoint, where: str) -> None:
        super().__init__(where, features=("shm", "tcp"), reachability=here())
        self.channel, answer = join(endpoint.incarnation, self.session_id)
        assert messages.parse_join_answer(answer).ok

    def say(self, kind: int, number: int = 0, a: int = 0, b: int = 0, *, fds=()) -> None:
        """Send a message, with any descriptors, and close those here."""
        raw = struct.pack("<IIQQQ32s", MAGIC, kind, number, a, b, b"")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.channel.sendmsg([raw], rights)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self.channel.close()


def join(incarnation: bytes, session_id: bytes) -> tuple[socket.socket, bytes]:
    """Dial an endpoint's channels; return the socket and the answer to JOIN, empty where it was closed."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(LIMIT_S)
    sock.connect(channel_target(incarnation).sockaddr)
    preamble = Preamble(messages.VERSION_MIN, messages.VERSION_MAX, Kind.CHANNEL, SUITE_NULL)
    sock.sendall(preamble.encode() + messages.encode_join(session_id, 0, os.urandom(16)))
    with contextlib.suppress(ConnectionError):
        return sock, sock.recv(messages.JOIN_ANSWER_NBYTES, socket.MSG_WAITALL)
    return sock, b""


@contextlib.contextmanager
def memfd(nbytes: int = PAGE, seals: int = SEALS, *, filled: bool = True):
    """Yield a memfd."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, nbytes)
        if filled:
            os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: str):
    """Yield a descriptor of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def listening():
    """Yield an endpoint that shares memory, and its address."""
    with Endpoint(Config(backends=("shm", "tcp"))) as one:
        yield one, one.listen("127.0.0.1:0")


def refused(listening, attack, why: str, *, cause: type = RemoteProtocolError) -> None:
    """Assert that it ends its session, and leaves nothing of it here; others come and go as before."""
    one, where = listening
    held = Held.now()
    with Joined(one, where) as peer:
        connection = one.accept(timeout=LIMIT_S)
        attack(peer)
        until(lambda: connection._error is not None)
        assert peer.closed()
        with pytest.raises(cause, match=re.escape(why)):
            connection.send_message(b"late")
    until(lambda: Held.now() == held)
    assert one.connections() == []


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10, fcntl.F_SEAL_SEAL, SEALS])
@pytest.mark.parametrize("kind", [SEGMENT, POOL])
def test_m17_m18_memory_without_all_seals(listening, missing, kind):
    """Who could shrink it under the reader, or change what was checked."""
    with memfd(seals=SEALS & ~missing) as fd:
        refused(listening, lambda peer: peer.say(kind, 1, PAGE, fds=[fd]), "it isn't sealed")


@pytest.mark.parametrize("said", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE, 2**31, 2**63, 2**64 - 1])
def test_m17_memory_of_another_size(listening, said):
    with memfd() as fd:
        refused(listening, lambda peer: peer.say(SEGMENT, 1, said, fds=[fd]), f"not the {said}")


def test_m17_pages_that_were_never_there(listening):
    with memfd(1 << 20, filled=False) as fd:
        refused(listening, lambda peer: peer.say(SEGMENT, 1, 1 << 20, fds=[fd]), "some of its pages")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "/proc/self/mem", __file__])
def test_m17_what_is_no_memfd(listening, path):
    with opened(path) as fd:
        refused(listening, lambda peer: peer.say(SEGMENT, 1, PAGE, fds=[fd]), "no memfd")


@pytest.mark.parametrize("count", [2, 3, 250])
def test_m17_many_descriptors_in_one_message(listening, count):
    with memfd() as fd:
        refused(listening, lambda peer: peer.say(SEGMENT, 1, PAGE, fds=[fd] * count), "descriptors came")


@pytest.mark.parametrize("kind", [SEGMENT, BOARD, POOL])
def test_m17_a_message_without_its_descriptor(listening, kind):
    refused(listening, lambda peer: peer.say(kind, 1, PAGE), "without its descriptor")


@pytest.mark.parametrize("kind", [0, 8, 2**32 - 1])
def test_m17_no_such_message(listening, kind):
    refused(listening, lambda peer: peer.say(kind, 1), "of a type that there isn't")


def test_m17_two_segments_of_one_number(listening):
    def attack(peer):
        with memfd() as fd:
            for _ in range(2):
                peer.say(SEGMENT, 7, PAGE, fds=[fd])

    refused(listening, attack, "under one number")


def test_m9_m17_more_segments_than_there_may_be(listening):
    def attack(peer):
        with memfd() as fd, contextlib.suppress(OSError):
            for number in range(2000):
                peer.say(SEGMENT, number, PAGE, fds=[fd])

    refused(listening, attack, "more than 1024 pieces", cause=ResourceLimit)


def test_m17_what_was_sent_is_closed_with_its_session(listening):
    """Good memory, and a peer that goes: neither mapping nor descriptor stays."""
    one, where = listening
    held = Held.now()
    with Joined(one, where) as peer, memfd() as fd:
        connection = one.accept(timeout=LIMIT_S)
        peer.say(SEGMENT, 1, PAGE, fds=[fd])
        until(lambda: Held.now().mappings == held.mappings + 1)
    until(lambda: connection.state == "lost")
    until(lambda: Held.now() == held)


def test_m19_another_user_joins_nothing(listening):
    """Though it knows the session: it is told nothing, and the session goes on without its memory."""
    one, where = listening
    incarnation = one.incarnation
    with Hostile(where, features=("shm", "tcp"), reachability=here()) as peer:
        connection = one.accept(timeout=LIMIT_S)
        held = Held.now()
        session_id = peer.session_id

        def joins() -> None:
            sock, answer = join(incarnation, session_id)
            with sock, memfd() as fd:
                raw = struct.pack("<IIQQQ32s", MAGIC, SEGMENT, 1, PAGE, 0, b"")
                with contextlib.suppress(OSError):
                    sock.sendmsg([raw], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
                with contextlib.suppress(ConnectionError):
                    while sock.recv(PAGE):  # nothing of the board
                        raise AssertionError(f"another user is told something: {answer!r}")

        assert os.waitpid(as_nobody(joins), 0)[1] == 0
        assert connection.state == "open"
        assert connection.shared()[0] != "up"
        until(lambda: Held.now() == held)
