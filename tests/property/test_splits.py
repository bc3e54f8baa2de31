"""A peer's bytes come in any pieces, on control and on a lane: the endpoint makes the same of them.

The peer is written here, by docs/reference/wire.md. It writes each piece by itself, when the one before has been read
out of the endpoint's socket: so a piece is what one read of the endpoint gets.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import stat
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvtransport as kvt
from kvtransport.testing import Blocks
from tests.faults import hostile
from tests.faults.hostile import Hostile, chunk, frame, pool, terms, want
from tests.waiting import until

LIMIT_S = 20
NBYTES = 700
OF = Blocks(4, NBYTES, seed=1)
TO = Blocks(4, NBYTES, gap=9, seed=2)
IDS = [2, 0, 3]
STREAM = b"".join(bytes(OF.views(OF.memory())[0][block]) for block in IDS)
TOTAL = len(STREAM)
split = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@dataclass
class Plan:
    """What the peer says, and where it is cut."""

    chunks: list[tuple[int, int, bool]] = field(default_factory=lambda: [(0, TOTAL, True)])
    messages: list[bytes] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """Of chunks, messages and PINGs on control; any number stands for one of them that is left."""
    control_cuts: list[int] | None = None
    lane_cuts: list[int] | None = None
    """Per mille of the stream's length. None: between all bytes."""
    turns: list[bool] = field(default_factory=list)
    """Whether the next piece is the lane's."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    cuts = st.lists(st.integers(0, 999), max_size=8)
    edges = [0, *sorted(draw(st.sets(st.integers(1, TOTAL - 1), max_size=5))), TOTAL]
    return Plan(
        chunks=[(a, b, draw(st.booleans())) for a, b in draw(st.permutations([*itertools.pairwise(edges)]))],
        messages=draw(st.lists(st.binary(max_size=300), max_size=3)),
        order=draw(st.lists(st.integers(0, 9), max_size=8)),
        control_cuts=draw(cuts),
        lane_cuts=draw(cuts),
        turns=draw(st.lists(st.booleans(), max_size=20)),
    )


def in_pieces(data: bytes, cuts: list[int] | None) -> list[bytes]:
    edges = range(1, len(data)) if cuts is None else sorted({cut * len(data) // 1000 for cut in cuts} - {0})
    return [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True) if a < b]


def take(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = sock.recv(nbytes - len(data))
        assert more, "the endpoint has closed"
        data += more
    return data


class Piecewise:
    """A peer whose pieces are read one by one."""

    def __init__(self, endpoint: kvt.Endpoint, where: str, open_: contextlib.ExitStack) -> None:
        self.peer = open_.enter_context(Hostile(where))
        self.connection = endpoint.accept(timeout=LIMIT_S)
        self.peer.join()
        self.ends = []
        for sock in (self.peer.control, self.peer.lane):
            there = open_.enter_context(other_end(sock))
            self.ends.append((sock, there, came(there)))

    def write(self, piece: bytes, on_lane: bool = False) -> None:
        """Write it, and wait until the endpoint has read it."""
        here, there, before = self.ends[on_lane]
        here.sendall(piece)
        until(lambda: came(there) == before + len(piece) and unread(there) == 0)
        self.ends[on_lane] = here, there, before + len(piece)

    def read(self, kind: int) -> tuple[dict[str, int], bytes]:
        """Return the endpoint's next frame of this kind; without its trailer, if it is a chunk."""
        while True:
            names = ("kind", "flags", "attempt", "nbytes", "transfer", "offset", "total", "arg")
            header = dict(
                zip(names, struct.unpack("<BBHIQQQQ", take(self.peer.control, 64)[:40]), strict=True)
            )
            body = take(self.peer.control, header["nbytes"])
            if header["kind"] == hostile.CHUNK:
                take(self.peer.control, 16)
            if header["kind"] == kind:
                return header, body


def other_end(sock: socket.socket) -> socket.socket:
    """Return the endpoint's socket, which is in this process too."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found = socket.socket(fileno=os.dup(int(name)))
                if joins(found, sock):
                    return found
                found.close()
    raise AssertionError("the endpoint has no such socket")


def joins(found: socket.socket, sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):  # a listener has no peer
        return (found.getsockname(), found.getpeername()) == (sock.getpeername(), sock.getsockname())
    return False


def came(sock: socket.socket) -> int:
    """Return how many bytes the system has received for it: tcpi_bytes_received."""
    return struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 128)[0]


def unread(sock: socket.socket) -> int:
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]


@pytest.fixture(scope="module")
def listening() -> Iterator[tuple[kvt.Endpoint, str]]:
    config = kvt.Config(backends=("tcp",), dead_after_s=LIMIT_S)  # the peer sends no PING by itself
    with kvt.Endpoint(config) as endpoint:
        yield endpoint, endpoint.listen("127.0.0.1:0")


class Run:
    """One example: a receive, a send, messages."""

    def __init__(self, listening: tuple[kvt.Endpoint, str], plan: Plan) -> None:
        self.endpoint, self.where = listening
        self.plan = plan
        self.memory = TO.memory()
        self.of = self.endpoint.register(OF.views(OF.memory()))
        self.to = self.endpoint.register(TO.views(self.memory))

    def control(self, number: int) -> bytes:
        """Return what is said on control while the receive moves; `number` is the endpoint's WANT."""
        chunks = [chunk(number, a, STREAM[a:b], TOTAL) for a, b, on_lane in self.plan.chunks if not on_lane]
        messages = [frame(hostile.MESSAGE, data, transfer=n + 1) for n, data in enumerate(self.plan.messages)]
        said, queues = [pool(1)], [chunks, messages, [want(b"ours", 1, about=terms(piece=NBYTES), total=NBYTES,
                                                           ranges=[(0, NBYTES)])]]  # fmt: skip
        for at in self.plan.order:
            said.append(queues[at].pop(0) if at < 3 and queues[at] else frame(hostile.PING))
        return b"".join(said + [each for queue in queues for each in queue])

    def lane(self, number: int) -> bytes:
        return b"".join(chunk(number, a, STREAM[a:b], TOTAL) for a, b, on_lane in self.plan.chunks if on_lane)

    def go(self) -> None:
        with contextlib.ExitStack() as opened:
            far = Piecewise(self.endpoint, self.where, opened)
            received = far.connection.recv_blocks(self.to, IDS, key="theirs")
            sent = far.connection.send_blocks(self.of, [1], key="ours")
            number = far.read(hostile.WANT)[0]["transfer"]
            pieces = [
                in_pieces(self.control(number), self.plan.control_cuts),
                in_pieces(self.lane(number), self.plan.lane_cuts),
            ]
            turns = list(self.plan.turns)
            while pieces[0] or pieces[1]:
                on_lane = turns.pop(0) if turns else not pieces[0]
                if pieces[on_lane]:
                    far.write(pieces[on_lane].pop(0), on_lane)
            self.check_received(far, received)
            self.check_sent(far, sent)

    def check_received(self, far: Piecewise, received: kvt.Transfer) -> None:
        assert received.result(LIMIT_S).nbytes == TOTAL
        for is_, should in zip(self.memory, TO.after(OF, IDS, IDS), strict=True):
            assert (is_ == should).all()
        stats = far.connection.stats()
        assert stats["corrupt_chunks"] == 0
        heard: list[bytes] = []
        while len(heard) < len(self.plan.messages):
            got = self.endpoint.recv_messages(LIMIT_S)
            assert got
            assert all(connection is far.connection for connection, _ in got)
            heard += [data for _, data in got]
        assert heard == self.plan.messages

    def check_sent(self, far: Piecewise, sent: kvt.Transfer) -> None:
        header, body = far.read(hostile.CHUNK)
        assert (header["transfer"], header["offset"], header["total"]) == (1, 0, NBYTES)
        assert body == bytes(OF.views(OF.memory())[0][1])
        for piece in in_pieces(frame(hostile.DONE, transfer=1, total=NBYTES, arg=1), self.plan.control_cuts):
            far.write(piece)
        assert sent.result(LIMIT_S).nbytes == NBYTES
        assert far.connection.state == "open"


@split
@given(plans())
def test_any_pieces_give_the_same(listening: tuple[kvt.Endpoint, str], plan: Plan) -> None:
    Run(listening, plan).go()


@pytest.mark.parametrize("on_lane", [False, True])
def test_byte_by_byte(listening: tuple[kvt.Endpoint, str], on_lane: bool) -> None:
    """Also within the chunk of a block."""
    edge = NBYTES // 7
    chunks = [(0, edge, on_lane), (edge, TOTAL, not on_lane)]
    every: list[int] = []
    Run(
        listening,
        Plan(
            chunks=chunks,
            messages=[b"m"],
            control_cuts=every if on_lane else None,
            lane_cuts=None if on_lane else every,
        ),
    ).go()
