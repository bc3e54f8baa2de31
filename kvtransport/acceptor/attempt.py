"""One try to reach a peer at one address: socket, handshake, lanes.

Here: the initiator's side, from the dial to a session with all its lanes. Not here: which address, when
again, who waits (`dialler`), the handshake's rules, which of two sessions stays (`roster`), the thread
(`loop`).

Theory of operation: CONNECT (the socket), PROVE (who is there: asked until the other end has been
accepted), TALK (the handshake), JOIN (the lanes), OVER. When the peer is known and another handshake with
it goes first, the try is in WAIT until the roster changes. Its outcome goes to its Dial, once: `succeeded`,
`yielded` (the peer is, or is being, connected in another way), or `failed`, with an error if no further try
will mend it.

Invariant: a try that is OVER holds no socket but what the engine has, and no entry of the roster.
"""

from __future__ import annotations

import enum
import errno
import os
import selectors
import socket
from typing import TYPE_CHECKING, Final, Protocol

from kvtransport.acceptor import proof
from kvtransport.acceptor.channel import Channel, ClosedByPeer
from kvtransport.acceptor.lanes import Lane, LaneState
from kvtransport.acceptor.roster import Found, Ruling
from kvtransport.acceptor.sharing import SETTLE_S, MemoryChannel, target_of
from kvtransport.backends.base import LinkProof, StreamBackend, Target
from kvtransport.errors import (
    AuthenticationError,
    HandshakeError,
    KVTransportError,
    PeerLost,
    RemoteProtocolError,
    ResourceLimit,
)
from kvtransport.protocol.agreement import SessionDeclined, Terms
from kvtransport.protocol.handshake import Established, Event, PeerKnown
from kvtransport.protocol.messages import JOINS_NAME_RESPONDER, Hello, Role

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.acceptor.acceptor import Acceptor
    from kvtransport.connection import Connection

NEVER: Final = float("inf")


class Wanted(Protocol):
    """Who wants the try: a Dial."""

    expected: bytes | None
    connection: Connection | None

    def forget(self, connection: Connection) -> None:
        """Serve those no more who were given this Connection: it has ended."""

    def succeeded(self, connection: Connection) -> None:
        """Take the Connection of the session, or of another one with the same peer."""

    def yielded(self, reason: str) -> None:
        """Look again when the roster has changed, or after a pause."""

    def failed(
        self, reason: str, final: KVTransportError | None = None, *, short: bool = False, late: bool = False
    ) -> None:
        """Try elsewhere or later. `final`: an error that no try there will mend; `short`: of descriptors;
        `late`: it took as long as a try may.
        """


class State(enum.Enum):
    """Where a try is."""

    CONNECT = "the socket connects"
    PROVE = "the other end isn't known yet"
    TALK = "the handshake runs"
    WAIT = "another handshake with this peer goes first"
    JOIN = "the lanes are joined"
    OVER = "the outcome is told"


class Attempt:
    """One try. All methods are called by the acceptor's thread."""

    dialled = True

    def __init__(self, acceptor: Acceptor, wanted: Wanted, backend: StreamBackend, target: Target) -> None:
        self.state = State.CONNECT
        self.target = target
        self.hello: Hello | None = None
        self._acceptor = acceptor
        self._wanted = wanted
        self._backend = backend
        self._channel: Channel | None = None
        self._proof: LinkProof | None = None
        self._prove_s = proof.AGAIN_FIRST_S
        self._due = NEVER
        self._try_s = self._deadline = NEVER
        self._terms: Terms | None = None
        self._session: _native.Session | None = None
        self._lanes: list[Lane] = []
        self._shared: MemoryChannel | None = None
        self._settle_by = NEVER

    # --- for the Dial ------------------------------------------------------------------------------------

    def begin(self, try_s: float) -> None:
        """Dial; give up if the handshake isn't over after `try_s`, unless another one with the peer goes first."""
        try:
            self._backend.demand_allowed(self.target, self._acceptor.policy)
            sock = self._backend.dial(self.target)
        except OSError as e:
            self._fail_os(e)
            return
        except KVTransportError as e:
            self._fail(str(e), final=e)
            return
        machine = self._acceptor.machine(Role.INITIATOR, self._backend, self.target)
        machine.start()
        self._channel = Channel(sock, machine)
        self._try_s = try_s
        self._limit()
        self._acceptor.loop.watch(sock, selectors.EVENT_WRITE, self._on_connected)

    def on_time(self, now: float) -> None:
        """Do what is due."""
        if self._deadline <= now and self.state in (State.CONNECT, State.PROVE, State.TALK):
            self._fail(f"{self.target} took longer than {self._try_s:g} s: {self.state.value}", late=True)
        elif self._due <= now and self.state is State.PROVE:
            self._due = NEVER
            self._prove()

    def lane_awaited(self) -> str | None:
        """Say which lane it waits for, if the session is there already."""
        late = next((lane for lane in self._lanes if lane.state is not LaneState.JOINED), None)
        return None if late is None else f"lane {late.number} to {self.target} hasn't joined: {late.reason}"

    def on_roster(self) -> None:
        """Look again whether the peer is connected, or its entry free."""
        if self.state is not State.WAIT or self.hello is None:
            return
        connection = self._acceptor.roster.joined(
            self.hello.incarnation, self._wanted.connection, self.target.text
        )
        if connection is None:
            self._claim()
            return
        if self._channel is not None:
            self._channel.machine.refuse("session", "there is a session with this peer")
        self.drop()
        self._wanted.succeeded(connection)

    def on_session_lost(self, session_id: bytes) -> None:
        """Fail if that was ours, and its lanes weren't all there."""
        if self._session is not None and self._session.id == session_id:
            self._session = None
            if self._wanted.connection is not None:  # it has been told, and stays lost
                self._wanted.forget(self._wanted.connection)
            self._fail("the session was lost while its lanes were joined")

    def displace(self) -> None:
        """Give up: the peer's own dial goes first. Called with the roster locked."""
        self.drop(release=False)
        self._wanted.yielded("the peer's own dial goes first")

    def drop(self, *, release: bool = True) -> None:
        """End without telling the outcome."""
        self.state = State.OVER
        self._due = NEVER
        if self._channel is not None:
            self._acceptor.loop.unwatch(self._channel.sock)
            self._channel.close()
            self._channel = None
        for lane in (*self._lanes, *((self._shared,) if self._shared else ())):
            lane.close()
        self._lanes, self._shared = [], None
        if self._session is not None:
            self._session.close("local")
            self._session = None
        if release and self.hello is not None:
            self._acceptor.roster.release(self.hello.incarnation, self)

    # --- the steps ---------------------------------------------------------------------------------------

    def _on_connected(self) -> None:
        channel = self._talking()
        self._acceptor.loop.unwatch(channel.sock)
        try:
            self._backend.dialled(channel.sock)
        except OSError as e:
            self._fail_os(e)
            return
        self.state = State.PROVE
        self._prove()

    def _prove(self) -> None:
        channel = self._talking()
        try:
            policy = self._acceptor.policy
            self._proof = proof.ask(self._backend, channel.sock, policy, self._demand_open)
        except OSError as e:
            self._fail_os(e)
        except (AuthenticationError, RemoteProtocolError) as e:
            self._fail(str(e), final=e)
        else:
            if self._proof is None:
                self._wake_in(self._prove_s)
                self._prove_s = min(2 * self._prove_s, proof.AGAIN_LAST_S)
                return
            self._due = NEVER
            self.state = State.TALK
            channel.machine.proved()
            self._talk()

    def _demand_open(self, sock: socket.socket) -> None:
        """Find out whether an other end that isn't known is one that has closed, and whose it was."""
        try:
            if sock.recv(1, socket.MSG_PEEK):
                raise RemoteProtocolError(f"who listens at {self.target} spoke first: it isn't kvtransport")
        except BlockingIOError:
            return
        owner, ours = self._backend.owner(self.target), os.geteuid()
        if owner is not None and owner != ours:
            raise AuthenticationError(
                f"{self.target} belongs to uid {owner}, and we are uid {ours}; run both ends as one user, "
                "or give both a key"
            )
        raise OSError(errno.ECONNRESET, "the peer closed the connection without a word")

    def _talk(self) -> None:
        """Read, answer, wait for more."""
        channel = self._talking()
        try:
            events = channel.read()
            while events:
                for event in events:
                    self._take(event)
                events = channel.read() if self.state is State.TALK else []
            if self.state is not State.TALK:
                return
            channel.flush()
        except ClosedByPeer as e:
            self._fail(str(e))
        except SessionDeclined as e:
            self.drop()
            self._wanted.yielded(str(e))
        except ResourceLimit as e:
            self._fail(str(e))
        except (HandshakeError, RemoteProtocolError) as e:
            self._fail(str(e), final=e)
        else:
            if self._terms is not None and channel.settled():
                self._open(self._terms)
            else:
                self._acceptor.loop.watch(channel.sock, channel.interest(), self._talk)

    def _take(self, event: Event) -> None:
        if isinstance(event, PeerKnown):
            self.hello = event.hello
            self._decide(event.hello)
        elif isinstance(event, Established):
            self._terms = event.terms

    def _decide(self, hello: Hello) -> None:
        expected = self._wanted.expected
        if hello.incarnation == self._acceptor.incarnation:
            self._refuse(HandshakeError(f"{self.target} is this endpoint itself"))
        elif expected is not None and hello.incarnation != expected:
            reason = f"another endpoint is at {self.target} now than the descriptor's, which has ended"
            self._acceptor.retire_predecessors(hello, self.target.text)
            self._refuse(PeerLost(reason, cause="restarted"))
        else:
            self._claim()

    def _refuse(self, error: KVTransportError) -> None:
        self._talking().machine.refuse("session", "another endpoint was meant")
        self._fail(str(error), final=error)

    def _claim(self) -> None:
        """Ask the roster whether this handshake goes on."""
        channel, hello = self._talking(), self.hello
        if hello is None:
            return
        ruling = self._acceptor.roster.claim(hello.incarnation, self)
        if ruling is Ruling.GO:
            waited, self.state = self.state is State.WAIT, State.TALK
            channel.machine.proceed()
            if waited:
                self._limit()  # the time before was the other handshake's
                self._talk()
        elif ruling is Ruling.FULL:
            error = ResourceLimit("as many peers are connected as max_connections allows")
            channel.machine.refuse("limit", "too many peers")
            self._fail(str(error), final=error)
        elif self.state is not State.WAIT:
            self._acceptor.loop.unwatch(channel.sock)
            self.state = State.WAIT
            self._acceptor.loop.post(self.on_roster)

    def _open(self, terms: Terms) -> None:
        acceptor, sock = self._acceptor, self._talking().sock
        acceptor.loop.unwatch(sock)
        self._channel = None
        try:
            found = Found(terms, self._backend.name, self._proof, self.target.text)
            self._session = acceptor.open(sock, found, self._wanted)
        except (KVTransportError, OSError) as e:
            self._fail(str(e))
            return
        self.state = State.JOIN
        knows = terms.capabilities & JOINS_NAME_RESPONDER
        responder = terms.peer.incarnation if knows else b""
        self._lanes = [
            Lane(acceptor, self._backend, self.target, self._session, n, self._on_lane, responder)
            for n in range(terms.lanes)
        ]
        if self._session.channel()[0] == "awaited":
            where = target_of(found, self.target)
            self._shared = MemoryChannel(
                acceptor, self._backend, where, self._session, self._on_lane, responder
            )
            self._settle_by = acceptor.loop.now() + SETTLE_S
            self._shared.dial()
        for lane in list(self._lanes):
            lane.dial()

    def _on_lane(self) -> None:
        """Look whether all lanes are joined, or one never will be."""
        session, hello = self._session, self.hello
        if self.state is not State.JOIN or session is None or hello is None:
            return
        broken = next((lane.error for lane in self._lanes if lane.error), None)
        if broken is not None:
            self._fail(str(broken), final=broken)
        elif all(lane.state is LaneState.JOINED for lane in self._lanes) and self._shared_is_settled():
            self._acceptor.roster.made_ready(session.id)
            connection = self._acceptor.roster.joined(hello.incarnation, self._wanted.connection, None)
            if connection is None:
                return  # lost meanwhile: the engine's event is on its way
            self._session = None
            self.drop()
            self._wanted.succeeded(connection)

    def _shared_is_settled(self) -> bool:
        """Say whether the channel has come, won't come, or has taken too long; else look again soon."""
        loop = self._acceptor.loop
        if self._shared is None or self._shared.settled or loop.now() >= self._settle_by:
            return True
        if self._shared.state is LaneState.JOINED:  # the engine has it: a round trip is left
            loop.call_at(loop.now() + 0.001, lambda now: self._on_lane())
        else:
            loop.call_at(self._settle_by, lambda now: self._on_lane())
        return False

    def _limit(self) -> None:
        """Begin the time that the try may take."""
        self._deadline = self._acceptor.loop.now() + self._try_s
        self._acceptor.loop.call_at(self._deadline, self.on_time)

    def _wake_in(self, seconds: float) -> None:
        self._due = self._acceptor.loop.now() + seconds
        self._acceptor.loop.call_at(self._due, self.on_time)

    def _talking(self) -> Channel:
        if self._channel is None:
            raise RuntimeError(f"a try in state {self.state.name} has no channel")
        return self._channel

    def _fail_os(self, error: OSError) -> None:
        """Fail for a reason of the system; too few descriptors are told as such."""
        self._fail(error.strerror or str(error), short=error.errno in (errno.EMFILE, errno.ENFILE))

    def _fail(
        self, reason: str, final: KVTransportError | None = None, *, short: bool = False, late: bool = False
    ) -> None:
        self.drop()
        self._wanted.failed(reason, final, short=short, late=late)
