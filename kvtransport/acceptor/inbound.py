"""A stranger who dialled us: its handshake, the responder's side.

Here: what each event of the handshake leads to. Not here: the preamble and its limits (native), the
handshake's rules, the thread and the deadline (`loop`).

Invariant: whatever the stranger sends, it ends as a session or closed, and has cost no more than its
handshake. It is told nothing of why it isn't let in; a peer of ours is told by a REJECT.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvtransport.acceptor.channel import Channel, ClosedByPeer, has_hung_up
from kvtransport.acceptor.roster import Found, Ruling
from kvtransport.backends.base import LinkProof, StreamBackend
from kvtransport.errors import AuthenticationError, KVTransportError
from kvtransport.protocol.agreement import SessionDeclined
from kvtransport.protocol.handshake import Established, Event, Handshake, PeerKnown, ProveLink

if TYPE_CHECKING:
    from kvtransport.acceptor.acceptor import Acceptor

_REFUSALS = {
    Ruling.CONNECTED: ("session", "there is a session with this peer"),
    Ruling.CROSSING: ("session", "both sides dialled at once, and the other session stays"),
    Ruling.FULL: ("limit", "too many peers"),
}


class Inbound:
    """One stranger, from its preamble to its session."""

    dialled = False

    def __init__(
        self, acceptor: Acceptor, backend: StreamBackend, sock: socket.socket, machine: Handshake, host: str
    ) -> None:
        """`deadline`: set by the loop, by a clock that counts waiting for strangers only."""
        self.host = host
        self.proof: LinkProof | None = None
        self.deadline = float("inf")
        self._acceptor = acceptor
        self._backend = backend
        self._channel = Channel(sock, machine)
        self._incarnation: bytes | None = None
        self._over = False

    @property
    def over(self) -> bool:
        """Whether it has a session or is gone."""
        return self._over

    @property
    def anonymous(self) -> bool:
        """Whether nothing has proved who it is: then the limits on strangers count it."""
        return self.proof is None or self.proof.uid is None

    def begin(self, preamble: bytes) -> None:
        """Start with the 32 bytes that the engine has read."""
        machine = self._channel.machine
        self._run(lambda: machine.start() + machine.receive(preamble))

    def on_ready(self) -> None:
        """Read, answer, wait for more."""
        self._run(self._channel.read)

    def displace(self) -> None:
        """Give up: the same peer has dialled again, so this is an earlier try of it."""
        self._incarnation = None
        self.end("the peer has dialled again", expected=True)

    def end(self, reason: str, *, expected: bool = False) -> None:
        """Close without a session. `expected`: nobody did wrong."""
        if self._over:
            return
        self._over = True
        self._acceptor.loop.unwatch(self._channel.sock)
        if self._incarnation is not None:
            self._acceptor.roster.release(self._incarnation, self)
        self._acceptor.inbound_over(self, reason, expected)
        self._channel.close()

    def _run(self, first: Callable[[], list[Event]]) -> None:
        """Take events until there are none, then wait."""
        try:
            events = first()
            while events and not self._over:
                for event in events:
                    self._take(event)
                events = [] if self._over else self._channel.read()
            if not self._over:
                self._channel.flush()
                self._acceptor.loop.watch(self._channel.sock, self._channel.interest(), self.on_ready)
        except (ClosedByPeer, SessionDeclined) as e:
            self.end(str(e), expected=True)
        except (KVTransportError, OSError) as e:
            self.end(f"{type(e).__name__}: {e}")

    def _take(self, event: Event) -> None:
        if isinstance(event, ProveLink):
            self._prove()
        elif isinstance(event, PeerKnown):
            self._decide(event)
        elif isinstance(event, Established):
            self._open(event)

    def _prove(self) -> None:
        machine = self._channel.machine
        self.proof = self._backend.prove(self._channel.sock, self._acceptor.policy)
        if self.proof is None:
            machine.refuse()
            if has_hung_up(self._channel.sock):
                raise ClosedByPeer("the peer closed the connection")
            raise AuthenticationError("the other end is not of this host, though its address is")
        machine.proved()
        self._channel.flush()

    def _decide(self, known: PeerKnown) -> None:
        machine, incarnation = self._channel.machine, known.hello.incarnation
        if incarnation == self._acceptor.incarnation:
            machine.refuse("session", "an endpoint doesn't connect to itself")
            self.end("it is this endpoint itself")
            return
        ruling = self._acceptor.roster.claim(incarnation, self)
        if ruling is not Ruling.GO:
            machine.refuse(*_REFUSALS[ruling])
            self.end(ruling.value, expected=ruling is not Ruling.FULL)
            return
        self._incarnation = incarnation
        machine.proceed()
        self._channel.flush()

    def _open(self, established: Established) -> None:
        acceptor, sock, terms = self._acceptor, self._channel.sock, established.terms
        acceptor.loop.unwatch(sock)
        acceptor.open(sock, Found(terms, self._backend.name, self.proof, None), None)
        self._over = True
        acceptor.inbound_over(self, None, True)
