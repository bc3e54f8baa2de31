"""Rules 7 and 9: frames, ids, regions, unmatched posts beyond their bounds end that peer's connection, no other."""

import contextlib
import os
import socket

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from kvtransport.errors import PeerLost, RemoteProtocolError, ResourceLimit
from kvtransport.protocol import messages
from kvtransport.testing.side import ProcessSide
from tests.faults import hostile
from tests.faults.hostile import PIECE, Hostile, frame, header, offer, pool, terms, text, want
from tests.faults.peers import IDS, OF, TO
from tests.waiting import until

LIMIT_S = 20
BIG = (1 << 31, (1 << 32) - 1)


class Scene:
    """An endpoint that listens, with an honest peer in a process, whose transfers go on whatever others do."""

    def __init__(self, far):
        self.endpoint = Endpoint(Config(backends=("tcp",)))
        self.where = self.endpoint.listen("127.0.0.1:0")
        self.honest = far
        far.call("connect", address=self.where)
        self.connection = self.endpoint.accept(timeout=LIMIT_S)
        far.pool("to", TO)
        self.of = self.endpoint.register(OF.views(OF.memory()))
        self.mine = self.endpoint.register(np.zeros((8, PIECE), dtype=np.uint8))
        self.runs = 0

    def outcome(self, say):
        """Let a hostile peer say something while the honest one's transfer runs; return our two errors."""
        self.runs += 1
        key, gate = f"t{self.runs}", self.endpoint.layer_gate(1)
        self.honest.recv(key, "to", IDS)
        running = self.connection.send_blocks(self.of, IDS, key=key, after=gate)
        with Hostile(self.where) as peer:
            connection = self.endpoint.accept(timeout=LIMIT_S)
            assert connection.peer.incarnation == peer.incarnation
            got = connection.recv_blocks(self.mine, [1], key="ours")
            sent = connection.send_blocks(self.mine, [2], key="ours")
            say(peer)
            errors = []
            for transfer in (got, sent):
                with pytest.raises((RemoteProtocolError, ResourceLimit, PeerLost)) as caught:
                    transfer.result(LIMIT_S)
                assert caught.value.quiesced is True
                errors.append(caught.value)
            assert peer.closed()
            assert connection.state == "lost"
        assert errors[0].failed_block_ids == [1]
        gate.mark_ready(0)
        assert running.result(LIMIT_S).nbytes == len(IDS) * OF.nbytes
        self.honest.result(key)
        self.honest.holds("to", TO.after(OF, IDS, IDS))
        until(lambda: self.endpoint.connections() == [self.connection])
        return errors

    def ends_with(self, kind, say):
        """Assert that what it says ends its connection with this error."""
        errors = self.outcome(say)
        assert [type(error) for error in errors] == [kind, kind], errors


@pytest.fixture(scope="module")
def scene():
    side = ProcessSide("honest")
    side.call("start", config={"backends": ["tcp"]})
    made = Scene(side)
    yield made
    made.endpoint.close()
    side.end()


def on_control(data):
    """Return what says these bytes on the control connection, the pool 1 announced before."""

    def say(peer):
        peer.control.sendall(pool(1) + data)

    return say


def on_lane(data):
    """Return what says these bytes on a lane."""

    def say(peer):
        peer.join().sendall(data)

    return say


def broken_crc(raw):
    return raw[:-1] + bytes([raw[-1] ^ 1])


FRAMES = {
    "bad CRC": broken_crc(header(hostile.PING)),
    "noise": os.urandom(64),
    "zeros": bytes(64),
    "type 0": header(0),
    "type 21": header(21),
    "type 255": header(255),
    "a flag that isn't the type's": header(hostile.PING, flags=1),
    "reserved bytes": header(hostile.PING, rest=b"\1"),
    "PING with a body": header(hostile.PING, 1),
    "DONE with a body": header(hostile.DONE, 8),
    "WANT without a body": header(hostile.WANT, 0),
    "WANT cut short": frame(hostile.WANT, b"\1"),
    "chunk of 0 bytes": header(hostile.CHUNK, 0, transfer=1),
    "inline chunk too long": header(hostile.CHUNK, 16385, transfer=1),
    **{f"{name} of {n} bytes": header(kind, n) for name, kind in (
        ("POOL", hostile.POOL), ("OFFER", hostile.OFFER), ("WANT", hostile.WANT), ("CHUNK", hostile.CHUNK),
        ("ABORT", hostile.ABORT), ("RELEASED", hostile.RELEASED), ("MESSAGE", hostile.MESSAGE),
    ) for n in ((1 << 20) + 1, *BIG)},
    "CLOSE of no code": header(hostile.CLOSE, arg=9),
    "ABORT of no code": frame(hostile.ABORT, b"\x63\0\0\0" + text(b"") * 4),
    "reason too long": frame(hostile.ABORT, b"\1\0\0\0" + text(bytes(1025)) + text(b"") * 3),
    "empty key": want(b""),
    "long key": want(b"k" * 256),
    "pool not announced": want(b"k", about=terms(2)),
    "pool announced twice": pool(1),
    "layer that isn't there": want(b"k", about=terms(layer=1)),
    "1,025 layers": pool(2, layers=1025),
    "4,097 ranges": want(b"k", ranges=[(n, n + 1) for n in range(4097)], total=PIECE),
    "more ranges said than sent": want(b"k", count=4096),
    "2^32-1 ranges": want(b"k", count=(1 << 32) - 1),
    "range beyond the total": want(b"k", ranges=[(0, PIECE + 1)]),
    "range to 2^64-1": want(b"k", ranges=[(0, (1 << 64) - 1)]),
    "ranges that overlap": want(b"k", ranges=[(0, 100), (50, PIECE)]),
    "range backwards": want(b"k", ranges=[(PIECE, 0)]),
    "total that isn't the terms'": want(b"k", total=PIECE + 1),
    "bytes beyond 2^63": want(b"k", about=terms(blocks=(1 << 32) - 1, piece=(1 << 64) - 1), total=PIECE),
    "two WANTs of one key": want(b"k") + want(b"k", 2),
    "WANT of an OFFER not made": want(b"k", arg=99),
    "more than was asked": header(hostile.CHUNK, 8192, transfer=1) + bytes(8192 + 16),
    "DONE of nothing sent": header(hostile.DONE, transfer=7, total=1),
}  # fmt: skip


@pytest.mark.parametrize("data", FRAMES.values(), ids=FRAMES)
def test_caps_frames_on_control(scene, data):
    scene.ends_with(RemoteProtocolError, on_control(data))


LANE = {
    "bad CRC": broken_crc(header(hostile.CHUNK, 100, transfer=1)),
    "noise": os.urandom(64),
    "PING": header(hostile.PING),
    "WANT": want(b"k"),
    **{f"chunk of {n} bytes": header(hostile.CHUNK, n, transfer=1) for n in (0, (1 << 20) + 1, *BIG)},
    "beyond the transfer": header(hostile.CHUNK, 100, transfer=1, offset=PIECE - 50),
    "offset 2^64-50": header(hostile.CHUNK, 100, transfer=1, offset=(1 << 64) - 50),
    "no such transfer": header(hostile.CHUNK, 100, transfer=99),
    "a chunk twice": 2 * (header(hostile.CHUNK, 100, transfer=1) + bytes(100) + b"\2" + bytes(15)),
    "status unknown": header(hostile.CHUNK, PIECE, transfer=1) + bytes(PIECE) + b"\7" + bytes(15),
    "digest unknown": header(hostile.CHUNK, PIECE, transfer=1) + bytes(PIECE) + b"\1\7" + bytes(14),
    "no digest": header(hostile.CHUNK, PIECE, transfer=1) + bytes(PIECE) + b"\1\0" + bytes(14),
}


@pytest.mark.parametrize("data", LANE.values(), ids=LANE)
def test_caps_frames_on_a_lane(scene, data):
    scene.ends_with(RemoteProtocolError, on_lane(data))


EXCESS = {
    "1,025 regions": b"".join(pool(n, layers=205) for n in range(2, 7)),
    "1,025 pools": b"".join(pool(n) for n in range(2, 1026)),
    "1,025 unmatched WANTs": b"".join(want(b"k%d" % n, n) for n in range(1, 1026)),
    "1,025 unmatched OFFERs": b"".join(offer(b"k%d" % n, n) for n in range(1, 1026)),
}


@pytest.mark.parametrize("data", EXCESS.values(), ids=EXCESS)
def test_caps_excess_is_the_peers(scene, data):
    scene.ends_with(ResourceLimit, on_control(data))


def test_caps_chunks_with_gaps():
    """A transfer's bytes in too many pieces end that connection; the endpoint goes on."""
    total = 1 << 20
    data = b"".join(hostile.chunk(1, 2 * n, b"x", total) for n in range(8200))
    with Endpoint(Config(backends=("tcp",))) as endpoint:
        where = endpoint.listen("127.0.0.1:0")
        mine = endpoint.register(np.zeros((1, total), dtype=np.uint8))
        with Hostile(where) as peer:
            connection = endpoint.accept(timeout=LIMIT_S)
            got = connection.recv_blocks(mine, [0], key="ours")
            with contextlib.suppress(OSError):
                peer.join().sendall(data)
            with pytest.raises(ResourceLimit):
                got.result(LIMIT_S)
            until(lambda: connection.state == "lost")
        with Hostile(where):
            assert endpoint.accept(timeout=LIMIT_S).state == "open"


class WithGrants(Hostile):
    capabilities = messages.CAPABILITIES


@pytest.mark.parametrize("mib", [1, 64])
def test_caps_answers_that_are_not_read(mib):
    """They wait here, by max_control_queue_nbytes."""
    count = 150_000
    config = Config(backends=("tcp",), max_control_queue_nbytes=mib << 20)
    with Endpoint(config) as endpoint, WithGrants(endpoint.listen("127.0.0.1:0")) as peer:
        connection = endpoint.accept(timeout=LIMIT_S)
        peer.join()
        flood = b"".join(frame(hostile.HOLD, bytes(20), transfer=n) for n in range(1, count + 1))
        peer.control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # else the system takes more
        if mib == 1:
            with contextlib.suppress(OSError):
                peer.control.sendall(flood)
            until(lambda: connection.state == "lost")
            with pytest.raises(ResourceLimit):
                connection.send_message(b"")
            return
        peer.control.sendall(flood)
        got = 0
        while got < count:
            raw = peer.control.recv(64, socket.MSG_WAITALL)
            got += raw[0] == hostile.HELD
        assert connection.state == "open"


@pytest.mark.parametrize("nbytes", [1, 63, 64, 70])
def test_caps_cut_frames(scene, nbytes):
    """A frame that doesn't come whole is a lost peer."""

    def say(peer):
        peer.control.sendall((pool(1) + want(b"k"))[:nbytes])
        peer.control.shutdown(socket.SHUT_WR)

    scene.ends_with(PeerLost, say)


def changed(data, at, new):
    return data[:at] + new + data[at + len(new) :]


JOIN = {
    "no version": (8, b"\0\0"),
    "versions backwards": (8, b"\2\0\1\0"),
    "later versions only": (8, b"\2\0\3\0"),
    "keys only": (13, b"\2"),
    "no suite": (13, b"\0"),
    "zeros of the preamble": (14, b"\1"),
    "key id of no key": (31, b"\1"),
    "zeros at the end": (32 + 63, b"\1"),
}


@pytest.mark.parametrize(("at", "new"), JOIN.values(), ids=JOIN)
def test_caps_a_malformed_join_is_closed_without_a_word(scene, at, new):
    """The lane may still come: the session isn't touched."""
    with Hostile(scene.where) as peer:
        connection = scene.endpoint.accept(timeout=LIMIT_S)
        with peer.dial() as lane:
            lane.sendall(changed(peer.join_bytes(), at, new))
            assert lane.recv(16) == b""
        peer.join()
        assert connection.state == "open"
    until(lambda: scene.endpoint.connections() == [scene.connection])


def test_caps_nothing_is_left_of_them(scene):
    """Descriptors and threads are what they were."""
    scene.ends_with(RemoteProtocolError, on_lane(header(0)))
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        scene.ends_with(RemoteProtocolError, on_lane(header(0)))
    until(lambda: (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before)
