"""Who an Endpoint is connected to, and which of two sessions with one peer stays.

Here: one entry per peer incarnation: the handshake that holds it, then its session and its Connections. Not
here: sockets, time, what is done with a session.

Theory of operation: a session exists once its initiator has confirmed it (`protocol.handshake`). A
handshake must hold the entry of its peer before it goes on from DECIDE, the initiator's before its HELLO,
the responder's before ACCEPT. So at most one session per pair is confirmed, since each end gives its entry
to one handshake at a time:

- Where a session is open, an initiator drops its dial and uses it, a responder refuses ("session").
- Where the peer's dial holds the entry, our own waits for its outcome. A newer dial of the same peer takes
  its place: the peer has given up the older one.
- Where our own dial holds it and the peer dials: the session dialled by the lower incarnation stays. The
  lower end refuses ("session"); the higher end gives its dial up, which it has not confirmed, and waits for
  the peer's.

Invariant: an entry has a holder or a session or neither, never both; a session id maps to its Connections
until they are forgotten. All methods are thread-safe.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from kvtransport.acceptor.reachability import has_ended, same_network
from kvtransport.backends.base import LinkProof
from kvtransport.protocol.agreement import Terms
from kvtransport.protocol.messages import Hello, Reachability

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.connection import Connection

REMEMBERED: Final = 256
"""Lost Connections that are still known, to tell them of a restart."""
SILENT_S: Final = 0.5
"""Who has said nothing for so long may be gone: two of the pings that he would send (native/engine/engine.hpp)."""


class Holder(Protocol):
    """A handshake that may hold an entry."""

    @property
    def dialled(self) -> bool:
        """Whether this end dialled it."""

    def displace(self) -> None:
        """Give up: another handshake with this peer goes first. Called with the roster locked."""


@dataclass(frozen=True)
class Found:
    """A peer with whom there is a session. `address`: where we dialled it; None: it dialled us."""

    terms: Terms
    backend_name: str
    proof: LinkProof | None
    address: str | None

    @property
    def hello(self) -> Hello:
        """What the peer says of itself."""
        return self.terms.peer


class Ruling(enum.Enum):
    """What a handshake does that knows its peer."""

    GO = "go on"
    WAIT = "wait until another handshake with this peer is over"
    CONNECTED = "a session is open"
    CROSSING = "our own dial goes first"
    FULL = "too many peers"


@dataclass(eq=False)
class Entry:
    """One peer incarnation."""

    incarnation: bytes
    holder: Holder | None = None
    session: _native.Session | None = None
    ready: bool = False
    found: Found | None = None
    dialled: set[str] = field(default_factory=set)  # addresses where we have found it
    connections: list[Connection] = field(default_factory=list)
    messages_taken: int = 0

    def usable(self) -> bool:
        """Say whether its Connections can be given out: its lanes are there, and it isn't just ending."""
        return self.ready and all(connection.state != "lost" for connection in self.connections)


@dataclass
class Lost:
    """A Connection whose session is lost, while messages of it wait for `Endpoint.recv_messages`."""

    connection: Connection
    messages_waiting: int


class Roster:
    """The peers of one Endpoint."""

    def __init__(self, ours: bytes, reachability: Reachability, max_peers: int) -> None:
        self.lock = threading.RLock()
        self.on_change: Callable[[], None] = _ignore  # called when a waiting dial may go on; the lock is held
        self._ours = ours
        self._reachability = reachability
        self._max_peers = max_peers
        self._entries: dict[bytes, Entry] = {}
        self._by_session: dict[bytes, Entry] = {}
        self._lost: dict[bytes, Lost] = {}
        self._past: deque[tuple[Entry, weakref.ref[Connection]]] = deque(maxlen=REMEMBERED)

    # --- handshakes --------------------------------------------------------------------------------------

    def claim(self, incarnation: bytes, claimant: Holder, *, polite: bool = False) -> Ruling:
        """Ask to hold a peer's entry. `polite`: displace nobody, rather WAIT."""
        with self.lock:
            entry = self._entries.get(incarnation)
            if entry is None:
                if len(self._entries) >= self._max_peers:
                    return Ruling.FULL
                entry = self._entries[incarnation] = Entry(incarnation)
            if entry.session is not None:
                return Ruling.CONNECTED
            if entry.holder is claimant:
                return Ruling.GO
            if entry.holder is not None:
                if claimant.dialled or polite:
                    return Ruling.WAIT
                if entry.holder.dialled and self._ours < incarnation:
                    return Ruling.CROSSING
                entry.holder.displace()
                self.on_change()
            entry.holder = claimant
            return Ruling.GO

    def release(self, incarnation: bytes, claimant: Holder) -> None:
        """Give an entry up without a session. Nothing happens if another holds it."""
        with self.lock:
            entry = self._entries.get(incarnation)
            if entry and entry.holder is claimant:
                entry.holder = None
                self.on_change()
                self._forget_if_idle(entry)

    # --- sessions ----------------------------------------------------------------------------------------

    def opened(self, found: Found, session: _native.Session, connection: Connection, *, ready: bool) -> None:
        """Put a session in its holder's place. `ready`: all lanes are there, or come by themselves."""
        incarnation = found.hello.incarnation
        with self.lock:
            entry = self._entries.setdefault(incarnation, Entry(incarnation))
            entry.holder, entry.session, entry.found, entry.ready = None, session, found, ready
            entry.connections = [connection]
            if found.address:
                entry.dialled.add(found.address)
            self._by_session[session.id] = entry
            self.on_change()

    def made_ready(self, session_id: bytes) -> bool:
        """Say that all lanes are there; False if the session is lost already."""
        with self.lock:
            entry = self._by_session.get(session_id)
            if entry is None:
                return False
            entry.ready = True
            self.on_change()
            return True

    def joined(
        self, incarnation: bytes, connection: Connection | None, address: str | None
    ) -> Connection | None:
        """Return the Connection of a ready session; let `connection` and `address` stand for it as well."""
        with self.lock:
            entry = self._entries.get(incarnation)
            if entry is None or entry.session is None or not entry.usable():
                return None
            if address:
                entry.dialled.add(address)
            if connection is None or connection in entry.connections:
                return connection or entry.connections[0]
            name = entry.found.backend_name if entry.found else ""
            if not connection._attach(entry.session, peer=entry.connections[0].peer, backend_name=name):
                return entry.connections[0]  # it was closed meanwhile
            entry.connections.append(connection)
            return connection

    def at(self, address: str) -> Connection | None:
        """Return the Connection to who was found, or says to listen, at an address."""
        with self.lock:
            for entry in self._entries.values():
                if entry.usable() and (address in entry.dialled or address in self._listens_at(entry)):
                    return entry.connections[0]
        return None

    def lost(self, session_id: bytes) -> list[Connection]:
        """Take a session out; return its Connections."""
        with self.lock:
            entry = self._by_session.pop(session_id, None)
            if entry is None:
                return []
            connections, entry.connections = entry.connections, []
            session, entry.session, entry.ready = entry.session, None, False
            received = session.stats()["messages_received"] if session is not None else 0
            if (waiting := received - entry.messages_taken) > 0:
                self._lost[session_id] = Lost(connections[0], waiting)
            past = Entry(entry.incarnation, found=entry.found, dialled=entry.dialled)
            self._past.extend((past, weakref.ref(c)) for c in connections)
            self.on_change()
            self._forget_if_idle(entry)
            return connections

    def sender(self, session_id: bytes, count: int = 1) -> Connection | None:
        """Return whose messages were taken from the engine, `count` of them: of a session that may be lost by now.

        To be called for each message, once: a lost Connection is kept until the last one that has come.
        """
        with self.lock:
            entry = self._by_session.get(session_id)
            if entry is not None:
                entry.messages_taken += count
                return entry.connections[0]
            lost = self._lost.get(session_id)
            if lost is None:
                return None
            lost.messages_waiting -= count
            if lost.messages_waiting <= 0:
                del self._lost[session_id]
            return lost.connection

    def of_session(self, session_id: bytes) -> list[Connection]:
        """Return the Connections of a session that isn't lost."""
        with self.lock:
            entry = self._by_session.get(session_id)
            return [] if entry is None else list(entry.connections)

    def found(self, connection: Connection) -> Found | None:
        """Return how a Connection's session came about; None: it has none."""
        with self.lock:
            entry = self._entries.get(connection.peer.incarnation)
            return entry.found if entry is not None and connection in entry.connections else None

    def connections(self) -> list[Connection]:
        """Return those with a session."""
        with self.lock:
            return [c for entry in self._entries.values() for c in entry.connections]

    def predecessors(
        self, hello: Hello, address: str | None
    ) -> tuple[list[_native.Session], list[Connection]]:
        """Return the sessions and Connections of earlier incarnations that a new peer has taken the place of.

        It has if it says to listen where they did, and either their process is seen to be gone, or we have
        dialled it there, where we had found them, and they are lost or silent. What two say of themselves
        proves nothing, nor that one is found where the other was: both may live, behind one name or address.
        """
        with self.lock:
            sessions = [
                entry.session
                for entry in self._entries.values()
                if entry.session is not None and self._replaces(hello, address, entry)
            ]
            connections = [
                c for e in self._entries.values() if self._replaces(hello, address, e) for c in e.connections
            ]
            for entry, ref in self._past:
                connection = ref()
                if connection is not None and self._replaces(hello, address, entry):
                    connections.append(connection)
            return sessions, connections

    def has_rivals(self, hello: Hello, address: str | None) -> bool:
        """Say whether others are open who were found where a new peer is: they may fall silent soon."""
        with self.lock:
            return any(
                entry.session is not None and _is_where(hello, address, entry)
                for entry in self._entries.values()
            )

    def _replaces(self, hello: Hello, address: str | None, entry: Entry) -> bool:
        if not _shared(hello, entry) or entry.found is None:
            return False
        if has_ended(self._reachability, entry.found.hello.reachability):
            return True
        silent = entry.session is None or entry.session.silent_s() >= SILENT_S
        return silent and _is_where(hello, address, entry)

    def _listens_at(self, entry: Entry) -> tuple[str, ...]:
        """Return the addresses that a peer told, if they mean the same here."""
        if entry.found is None or not same_network(entry.found.hello.reachability, self._reachability):
            return ()
        return entry.found.hello.addresses

    def _forget_if_idle(self, entry: Entry) -> None:
        if entry.holder is None and entry.session is None:
            self._entries.pop(entry.incarnation, None)


def _shared(hello: Hello, entry: Entry) -> set[str]:
    """Return the addresses where a new peer and an earlier one say to listen."""
    if entry.incarnation == hello.incarnation or entry.found is None:
        return set()
    return set(hello.addresses) & set(entry.found.hello.addresses)


def _is_where(hello: Hello, address: str | None, entry: Entry) -> bool:
    """Say whether the new peer was dialled at one of these, and the earlier one had been found there."""
    return address in entry.dialled and address in _shared(hello, entry)


def _ignore() -> None:
    """Nobody wants to know yet."""
