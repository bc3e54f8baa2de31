"""What the acceptor uses of the native engine: it is given one, and doesn't import the extension.

Here: the calls, as protocols; what makes a native session of agreed terms. Not here: anything else of the
engine.

Invariant: a control socket that was given to `attach` belongs to the engine, whatever the call's
outcome.
"""

from __future__ import annotations

import socket
from typing import Protocol

from kvtransport.config import Config, default_chunk_nbytes
from kvtransport.protocol.agreement import Terms


class NativeSession(Protocol):
    """The native twin of a Connection: what was posted to it before it is attached waits for that."""

    @property
    def id(self) -> bytes:
        """The session's id."""

    def attach(
        self,
        control_fd: int,
        *,
        session_id: bytes,
        protection: str,
        lanes: int,
        chunk_nbytes: int,
        peer_pid: int,
        backend: str,
        max_unmatched: int,
        max_regions: int,
        socket_buffer_nbytes: int,
    ) -> None:
        """Take a control connection after its handshake."""

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

    def new_session(self, placeholder: bytes) -> NativeSession:
        """Return a session that isn't attached to anything yet."""

    def open_inproc_pair(
        self,
        other: NativeEngine,
        *,
        session_id: bytes,
        protection: str,
        mine: NativeSession | None,
        theirs: NativeSession | None,
    ) -> tuple[NativeSession, NativeSession]:
        """Join two engines of this process, by new sessions or given ones."""


def open_session(
    engine: NativeEngine,
    sock: socket.socket,
    terms: Terms,
    config: Config,
    *,
    into: NativeSession | None,
    backend: str,
    peer_pid: int,
) -> NativeSession:
    """Hand a control connection over to the engine, on the agreed terms. `into`: a session that waits for
    it.
    """
    session = into or engine.new_session(terms.session_id)
    session.attach(
        sock.detach(),
        session_id=terms.session_id,
        protection=terms.protection,
        lanes=terms.lanes,
        chunk_nbytes=min(terms.chunk_nbytes, default_chunk_nbytes(terms.protection)),
        peer_pid=peer_pid,
        backend=backend,
        max_unmatched=config.max_unmatched,
        max_regions=config.max_regions,
        socket_buffer_nbytes=config.socket_buffer_nbytes or 0,
    )
    return session
