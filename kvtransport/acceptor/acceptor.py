"""The endpoint's acceptor: what its one Python thread does about peers.

Here: requests of users (listen, connect, accept) and events of the engine, each to the object that it
concerns; new sessions become Connections here. Not here: waiting (`loop`), tries (`dialler`, `attempt`),
strangers (`inbound`), who is connected (`roster`).

Invariant: there is one Connection per session, and it is in the roster before the engine can say anything
of it. What a peer sends ends at most its own handshake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol
from weakref import ref

from kvtransport.acceptor import direct, paths, sharing
from kvtransport.acceptor.arrivals import Arrivals, Throttle
from kvtransport.acceptor.dialler import Dial, Request
from kvtransport.acceptor.handover import open_session
from kvtransport.acceptor.inbound import Inbound
from kvtransport.acceptor.loop import Loop
from kvtransport.acceptor.places import Place, Places
from kvtransport.acceptor.reachability import here, visible_pid
from kvtransport.acceptor.roster import SILENT_S, Found, Roster
from kvtransport.backends.base import Listener, Policy, StreamBackend, Target
from kvtransport.backends.shm import listen_for_channels
from kvtransport.config import Config, available_cpus, default_lanes
from kvtransport.errors import ConnectionClosed, KVTransportError
from kvtransport.protocol import messages
from kvtransport.protocol.auth import NullSuite
from kvtransport.protocol.descriptor import Descriptor, demand_fits
from kvtransport.protocol.handshake import Handshake
from kvtransport.protocol.messages import Hello, Limits, Role, printable
from kvtransport.types import Peer, Protection

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.acceptor.attempt import Wanted
    from kvtransport.connection import Connection

_log = logging.getLogger("kvtransport.acceptor")
_native_log = logging.getLogger("kvtransport.native")

STOP_S: Final = 2.0
STRANGERS_TICK_S: Final = 0.05


class MakeConnection(Protocol):
    """How the endpoint makes a Connection; without a session it is connecting."""

    def __call__(self, peer: Peer, backend_name: str, session: _native.Session | None) -> Connection:
        """Return a new one."""


class Acceptor:
    """The peers of one Endpoint. Any thread may use the first part, its own thread the rest."""

    def __init__(
        self, engine: _native.Engine, incarnation: bytes, config: Config, make_connection: MakeConnection
    ) -> None:
        self.pid = os.getpid()
        self.engine = engine
        self.incarnation = incarnation
        self.policy = Policy(keyed=False, insecure=config.insecure)
        self.reachability = here()
        self.loop = Loop(f"kvtransport-{incarnation[:4].hex()}")
        self.roster = Roster(incarnation, self.reachability, config.max_connections)
        self.roster.on_change = self._roster_changed
        self.arrivals = Arrivals()
        self._config = config
        self._make_connection = make_connection
        self._places = Places(config.backends, config.require)
        self._lock = threading.Lock()  # of the five below
        self._ended = False
        self._listeners: dict[int, tuple[StreamBackend, Listener]] = {}
        self._advertised: list[str] = []
        self._premade: dict[Place, Connection] = {}
        self._counts = {"handshakes_accepted": 0, "handshakes_refused": 0}
        self._channels: socket.socket | None = None
        self._dials: dict[Place, Dial] = {}
        self._strangers: dict[Inbound, None] = {}  # oldest first
        self._throttle = Throttle(_log)
        self._roster_news = False

    # --- any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        if self._places.allows_inproc:
            self._places.inproc.enter(self.incarnation, self)
        self._take_channels()
        self.loop.watch(self.engine.event_fd(), selectors.EVENT_READ, self._on_engine)
        self.loop.start()

    def listen(self, where: str, advertise: Sequence[str]) -> str:
        """Listen at an address; return it with its real port. See Endpoint.listen."""
        backend = self._places.stream(where)
        for address in advertise:
            self._places.stream(address).check(address)
        listener = backend.listen(where, self.policy)
        try:
            addresses = list(advertise) or [listener.reachable_as]
            with self._lock:
                if self._ended:
                    raise ConnectionClosed("the endpoint is closed")
                if len(self._advertised) + len(addresses) > messages.ADDRESSES_MAX:
                    raise ValueError(f"an endpoint has at most {messages.ADDRESSES_MAX} addresses")
                # Peers refuse a HELLO or a descriptor out of its bounds, and with it this endpoint.
                messages.demand_addresses(addresses)
                demand_fits(Descriptor(self.incarnation, (*self._advertised, *addresses)))
                self._listeners[self.engine.add_listener(listener.fileno())] = (backend, listener)
                self._advertised += addresses
        except BaseException:
            listener.close()
            raise
        _log.info("listening at %s", listener.target)
        return listener.target.text

    def addresses(self) -> tuple[str, ...]:
        """Return where peers are told to find this endpoint."""
        with self._lock:
            return tuple(self._advertised)

    def connect(self, where: str | Sequence[str], timeout_s: float) -> Future[Connection]:
        """Return the Connection to who is at `where`, once there is a session."""
        place = self._places.parse(where)
        future: Future[Connection] = Future()
        connection = self._connected(place)
        request = Request(future, timeout_s, self.loop.now() + timeout_s)
        if connection is not None:
            future.set_result(connection)
        elif not self.loop.post(lambda: self._serve(place, request)):
            future.set_exception(ConnectionClosed("the endpoint is closed"))
        return future

    def connect_later(self, where: str | Sequence[str], timeout_s: float) -> Connection:
        """Return a Connection at once, which gets its session or fails within `timeout_s`."""
        place = self._places.parse(where)
        connection = self._connected(place)
        if connection is not None:
            return connection
        with self._lock:
            connection = self._premade.get(place)
            if connection is None or connection.state == "lost":
                peer = Peer(place.expected or b"", address=place.addresses[0])
                connection = self._premade[place] = self._make_connection(peer, "", None)
                connection._on_close = partial(self._on_close, place, ref(connection))  # no cycle
        request = Request(Future(), timeout_s, self.loop.now() + timeout_s, connection)
        if not self.loop.post(lambda: self._serve(place, request)):
            self.forget_early(place, connection)
            connection._fail(ConnectionClosed("the endpoint is closed"))
        return connection

    def forget_early(self, place: Place, connection: Connection | None) -> None:
        """Give a Connection that was made before its session to nobody else who asks for this place."""
        with self._lock:
            if connection is not None and self._premade.get(place) is connection:
                del self._premade[place]

    def stop(self) -> None:
        """End: who waits for a peer gets ConnectionClosed, listening sockets are closed. Idempotent."""
        self._places.inproc.leave(self.incarnation)
        self.arrivals.close()
        self.loop.stop(self._last, STOP_S)

    def drain(self) -> None:
        """After the engine's end: tell the Connections, close what strangers had sent no more than a
        preamble on.
        """
        for event in self.engine.poll_events():
            if event[0] == "accepted" and isinstance(event[2], int):
                os.close(event[2])
        for connection in self.roster.connections():
            connection._lost("local", "the endpoint was closed")

    def abandon(self) -> None:
        """In a forked child: close descriptors, touch nothing that the parent uses."""
        self.loop.abandon()
        for _, listener in self._listeners.values():
            listener.abandon()
        if self._channels is not None:
            self._channels.close()

    def stats(self) -> dict[str, int]:
        """Return counters: strangers let in, refused and timed out, tries that failed."""
        with self._lock:
            return dict(self._counts)

    def hello(self, protection: Protection) -> Hello:
        """Return what we say of ourselves on a connection that must have at least `protection`."""
        config = self._config
        return Hello(
            incarnation=self.incarnation,
            version_min=messages.VERSION_MIN,
            version_max=messages.VERSION_MAX,
            protection=config.protection or protection,
            lanes=config.lanes or default_lanes(available_cpus()),
            chunk_nbytes=config.chunk_nbytes or messages.CHUNK_MAX_NBYTES,
            reachability=self.reachability,
            name=self.reachability.hostname,
            capabilities=messages.CAPABILITIES,
            addresses=self.addresses(),
            features=self._places.names,
            limits=Limits(
                max_unmatched=config.max_unmatched,
                max_regions=config.max_regions,
                max_message_queue_nbytes=config.max_message_queue_nbytes,
            ),
        )

    def open(self, sock: socket.socket, found: Found, wanted: Wanted | None) -> _native.Session:
        """Hand a control connection whose handshake is over to the engine, and make a Connection of it."""
        peer_pid = visible_pid(self.reachability, found.hello.reachability)
        refusal, _ = sharing.why_not(found, self.reachability, self._places.names)
        with self.roster.lock:
            session = open_session(
                self.engine,
                sock,
                found.terms,
                self._config,
                backend=found.backend_name,
                peer_pid=peer_pid,
                shared_memory=not refusal,
            )
            peer = self.adopt(session, found, wanted, ready=wanted is None)
        self.log_path(peer, found)
        return session

    def log_path(self, peer: Peer, found: Found) -> None:
        """Tell of a new session; holding no lock, as a handler may be slow."""
        paths.log(peer, found, self._places, self.reachability)

    def adopt(self, session: _native.Session, found: Found, wanted: Wanted | None, *, ready: bool) -> Peer:
        """Make a new session a Connection, and put it in the roster, whose lock is held.

        `wanted`: the Dial that it is for; None: the peer has dialled us. `log_path` is for afterwards.
        """
        hello, address = found.hello, found.address
        self.retire_predecessors(hello, address)
        peer = Peer(
            incarnation=hello.incarnation,
            identity=found.terms.identity,
            address=address or next(iter(hello.addresses), "no address told"),
            pid=visible_pid(self.reachability, hello.reachability) or None,
            uid=found.proof.uid if found.proof else None,
        )
        waiting = [wanted] if wanted else self._waiting_for(hello.incarnation)
        made_before = (w.connection for w in waiting if w.connection is not None)
        name = found.backend_name
        connection = next((c for c in made_before if c._attach(session, peer=peer, backend_name=name)), None)
        if connection is None:
            connection = self._make_connection(peer, name, session)
        self.roster.opened(found, session, connection, ready=ready)
        if not waiting:
            self.arrivals.put(connection)
        return peer

    def paths(self, connection: Connection) -> list[str]:
        """Return which way a Connection's bytes go, and why others are refused: lines for
        Connection.explain.
        """
        found = self.roster.found(connection)
        return (
            [] if found is None else paths.lines(found, self._places, self.reachability, connection.shared())
        )

    def _waiting_for(self, incarnation: bytes) -> list[Dial]:
        return [dial for dial in list(self._dials.values()) if dial.wants(incarnation)]

    def retire_predecessors(self, hello: Hello, address: str | None) -> None:
        """Tell the Connections of earlier incarnations, whose place a peer has taken, that they are gone.

        Who may live behind the same address is looked at once more: called by the thread, if there is an address.
        """
        self._retire(hello, address)
        if self.roster.has_rivals(hello, address):
            self._look_later(hello, address)

    def _look_later(self, hello: Hello, address: str | None) -> None:
        due = self.loop.now() + SILENT_S

        def look(now: float) -> None:
            if now - due > SILENT_S / 2:  # this process stood still: it hasn't heard what was said meanwhile
                self._look_later(hello, address)
            else:
                self._retire(hello, address)

        self.loop.call_at(due, look)

    def _retire(self, hello: Hello, address: str | None) -> None:
        sessions, connections = self.roster.predecessors(hello, address)
        for connection in connections:
            connection._lost("restarted", f"another endpoint is in its place: {hello.incarnation[:4].hex()}")
        for session in sessions:
            session.close("restarted")

    # --- for dials and strangers, in the loop's thread ---------------------------------------------------

    def machine(self, role: Role, backend: StreamBackend, target: Target) -> Handshake:
        """Return the handshake of a connection to, or accepted at, `target`."""
        return Handshake(role, self.hello(backend.default_protection(target)), NullSuite())

    def resolve(
        self, address: str, done: Callable[[StreamBackend, Sequence[Target] | OSError], None]
    ) -> None:
        """See Places.resolve."""
        self._places.resolve(self.loop, address, done)

    def is_direct(self, address: str) -> bool:
        """Say whether it is one of an endpoint in this process."""
        return self._places.direct(address) is not None

    def join_direct(self, address: str, wanted: Wanted) -> tuple[Connection | None, str]:
        """Join the endpoint at a direct address; see `direct.join`."""
        other = self._places.inproc.find(self._places.inproc.incarnation_at(address))
        if other is None:
            return None, f"no endpoint of this process has the address {address}"
        return direct.join(self, other, wanted)

    def dial_over(self, dial: Dial) -> None:
        """Forget a Dial that has its outcome."""
        if self._dials.get(dial.place) is dial:
            del self._dials[dial.place]

    def inbound_over(self, inbound: Inbound, reason: str | None, expected: bool) -> None:
        """Forget a stranger. `reason`: None for one that has become a peer. `expected`: nobody did wrong."""
        self._strangers.pop(inbound, None)
        self.count("handshakes_refused" if reason else "handshakes_accepted")
        if reason and expected:
            _log.debug("no session with %s: %s", inbound.host, printable(reason, 400))
        elif reason:
            self._throttle.warning("refused a connection from %s: %s", inbound.host, printable(reason, 400))

    def count(self, what: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[what] = self._counts.get(what, 0) + 1

    def _take_channels(self) -> None:
        """Listen for peers of this host that would share memory; natively, since they come to open sessions."""
        if "shm" not in self._places.names:
            return
        try:
            self._channels = listen_for_channels(self.incarnation)
            self.engine.add_listener(self._channels.fileno())
        except (OSError, KVTransportError) as e:
            _log.warning("no memory can be shared with peers that dial this endpoint by TCP: %s", e)

    # --- connecting --------------------------------------------------------------------------------------

    def _connected(self, place: Place) -> Connection | None:
        if place.expected is not None:
            return self.roster.joined(place.expected, None, None)
        found = (self.roster.at(address) for address in place.addresses)
        return next((connection for connection in found if connection is not None), None)

    def _serve(self, place: Place, request: Request) -> None:
        if request.connection is not None and request.connection.state == "lost":
            return  # closed before its first try
        dial = self._dials.get(place)
        if dial is None:
            dial = self._dials[place] = Dial(self, place)
        request.future.add_done_callback(partial(self._on_cancel, dial))
        with self._lock:
            premade = self._premade.get(place)
        if premade is not None and premade.state == "connecting":  # else what the dial has was closed
            dial.connection = premade
        dial.add(request)
        dial.on_roster()
        dial.on_time(self.loop.now())

    def _on_cancel(self, dial: Dial, future: Future[Connection]) -> None:
        """End a Dial whose last request was cancelled. Called by whoever settles the future."""
        if future.cancelled():
            self.loop.post(lambda: dial.on_time(self.loop.now()))

    def _on_close(self, place: Place, closed: ref[Connection]) -> None:
        """A Connection that was made before its session is closed: end its Dial, if nobody else waits."""
        connection = closed()
        if connection is None:
            return
        self.forget_early(place, connection)

        def forget() -> None:
            dial = self._dials.get(place)
            if dial is not None:
                dial.forget(connection)

        self.loop.post(forget)

    # --- what happens ------------------------------------------------------------------------------------

    def _on_engine(self) -> None:
        for event in self.engine.poll_events():
            self.loop.guard(partial(self._take, event))

    def _take(self, event: tuple[object, ...]) -> None:
        match event:
            case ("accepted", int(listener_id), int(fd), bytes(preamble)):
                self._accepted(listener_id, fd, preamble)
            case ("lost", bytes(session_id), str(cause), str(detail)):
                for connection in self.roster.lost(session_id):
                    connection._lost(cause, detail)
                for dial in list(self._dials.values()):
                    dial.on_session_lost(session_id)
            case ("dropped", bytes(session_id), int(count)):
                self._throttle.warning(
                    "%d messages of %s, which is lost, were dropped: what waits for recv_messages is beyond "
                    "max_protocol_nbytes",
                    count,
                    sender.peer if (sender := self.roster.sender(session_id, count)) else "a peer",
                )
            case ("channel", bytes(session_id), str(news), str(why)):
                paths.follow_shared(self.loop, self.roster, session_id, news, why)
            case ("log", int(level), str(message)):
                _native_log.log(level, "%s", message)

    def _accepted(self, listener_id: int, fd: int, preamble: bytes) -> None:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        with self._lock:
            backend, listener = self._listeners.get(listener_id, (None, None))
        if backend is None or listener is None:
            sock.close()
            return
        try:
            host = backend.accepted(sock)
        except OSError:
            sock.close()
            return
        machine = self.machine(Role.RESPONDER, backend, listener.target)
        inbound = Inbound(self, backend, sock, machine, host)
        inbound.deadline = self.loop.waited_s + self._config.handshake_timeout_s
        if not self._strangers:
            self.loop.call_at(self.loop.now() + STRANGERS_TICK_S, self._check_strangers)
        self._strangers[inbound] = None
        inbound.begin(preamble)
        self._limit_strangers(host)

    def _limit_strangers(self, host: str) -> None:
        """Close the oldest of those that nothing has proved, where there are too many."""
        anonymous = [s for s in self._strangers if s.anonymous]
        alike = [s for s in anonymous if s.host == host]
        if len(alike) > self._config.max_pending_handshakes_per_address:
            alike[0].end("too many handshakes at once from one address")
        elif len(anonymous) > self._config.max_pending_handshakes:
            anonymous[0].end("too many handshakes at once")

    def _check_strangers(self, now: float) -> None:
        """Close those whose time is over; while there are any this comes again, so that waits are short."""
        for inbound in list(self._strangers):
            if inbound.deadline > self.loop.waited_s:
                break
            inbound.end(f"no handshake within {self._config.handshake_timeout_s:g} s")
        if self._strangers:
            self.loop.call_at(now + STRANGERS_TICK_S, self._check_strangers)

    def _roster_changed(self) -> None:
        if not self._roster_news:
            self._roster_news = self.loop.post(self._tell_dials)

    def _tell_dials(self) -> None:
        self._roster_news = False
        for dial in list(self._dials.values()):
            dial.on_roster()

    def _last(self) -> None:
        """End everything; the thread's last call."""
        closed = ConnectionClosed("the endpoint was closed")
        for dial in list(self._dials.values()):
            dial.end(closed)
        for inbound in list(self._strangers):
            inbound.end("the endpoint was closed", expected=True)
        with self._lock:
            self._ended = True  # from here on nobody adds one
        for listener_id, (_, listener) in self._listeners.items():
            with contextlib.suppress(KVTransportError):
                self.engine.remove_listener(listener_id)
            listener.close()
        if self._channels is not None:
            self._channels.close()
