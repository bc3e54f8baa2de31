"""Shared memory with a peer of this host: whether to expect it, and the initiator's dial of its channel.

Here: what both ends conclude from the two HELLOs and the proof of the link, the address where an endpoint takes
channels, dialling one. Not here: what goes over it (native), the trial of shared memory (`backends.shm`).

Invariant: both ends come to the same conclusion, so that neither waits for a channel that the other won't dial
or take. A channel goes to a process of our own user, proved by the system, or nowhere.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvtransport.acceptor.lanes import Lane, LaneState
from kvtransport.acceptor.reachability import same_network
from kvtransport.acceptor.roster import Found
from kvtransport.backends.base import StreamBackend, Target
from kvtransport.backends.shm import channel_target
from kvtransport.errors import HandshakeError, RemoteProtocolError
from kvtransport.protocol.messages import Kind, Reachability

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.acceptor.acceptor import Acceptor

TRIES: Final = 3
SETTLE_S: Final = 0.25
"""So long the first user of a connection waits for its channel; what is posted before it is there goes by lanes."""

_MOUNT: Final = (
    "mount one directory into both containers and listen at a socket in it: listen('unix:/shared/kvt.sock')"
)


def why_not(found: Found, ours: Reachability, own_features: tuple[str, ...]) -> tuple[str, str]:
    """Return why no memory is shared with a peer, and the remedy; empty: it is to be."""
    theirs = found.hello.reachability
    if "shm" not in own_features:
        return "not among Config.backends here, or this machine can't (kvtransport doctor says why)", ""
    if "shm" not in found.hello.features:
        return "not among the peer's backends", ""
    if not ours.boot_id or theirs.boot_id != ours.boot_id:
        return "the peer is on another host", ""
    if not (found.proof and found.proof.by_file) and not same_network(ours, theirs):
        return "the peer is in another network namespace", _MOUNT
    if found.proof is None or found.proof.uid != ours.uid or found.proof.uid != theirs.uid:
        return "the peer isn't proved to be the same user", "run both ends as one user, without insecure=True"
    return "", ""


def target_of(found: Found, dialled: Target) -> Target:
    """Return where the channel of a session is dialled: its own unix socket, or the peer's abstract one."""
    return dialled if dialled.family == socket.AF_UNIX else channel_target(found.hello.incarnation)


class MemoryChannel(Lane):
    """The channel of a session on its way. Given up after some tries: the session does without."""

    kind = Kind.CHANNEL

    def __init__(
        self,
        acceptor: Acceptor,
        backend: StreamBackend,
        target: Target,
        session: _native.Session,
        on_change: Callable[[], None],
        responder: bytes = b"",
    ) -> None:
        """See Lane; there is one in a session."""
        super().__init__(acceptor, backend, target, session, 0, on_change, responder)
        self._tries_left = TRIES

    @property
    def settled(self) -> bool:
        """Whether it is known to come or not to come."""
        over = self.state is LaneState.OVER or self.error is not None
        return over or (self.state is LaneState.JOINED and self._session.channel()[0] != "awaited")

    def _give(self, sock: socket.socket) -> None:
        self._session.add_channel(sock.detach())

    def _fail(self, error: HandshakeError | RemoteProtocolError) -> None:
        self._session.refuse_channel(str(error))
        super()._fail(error)

    def _retry(self, reason: str) -> None:
        self._tries_left -= 1
        if self._tries_left:
            super()._retry(reason)
            return
        self.close()
        self._session.refuse_channel(f"{self._target}: {reason}")
        self._on_change()
