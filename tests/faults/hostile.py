"""Hostile: a peer that completes the handshake and then says what it likes, byte for byte.

Here: the handshake of a raw socket, frames of the wire as bytes. Not here: what is wrong with them (the tests).
"""

import os
import socket
import struct
from typing import Any

from kvtransport._native import crc32c
from kvtransport.protocol import messages
from kvtransport.protocol.auth import SUITE_NULL, NullSuite
from kvtransport.protocol.handshake import Established, Handshake, PeerKnown, ProveLink
from kvtransport.protocol.messages import Hello, Kind, Preamble, Reachability, Role

POOL, OFFER, WANT, CHUNK, DONE, ABORT, ABORTED, GATED, RELEASED, MESSAGE, ACK, PING, CLOSE = range(1, 14)
HOLD, HELD = 19, 20
LIMIT_S = 20
PIECE = 4096


class Hostile:
    """One session with the endpoint at `where`, whose frames are the test's. A context manager."""

    capabilities = 0

    def __init__(self, where: str, **told: Any) -> None:
        """told: more of what it says of itself, as fields of HELLO."""
        host, _, port = where.rpartition(":")
        self._place = (host, int(port))
        self.control = self.dial()
        self.lane: socket.socket | None = None
        hello = Hello(
            incarnation=os.urandom(16),
            version_min=1,
            version_max=1,
            protection="digest",
            lanes=1,
            chunk_nbytes=65536,
            capabilities=self.capabilities,
            reachability=told.pop("reachability", Reachability()),
            **told,
        )
        self.incarnation = hello.incarnation
        self.session_id = self._greet(hello)

    def dial(self) -> socket.socket:
        """Connect once more, and say nothing."""
        sock = socket.create_connection(self._place, timeout=LIMIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def join(self) -> socket.socket:
        """Bring the lane."""
        self.lane = self.dial()
        self.lane.sendall(self.join_bytes())
        answer = self.lane.recv(messages.JOIN_ANSWER_NBYTES, socket.MSG_WAITALL)
        assert messages.parse_join_answer(answer).ok
        return self.lane

    def join_bytes(self) -> bytes:
        """Return what a lane says first."""
        preamble = Preamble(messages.VERSION_MIN, messages.VERSION_MAX, Kind.LANE, SUITE_NULL)
        return preamble.encode() + messages.encode_join(self.session_id, 0, os.urandom(16))

    def closed(self) -> bool:
        """Read whatever else comes; return True once the other end has closed."""
        try:
            while self.control.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def __enter__(self) -> "Hostile":
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in (self.control, self.lane):
            if sock is not None:
                sock.close()

    def _greet(self, hello: Hello) -> bytes:
        machine = Handshake(Role.INITIATOR, hello, NullSuite())
        events = machine.start()
        while True:
            event = events.pop(0) if events else None
            if isinstance(event, Established):
                self.control.sendall(machine.outgoing())
                return event.terms.session_id
            if isinstance(event, ProveLink):
                events += machine.proved()
            elif isinstance(event, PeerKnown):
                events += machine.proceed()
            self.control.sendall(machine.outgoing())
            if not events:
                data = self.control.recv(machine.wants())
                events += machine.receive(data) if data else machine.close()


def header(
    kind: int, body_nbytes: int = 0, *, flags=0, attempt=0, transfer=0, offset=0, total=0, arg=0, rest=b""
) -> bytes:
    """Return a header with its true CRC. rest: instead of the 20 reserved bytes."""
    raw = struct.pack("<BBHIQQQQ20s", kind, flags, attempt, body_nbytes, transfer, offset, total, arg, rest)
    return raw + struct.pack("<I", crc32c(raw))


def frame(kind: int, body: bytes = b"", **fields) -> bytes:
    """Return a whole frame."""
    return header(kind, len(body), **fields) + body


def chunk(transfer: int, offset: int, body: bytes, total: int) -> bytes:
    """Return a CHUNK with its trailer, its true digest in it."""
    seed = crc32c(struct.pack("<QQQI", transfer, offset, len(body), 1))
    trailer = b"\1\1\0\0" + struct.pack("<I", crc32c(body, seed)) + bytes(8)
    return frame(CHUNK, body, attempt=1, transfer=transfer, offset=offset, total=total) + trailer


def text(value: bytes) -> bytes:
    """Return a text of the wire."""
    return struct.pack("<H", len(value)) + value


def pool(number: int, layers: int = 1) -> bytes:
    """Return a POOL of opaque blocks."""
    group = text(b"") + b"\1" + text(b"") + text(b"") + text(b"") + struct.pack("<I", 0)
    names = b"".join(text(b"%d" % n) + struct.pack("<H", 0) for n in range(layers))
    body = text(b"") + b"\0" + struct.pack("<I", 1) + group + struct.pack("<I", layers) + names
    return frame(POOL, body, transfer=number)


def terms(number: int = 1, blocks: int = 1, piece: int = PIECE, layer: int = 0) -> bytes:
    """Return the terms of a transfer of one group and one layer."""
    return struct.pack("<QIHIIHQ", number, 1, 0, blocks, 1, layer, piece)


def want(key: bytes, number: int = 1, *, ranges=((0, PIECE),), total=PIECE, about=None, count=None, **fields):
    """Return a WANT. about: terms. count: of ranges, as it says."""
    body = text(key) + text(b"") + (terms() if about is None else about)
    body += struct.pack("<I", len(ranges) if count is None else count)
    body += b"".join(struct.pack("<QQ", *each) for each in ranges)
    return frame(WANT, body, transfer=number, total=total, **fields)


def offer(key: bytes, number: int = 1, *, total=PIECE) -> bytes:
    """Return an OFFER."""
    return frame(OFFER, text(key) + text(b"") + text(b"") + b"\0" + terms(), transfer=number, total=total)
