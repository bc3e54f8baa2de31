"""Grant frames: one-sided requests as bytes, and the answers to them, without what only numbers them.

Here: READ, WRITE and HOLD, what has come back. Not here: the session that carries them (`hostile`).
"""

import socket
import struct

from tests.faults.hostile import LIMIT_S, PIECE, PING, POOL, Hostile, frame, pool, terms, text

READ, WRITE, HOLD, HELD = 17, 18, 19, 20
HEADER = 64


def use(token: bytes, *, wait_ms=0, flags=0, heads=(0, 0)) -> bytes:
    """Return how a frame names a grant. flags: 1 heads, 2 a subset."""
    return token + struct.pack("<IBII", wait_ms, flags, *heads)


def subset(*positions: int) -> bytes:
    """Return the positions of one group."""
    return b"".join(struct.pack("<I", at) for at in positions)


def read(token: bytes, number: int, *, positions=(0,), heads=None) -> bytes:
    """Return a READ of blocks of the pool that Granted has announced."""
    flags = 2 | (0 if heads is None else 1)
    body = use(token, flags=flags, heads=heads or (0, 0)) + terms(blocks=len(positions))
    total = PIECE * len(positions)
    ranges = struct.pack("<IQQ", 1, 0, total) if total else struct.pack("<I", 0)
    return frame(READ, body + subset(*positions) + ranges, transfer=number, total=total)


def write(token: bytes, number: int, *, positions=(0,), heads=None) -> bytes:
    """Return a WRITE."""
    flags = 2 | (0 if heads is None else 1)
    body = use(token, flags=flags, heads=heads or (0, 0)) + text(b"") + terms(blocks=len(positions))
    return frame(WRITE, body + subset(*positions), transfer=number, total=PIECE * len(positions))


def hold(token: bytes, number: int) -> bytes:
    """Return a HOLD."""
    return frame(HOLD, token + struct.pack("<I", 0), transfer=number)


class Granted(Hostile):
    """A session that knows of grants, with one opaque pool."""

    capabilities = 2

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.number = 0
        self.control.sendall(pool(1))

    def ask(self, make, token: bytes, **options) -> bytes:
        """Say it, and return the whole answer, save its number and the sum over that."""
        self.number += 1
        self.control.sendall(make(token, self.number, **options))
        while True:
            head = self._exactly(HEADER)
            body = self._exactly(struct.unpack_from("<I", head, 4)[0])
            if head[0] not in (PING, POOL):
                break
        assert struct.unpack_from("<Q", head, 8)[0] == self.number
        return head[:8] + head[16:-4] + body

    def _exactly(self, count: int) -> bytes:
        self.control.settimeout(LIMIT_S)
        data = self.control.recv(count, socket.MSG_WAITALL) if count else b""
        assert len(data) == count, "the connection has ended"
        return data
