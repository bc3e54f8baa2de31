"""The initiator's lanes: dialled after the handshake, joined to the session by a fixed-size exchange.

Here: dial, proof, preamble and JOIN, the answer, again if the answer is no. Not here: the accepting side (native),
chunks.

A JOIN is refused while the peer has not opened the session yet: CONFIRM is on its way to its Python, and
lanes overtake it. So it is tried again, from 2 ms to 200 ms later, until the session is lost or the dial's
time is over. One that says that it has reached another endpoint is the end: behind that address there are
several, and which of them a lane would find is luck.

Invariant: each lane number is given to the session once; a socket that isn't is closed. The session's id is told
to nobody who isn't proved: the port may have become another user's since the handshake.
"""

from __future__ import annotations

import enum
import os
import selectors
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvtransport.acceptor import proof
from kvtransport.acceptor.channel import has_hung_up
from kvtransport.backends.base import StreamBackend, Target
from kvtransport.errors import HandshakeError, KVTransportError, RemoteProtocolError
from kvtransport.protocol import messages
from kvtransport.protocol.auth import SUITE_NULL
from kvtransport.protocol.messages import Kind, Preamble

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.acceptor.acceptor import Acceptor

RETRY_FIRST_S: Final = 0.002
RETRY_LAST_S: Final = 0.2


class Lane:
    """One lane on its way to its session."""

    kind = Kind.LANE

    def __init__(
        self,
        acceptor: Acceptor,
        backend: StreamBackend,
        target: Target,
        session: _native.Session,
        number: int,
        on_change: Callable[[], None],
        responder: bytes = b"",
    ) -> None:
        """`on_change` is called when the lane is joined or has an error; `responder`: see `encode_join`."""
        self.number = number
        self.state = LaneState.PAUSE
        self.reason = "not tried yet"
        self.error: KVTransportError | None = None  # that no further try will mend
        self._acceptor = acceptor
        self._backend = backend
        self._target = target
        self._session = session
        self._on_change = on_change
        self._responder = responder
        self._delay = RETRY_FIRST_S
        self._prove_s = proof.AGAIN_FIRST_S
        self._sock: socket.socket | None = None
        self._answer = b""

    def dial(self) -> None:
        """Begin a try."""
        if self.state is not LaneState.PAUSE:
            return
        self._answer, self._prove_s = b"", proof.AGAIN_FIRST_S
        try:
            sock = self._backend.dial(self._target)
        except OSError as e:
            self._retry(e.strerror or str(e))
            return
        self._sock = sock
        self.state = LaneState.CONNECT
        self._acceptor.loop.watch(sock, selectors.EVENT_WRITE, self.on_ready)

    def on_ready(self) -> None:
        """Go on when the socket is ready, or the other end may be known."""
        sock = self._sock
        if sock is None:
            return
        try:
            if self.state is LaneState.CONNECT:
                self._acceptor.loop.unwatch(sock)
                self._backend.dialled(sock)
                self.state = LaneState.PROVE
            if self.state is LaneState.PROVE:
                self._prove(sock)
            elif self._read_answer(sock):
                self._join(sock)
        except OSError as e:
            self._retry(e.strerror or str(e))
        except (HandshakeError, RemoteProtocolError) as e:
            self._fail(e)

    def close(self) -> None:
        """Give up; what was joined stays."""
        if self._sock is not None:
            self._acceptor.loop.unwatch(self._sock)
            self._sock.close()
            self._sock = None
        if self.state is not LaneState.JOINED:
            self.state = LaneState.OVER

    def _prove(self, sock: socket.socket) -> None:
        if proof.ask(self._backend, sock, self._acceptor.policy, _demand_open) is not None:
            self._send_join(sock)
            return
        loop = self._acceptor.loop
        loop.call_at(loop.now() + self._prove_s, lambda now: self._prove_again(sock))
        self._prove_s = min(2 * self._prove_s, proof.AGAIN_LAST_S)

    def _prove_again(self, sock: socket.socket) -> None:
        if self.state is LaneState.PROVE and self._sock is sock:
            self.on_ready()

    def _send_join(self, sock: socket.socket) -> None:
        preamble = Preamble(messages.VERSION_MIN, messages.VERSION_MAX, self.kind, SUITE_NULL)
        join = messages.encode_join(self._session.id, self.number, os.urandom(16), self._responder)
        data = preamble.encode() + join
        if sock.send(data, socket.MSG_NOSIGNAL) != len(data):  # a fresh socket takes 96 bytes at once
            raise OSError("short write")
        self.state = LaneState.JOIN
        self._acceptor.loop.watch(sock, selectors.EVENT_READ, self.on_ready)

    def _read_answer(self, sock: socket.socket) -> bool:
        """Read what is there of the answer; say whether it is complete."""
        try:
            data = sock.recv(messages.JOIN_ANSWER_NBYTES - len(self._answer))
        except BlockingIOError:
            return False
        if not data:
            raise OSError("closed by the peer before its answer to JOIN")
        self._answer += data
        return len(self._answer) == messages.JOIN_ANSWER_NBYTES

    def _join(self, sock: socket.socket) -> None:
        answer = messages.parse_join_answer(self._answer)
        if answer.lane != self.number:
            raise RemoteProtocolError(f"JOIN of lane {self.number} was answered for lane {answer.lane}")
        if answer.elsewhere:
            raise HandshakeError(
                f"load-balanced address: {self._target} leads to several endpoints, and lane {self.number} has "
                "reached another one than the session's; connect to an address that leads to one endpoint only"
            )
        if not answer.ok:
            raise OSError("the peer doesn't know the session")
        self._acceptor.loop.unwatch(sock)
        self._sock = None
        self.state = LaneState.JOINED
        self._give(sock)
        self._on_change()

    def _give(self, sock: socket.socket) -> None:
        self._session.add_lane(sock.detach(), self.number)

    def _fail(self, error: HandshakeError | RemoteProtocolError) -> None:
        self.error = error
        self.close()
        self._on_change()

    def _retry(self, reason: str) -> None:
        self.close()
        self.reason = reason
        self.state = LaneState.PAUSE
        loop = self._acceptor.loop
        loop.call_at(loop.now() + self._delay, lambda now: self.dial())
        self._delay = min(2 * self._delay, RETRY_LAST_S)


def _demand_open(sock: socket.socket) -> None:
    if has_hung_up(sock):
        raise OSError("closed by the peer before it was known")


class LaneState(enum.Enum):
    """Where a lane is."""

    PAUSE = "until the next try"
    CONNECT = "dialled"
    PROVE = "the other end isn't known yet"
    JOIN = "JOIN sent"
    JOINED = "given to the session"
    OVER = "given up"
