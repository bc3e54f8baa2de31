"""Reaching one peer: every address in turn, again and again, until it is connected or nobody waits for it
any more.

Here: who waits and for how long, addresses and names, rounds and pauses. Not here: a single try
(`attempt`), the thread (`loop`).

Theory of operation: a Dial serves all who want one place. It goes in rounds through its addresses; a name
is resolved on a thread of its own. A try that fails leads to the next address, and the end of a round to a
pause, 20 ms at first, 500 ms at last. Errors that no further try will mend (another user, disjoint
versions, another protocol) end the Dial, after its round.

Invariant: each request gets exactly one outcome, by its deadline. A Dial that is over holds nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtransport.acceptor.attempt import NEVER, Attempt
from kvtransport.acceptor.places import Place
from kvtransport.backends.base import StreamBackend, Target
from kvtransport.errors import ConfigError, ConnectTimeout, KVTransportError, ResourceLimit
from kvtransport.protocol.messages import Hello

if TYPE_CHECKING:
    from kvtransport.acceptor.acceptor import Acceptor
    from kvtransport.connection import Connection

PAUSE_FIRST_S: Final = 0.02
PAUSE_LAST_S: Final = 0.5
TRY_S: Final = 1.0
"""How long one address may take, from the dial to the end of the handshake, where there are others to try.
Twice as long after each round in which one took that long: a peer may be slow. Up to TRY_LAST_S: no address
is silent for the others' whole time.
"""
TRY_LAST_S: Final = 8.0


@dataclass(eq=False)
class Request:
    """One who waits for the peer. `connection`: what he was given already (`connect(wait=False)`)."""

    future: Future[Connection]
    timeout_s: float
    deadline: float
    connection: Connection | None = None


class Dial:
    """All tries to reach one peer, for all who want it."""

    def __init__(self, acceptor: Acceptor, place: Place) -> None:
        self.place = place
        self.expected = place.expected
        self.connection: Connection | None = None  # made before its session, for connect(wait=False)
        self.over = False
        self._acceptor = acceptor
        self._requests: list[Request] = []
        self._timeout_s = 0.0  # of the last request
        self._due = 0.0
        self._pause_s = PAUSE_FIRST_S
        self._try_s = TRY_S
        self._late = False  # a try of this round took that long
        self._several = len(place.addresses) > 1
        self._addresses_left: deque[str] = deque()
        self._targets_left: deque[tuple[StreamBackend, Target]] = deque()
        self._attempt: Attempt | None = None
        self._met: Hello | None = None  # whom the last try has found, to be looked for in the roster
        self._reason = "no try was made"
        self._final: KVTransportError | None = None
        self._short = False  # of descriptors: why the last try failed

    # --- for the loop ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Serve one more."""
        self._requests.append(request)
        self._timeout_s = request.timeout_s
        self._acceptor.loop.call_at(request.deadline, self.on_time)

    def forget(self, connection: Connection) -> None:
        """Serve those no more who were given this Connection: it has ended."""
        if self.connection is connection:
            self._let_go()
        self._requests = [request for request in self._requests if request.connection is not connection]
        self._expire(self._acceptor.loop.now())

    def wants(self, incarnation: bytes) -> bool:
        """Say whether it is known that this peer is the one, and not all who waited have closed what they got."""
        if all(r.connection is not None and r.connection.state == "lost" for r in self._requests):
            return False
        met = self._attempt.hello if self._attempt else self._met
        return incarnation == (met.incarnation if met else self.expected)

    def on_time(self, now: float) -> None:
        """Expire who has waited long enough; go on with what is due."""
        self._expire(now)
        if not self.over and self._attempt is None and self._due <= now:
            self._due = NEVER
            self._addresses_left.extend(self.place.addresses)
            self._final = None
            self._next()

    def on_roster(self) -> None:
        """Look whether the peer has been connected in another way."""
        if self._attempt is not None:
            self._attempt.on_roster()
        elif not self.over and (self._met or self.expected):
            wanted = self._met.incarnation if self._met else self.expected or b""
            connection = self._acceptor.roster.joined(wanted, self.connection, None)
            if connection is not None:
                self.succeeded(connection)

    def on_session_lost(self, session_id: bytes) -> None:
        """Tell the try."""
        if self._attempt is not None:
            self._attempt.on_session_lost(session_id)

    def end(self, error: KVTransportError) -> None:
        """Fail all who wait."""
        self._finish(error)

    # --- outcomes of a try -------------------------------------------------------------------------------

    def succeeded(self, connection: Connection) -> None:
        """Give it to all who wait."""
        self._finish(connection)

    def yielded(self, reason: str) -> None:
        """Pause; the roster may bring the peer before that is over."""
        self._end_try(reason)
        self._targets_left.clear()
        self._addresses_left.clear()
        self._pause()
        self._acceptor.loop.post(self.on_roster)

    def failed(
        self, reason: str, final: KVTransportError | None = None, *, short: bool = False, late: bool = False
    ) -> None:
        """Go on with the next address."""
        self._end_try(reason)
        self._short, self._late = short, self._late or late
        self._final = final or self._final
        self._next()

    def _end_try(self, reason: str) -> None:
        if self._attempt is not None:
            self._met = self._attempt.hello
            self._attempt = None
        self._reason = reason

    # --- rounds ------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """Try the next address; after the last, end or pause."""
        if self.over:
            return
        if self._targets_left:
            backend, target = self._targets_left.popleft()
            self._attempt = Attempt(self._acceptor, self, backend, target)
            self._attempt.begin(self._try_s if self._several else NEVER)
        elif self._addresses_left:
            self._find(self._addresses_left.popleft())
        elif self._final is not None:
            self._finish(self._final)
        else:
            self._pause()

    def _pause(self) -> None:
        self._due = self._acceptor.loop.now() + self._pause_s
        self._acceptor.loop.call_at(self._due, self.on_time)
        self._pause_s = min(2 * self._pause_s, PAUSE_LAST_S)
        if self._late:
            self._try_s, self._late = min(2 * self._try_s, TRY_LAST_S), False

    def _find(self, where: str) -> None:
        """Make targets of an address, or join an endpoint of this process."""
        acceptor = self._acceptor
        try:
            if acceptor.is_direct(where):
                connection, reason = acceptor.join_direct(where, self)
                if connection is not None:
                    self.succeeded(connection)
                else:
                    self.failed(reason)
                return
            acceptor.resolve(where, self._found)
        except KVTransportError as e:
            self.failed(str(e), e)
        except ValueError as e:
            self.failed(str(e), ConfigError(str(e)))

    def _found(self, backend: StreamBackend, targets: Sequence[Target] | OSError) -> None:
        if isinstance(targets, Exception):
            self.failed(str(targets))
        else:
            self._several = self._several or len(targets) > 1
            self._targets_left.extend((backend, target) for target in targets)
            self._next()

    # --- ends --------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        """Let go of who has waited long enough or has stopped; end when none is left."""
        for request in list(self._requests):
            if request.future.cancelled():
                self._requests.remove(request)
            elif request.deadline <= now:
                self._requests.remove(request)
                _settle(request.future, self._timed_out(request.timeout_s))
                self._expire_early(request)
        if not self._requests and not self.over:
            self._finish(self._timed_out(self._timeout_s))

    def _expire_early(self, request: Request) -> None:
        """Fail a Connection whose last request has waited long enough, though others wait for the peer."""
        early = request.connection
        if early is None or early is not self.connection or early.state != "connecting":
            return
        if all(other.connection is not early for other in self._requests):
            self._let_go()
            early._fail(self._timed_out(request.timeout_s))

    def _let_go(self) -> None:
        self._acceptor.forget_early(self.place, self.connection)
        self.connection = None

    def _timed_out(self, timeout_s: float) -> KVTransportError:
        where = " or ".join(self.place.addresses)
        reason = (self._attempt and self._attempt.lane_awaited()) or self._reason
        message = f"no connection to {where} within {timeout_s:g} s; the last try: {reason}"
        if self._short:
            return ResourceLimit(message + "; raise the limit (ulimit -n)")
        return ConnectTimeout(message)

    def _finish(self, outcome: Connection | KVTransportError) -> None:
        if self.over:
            return
        self.over = True
        self._due = NEVER
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.drop()
        if self.connection is not None and isinstance(outcome, KVTransportError):
            self.connection._fail(outcome)
        for request in self._requests:
            _settle(request.future, outcome)
        self._requests.clear()
        self._let_go()
        self._acceptor.dial_over(self)


def _settle(future: Future[Connection], outcome: Connection | KVTransportError) -> None:
    """Give a future its outcome, unless who waited has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, KVTransportError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
