"""Standing: where a Connection stands, from its first moment to its last.

Here: its native session, the one before the handshake is over and the real one; its end, and the error that says
why. Not here: what a Connection is used for (`kvtransport.connection`).

Invariant: a Connection has one native session at a time, from its beginning: before the handshake is over, a
session that keeps what is posted; then the real one, which takes those posts over. Once lost it stays lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvtransport.errors import (
    ConnectionClosed,
    KVTransportError,
    PeerLost,
    RemoteProtocolError,
    ResourceLimit,
)
from kvtransport.types import ConnectionState, Peer

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.endpoint import Endpoint

CHANNEL_S: Final = 0.25
"""So long the first user of a connection waits for memory to be shared; what is posted before goes by lanes."""


class Standing:
    """What every Connection has for the acceptor and the endpoint."""

    def __init__(
        self, *, endpoint: Endpoint, peer: Peer, backend_name: str, session: _native.Session | None = None
    ) -> None:
        """For Endpoint. Without a session: posts are kept until `_attach`."""
        self.peer = peer
        self._endpoint = endpoint
        self._bridges = endpoint.bridges
        self._backend_name = backend_name
        self._lock = threading.Lock()
        self._error: KVTransportError | None = None
        self._opened = threading.Event()
        self._on_close: Callable[[], None] | None = None  # who dials for it, before there is a session
        self._session = session or endpoint.engine.new_session(os.urandom(16))
        self._session.set_peer(str(peer))
        if session is not None:
            self._opened.set()

    @property
    def state(self) -> ConnectionState:
        """Where it stands."""
        if self._error is not None:
            return "lost"
        return self._session.state()

    # --- for the acceptor and the endpoint -----------------------------------------------------------------

    def shared(self) -> tuple[str, str]:
        """Return where the shared memory of its session stands: "none", "awaited" or "up", and what is wrong."""
        return self._session.channel()

    def _settle(self) -> None:
        """Wait a moment for memory to be shared, so that the first posts find it."""
        self._session.wait_channel(CHANNEL_S)

    def _attach(
        self, session: _native.Session, *, peer: Peer | None = None, backend_name: str | None = None
    ) -> bool:
        """The handshake is over: `session` takes over what was posted. False: this was closed, or has one."""
        with self._lock:
            if self._opened.is_set() or self._error is not None:
                return False
            before, self._session = self._session, session
            self.peer = peer or self.peer
            self._backend_name = backend_name or self._backend_name
            self._opened.set()
        session.set_peer(str(self.peer))
        session.adopt(before)
        return True

    def _lost(self, cause: str, detail: str) -> None:
        """The session ended, or its peer was found to have restarted."""
        if cause == "local":
            self._fail(ConnectionClosed(detail))
        elif cause == "protocol":
            self._fail(
                RemoteProtocolError(
                    f"the connection to {self.peer} was ended, its peer broke the protocol: {detail}"
                )
            )
        elif cause == "limit":
            self._fail(ResourceLimit(f"the connection to {self.peer} was ended: {detail}"))
        else:
            word = cause if cause in ("heartbeat", "restarted", "closed") else detail.partition(": ")[0]
            known = word if word in ("reset", "heartbeat", "restarted", "closed") else "reset"
            self._end(
                PeerLost(f"the connection to {self.peer} was lost: {detail}", cause=known),
                f"{known}: {detail}",
            )

    def _fail(self, error: BaseException) -> None:
        """It can't come about, or has ended, for this reason; posts raise it from now on."""
        kept = error if isinstance(error, KVTransportError) else KVTransportError(str(error))
        self._end(kept, f"reset: {error}")

    def _end(self, error: KVTransportError, cause: str) -> None:
        _ = self._session.id  # raises in a forked child, where the lock may be held for ever
        with self._lock:
            if self._error is None or _tells_more(error, self._error):
                self._error = error
            session = self._session
        session.close(cause)

    def _require_open(self) -> None:
        error = self._error
        if error is not None:
            again = type(error)(
                str(error),
                **{n: getattr(error, n) for n in type(error).attribute_names() if n in vars(error)},
            )
            raise self._named(again)

    def _named(self, error: KVTransportError) -> KVTransportError:
        """Say whom an error at the call concerns."""
        error.peer = error.peer or str(self.peer)
        error.backend = error.backend or self._backend_name or "none"  # a forked child can't ask the session
        return error


def _tells_more(error: KVTransportError, before: KVTransportError) -> bool:
    """Say whether it is found to have restarted who was only known to be gone."""
    if not isinstance(error, PeerLost) or not isinstance(before, PeerLost):
        return False
    return error.cause == "restarted" and before.cause in ("reset", "heartbeat")
