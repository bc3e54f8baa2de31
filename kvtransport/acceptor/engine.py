"""What the acceptor uses of the native engine: it is given one, and doesn't import the extension.

Here: the calls, as protocols; what makes a native session of agreed terms. Not here: anything else of the
engine.

Invariant: a control socket that was given to `open_session` belongs to the engine, whatever the call's
outcome.
"""

from __future__ import annotations

import socket
from typing import Protocol

from kvtransport.config import Config, default_chunk_nbytes
from kvtransport.protocol.agreement import Terms


class NativeSession(Protocol):
    """The native twin of a Connection's live session."""

    @property
    def id(self) -> bytes:
        """The session's id."""

    def add_lane(self, fd: int, number: int) -> None:
        """Take a lane whose JOIN has been answered."""

    def close(self, cause: str) -> None:
        """End it."""


class NativeEngine(Protocol):
    """The engine of an Endpoint."""

    def add_listener(self, fd: int) -> int:
        """Accept on a dup of `fd` from now on."""

    def remove_listener(self, listener_id: int) -> None:
        """Stop accepting there."""

    def event_fd(self) -> int:
        """Return what is readable when `poll_events` has something."""

    def poll_events(self) -> list[tuple[object, ...]]:
        """Return what has happened; never blocks."""

    def open_session(
        self,
        control_fd: int,
        *,
        session_id: bytes,
        initiator: bool,
        peer_incarnation: bytes,
        protection: str,
        lanes: int,
        chunk_nbytes: int,
        peer_pid: int,
        peer_caps: int,
        backend: str,
        max_unmatched: int,
        max_regions: int,
        socket_buffer_nbytes: int,
    ) -> NativeSession:
        """Take a control connection after its handshake."""

    def open_inproc_pair(
        self, other: NativeEngine, *, session_id: bytes, protection: str
    ) -> tuple[NativeSession, NativeSession]:
        """Join two engines of this process."""


def open_session(
    engine: NativeEngine, sock: socket.socket, terms: Terms, config: Config, *, backend: str, peer_pid: int
) -> NativeSession:
    """Hand a control connection over to the engine, on the agreed terms."""
    return engine.open_session(
        sock.detach(),
        session_id=terms.session_id,
        initiator=terms.initiator,
        peer_incarnation=terms.peer.incarnation,
        protection=terms.protection,
        lanes=terms.lanes,
        chunk_nbytes=min(terms.chunk_nbytes, default_chunk_nbytes(terms.protection)),
        peer_pid=peer_pid,
        peer_caps=terms.capabilities,
        backend=backend,
        max_unmatched=config.max_unmatched,
        max_regions=config.max_regions,
        socket_buffer_nbytes=config.socket_buffer_nbytes or 0,
    )
