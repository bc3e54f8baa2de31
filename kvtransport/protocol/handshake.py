"""The handshake of a control connection, both roles, as a machine without I/O.

Here: states, their order, what the two sides agree on. Not here: the bytes (`messages`), who the peer is
(`auth`), sockets, deadlines, and whether a second session with the same peer is wanted (the driver says
so).

Theory of operation: each side first has the link proved (PROOF: the driver answers
`proved`, at once where the suite itself proves the peer), and says nothing before. Then the suite's
fixed-size messages are exchanged, then records: the responder's HELLO, the initiator's, ACCEPT, CONFIRM. A
side that knows the peer's HELLO asks its driver whether to go on (DECIDE), so that of two sessions with one
peer at most one is confirmed. The session exists from CONFIRM on: the initiator is established when it
sends it, the responder when it reads it.

    initiator                                       responder
    IDLE --start--> PROOF --proved-->
    SUITE           preamble, suite message ->      PREAMBLE --> PROOF --proved--> SUITE
    HELLO           <- suite message, HELLO         HELLO
    DECIDE --proceed--> HELLO ->                    DECIDE --proceed-->
    ACCEPT          <- ACCEPT                       CONFIRM
    ESTABLISHED     CONFIRM ->                      ESTABLISHED

`wants()` says how many more bytes complete the next message. The driver reads no more than that, so nothing
of the frames that follow CONFIRM is consumed. 0 means: don't read now. A method that takes input returns
events; bytes to send are collected by `outgoing()`. When something is wrong the method raises a
KVTransportError, the state is FAILED, and `outgoing()` may hold a REJECT that is worth sending before the
close.

Invariant: `transition_table` is complete: input that `_TRANSITIONS` doesn't list for a state is the peer's
error (RemoteProtocolError, FAILED) or the driver's (LocalProtocolError, nothing changes). Nothing is sent
before PROOF is passed.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

from kvtransport.errors import (
    AuthenticationError,
    HandshakeError,
    KVTransportError,
    LocalProtocolError,
    RemoteProtocolError,
)
from kvtransport.protocol import messages
from kvtransport.protocol.agreement import Terms, Unfit, agree, check_accept, error_of, unfit
from kvtransport.protocol.auth import Suite
from kvtransport.protocol.messages import Accept, Confirm, Hello, Kind, Preamble, Reject, Role

_T = TypeVar("_T")


class State(enum.Enum):
    """Where a handshake is. A state that awaits a message is named for it."""

    IDLE = "IDLE"
    PREAMBLE = "PREAMBLE"
    PROOF = "PROOF"
    SUITE = "SUITE"
    HELLO = "HELLO"
    DECIDE = "DECIDE"
    ACCEPT = "ACCEPT"
    CONFIRM = "CONFIRM"
    ESTABLISHED = "ESTABLISHED"
    FAILED = "FAILED"


class Input(enum.Enum):
    """What can happen to a handshake: from its driver (lower case), from the peer."""

    START = "start"
    PROVED = "proved"
    PROCEED = "proceed"
    REFUSE = "refuse"
    PREAMBLE = "PREAMBLE"
    SUITE_MORE = "SUITE, not the peer's last"
    SUITE_LAST = "SUITE, the peer's last"
    HELLO = "HELLO"
    ACCEPT = "ACCEPT"
    REJECT = "REJECT"
    CONFIRM = "CONFIRM"
    CLOSE = "CLOSE"
    MALFORMED = "MALFORMED"


@dataclass(frozen=True, slots=True)
class ProveLink:
    """Find out who is at the other end of the link, then call `proved` or `refuse`.

    `needed`: no key will prove it.
    """

    needed: bool


@dataclass(frozen=True, slots=True)
class PeerKnown:
    """The peer's HELLO fits ours: call `proceed`, or `refuse` a session that isn't wanted."""

    hello: Hello
    identity: str | None


@dataclass(frozen=True, slots=True)
class Established:
    """Over, with a session. Send `outgoing()`; what comes after it on this connection are frames."""

    terms: Terms


Event: TypeAlias = ProveLink | PeerKnown | Established


class Handshake:
    """One handshake. Give it bytes and decisions; take bytes and events. Not thread-safe; used once."""

    def __init__(
        self, role: Role, hello: Hello, suite: Suite, *, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        """`hello`: what we say of ourselves. `entropy(n)`: n random bytes, for the session's id."""
        self.role = role
        self.state = State.IDLE
        self._ours = hello
        self._suite = suite
        self._entropy = entropy
        self._preamble: Preamble | None = None  # the initiator's, where we are the responder
        self._terms: Terms | None = None
        self._suite_step = 0
        self._transcript = bytearray()
        self._out = bytearray()
        self._buffer = bytearray()
        self._record_nbytes = 0  # of the record whose length has been read; 0: its header comes next

    # --- the driver's side --------------------------------------------------------------------------------

    def start(self) -> list[Event]:
        """Begin."""
        return self._take(Input.START)

    def proved(self) -> list[Event]:
        """Go on after ProveLink: the link's other end may talk to us."""
        return self._take(Input.PROVED)

    def proceed(self) -> list[Event]:
        """Go on after PeerKnown."""
        return self._take(Input.PROCEED)

    def refuse(self, field: str = "", reason: str = "") -> None:
        """End it after ProveLink (silently), or after PeerKnown (with a REJECT that names `field`)."""
        self._take(Input.REFUSE, Reject(field=field, reason=reason))

    def wants(self) -> int:
        """Return how many bytes are missing from the next message; 0: don't read."""
        return max(0, self._unit_nbytes() - len(self._buffer))

    def receive(self, data: bytes) -> list[Event]:
        """Take the peer's bytes, at most `wants()`. Raises KVTransportError when they end the handshake."""
        if len(data) > self.wants():
            raise LocalProtocolError(f"{len(data)} bytes for a handshake that wants {self.wants()}")
        self._buffer += data
        if not data or self.wants():
            return []
        unit = bytes(self._buffer)
        self._buffer.clear()
        try:
            taken = self._classify(unit)
        except KVTransportError as error:
            return self._take(Input.MALFORMED, error)
        return self._take(*taken) if taken else []

    def close(self) -> list[Event]:
        """Take the peer's close of the connection. Always raises."""
        return self._take(Input.CLOSE, self.state)

    def outgoing(self) -> bytes:
        """Return what is to be sent, once."""
        data = bytes(self._out)
        self._out.clear()
        return data

    # --- bytes to input -----------------------------------------------------------------------------------

    def _unit_nbytes(self) -> int:
        if self.state is State.PREAMBLE:
            return messages.PREAMBLE_NBYTES
        if self.state is State.SUITE:
            return self._suite.script[self._suite_step][1]
        if self.state in (State.HELLO, State.ACCEPT, State.CONFIRM):
            return self._record_nbytes or messages.RECORD_HEADER_NBYTES
        return 0

    def _classify(self, unit: bytes) -> tuple[Input, object] | None:
        """Say what a complete unit of bytes is; None for a record's header."""
        if self.state is State.PREAMBLE:
            return Input.PREAMBLE, (messages.parse_preamble(unit), unit)
        if self.state is State.SUITE:
            self._suite.consume(self._suite_step, unit, bytes(self._transcript))
            more = any(sender is not self.role for sender, _ in self._suite.script[self._suite_step + 1 :])
            return Input.SUITE_MORE if more else Input.SUITE_LAST, unit
        if not self._record_nbytes:
            self._record_nbytes = messages.parse_record_length(unit)
            return None
        self._record_nbytes = 0
        record = messages.parse_record(self._suite.open(unit))
        return _INPUT_OF_RECORD[type(record)], record

    # --- the table at work --------------------------------------------------------------------------------

    def _take(self, taken: Input, value: object = None) -> list[Event]:
        transition = _TRANSITIONS.get((self.role, self.state, taken))
        if transition is None:
            what = f"{taken.value} in state {self.state.value} of a handshake"
            if taken in _DRIVER_INPUTS or self.state in _ENDS:
                raise LocalProtocolError(what)
            self.state = State.FAILED
            raise RemoteProtocolError(f"unexpected {what}")
        self.state = transition.next
        try:
            return transition.action(self, value)
        except Unfit as e:
            self.state = State.FAILED
            self._send_record(Reject(field=e.field, reason=str(e.error)[:512]))
            raise e.error from None
        except KVTransportError:
            self.state = State.FAILED
            raise

    # --- actions ------------------------------------------------------------------------------------------

    def _wait_for_peer(self, value: object) -> list[Event]:
        """Await the peer's next message."""
        return []

    def _ask_for_proof(self, value: object) -> list[Event]:
        """Ask the driver who is at the other end."""
        return [ProveLink(needed=not self._suite.proves_peer)]

    def _take_preamble(self, value: object) -> list[Event]:
        """Choose the suite; ask the driver who is at the other end."""
        preamble, data = _expect(value, tuple)
        if preamble.kind is not Kind.CONTROL:
            raise RemoteProtocolError("a lane's preamble on a control connection")
        if not preamble.suites & self._suite.bit:
            raise AuthenticationError("the peer's keys and ours don't go together: one side has none")
        self._preamble = preamble
        self._transcript += data
        return [ProveLink(needed=not self._suite.proves_peer)]

    def _send_preamble(self, value: object) -> list[Event]:
        """Send the preamble and the first suite message."""
        ours, suite = self._ours, self._suite
        preamble = Preamble(ours.version_min, ours.version_max, Kind.CONTROL, suite.bit, suite.key_id)
        self._send(preamble.encode())
        self._send_suite_messages()
        return []

    def _run_suite(self, value: object) -> list[Event]:
        """Check it; send the suite messages that are due."""
        self._transcript += _expect(value, bytes)
        self._suite_step += 1
        self._send_suite_messages()
        return []

    def _run_suite_send_hello(self, value: object) -> list[Event]:
        """Check it; send the suite messages that are due, and HELLO."""
        self._run_suite(value)
        self._send_record(self._ours)
        return []

    def _meet_peer(self, value: object) -> list[Event]:
        """Agree on terms; ask the driver whether this session is wanted."""
        theirs, preamble = _expect(value, Hello), self._preamble
        versions = theirs.version_min, theirs.version_max
        if preamble and versions != (preamble.version_min, preamble.version_max):
            raise unfit("downgrade", "HELLO and preamble name different versions")
        self._terms = agree(self._ours, theirs, self._suite)
        return [PeerKnown(theirs, self._suite.identity)]

    def _send_hello(self, value: object) -> list[Event]:
        """Send HELLO."""
        self._send_record(self._ours)
        return []

    def _send_accept(self, value: object) -> list[Event]:
        """Send ACCEPT."""
        terms = replace(_expect(self._terms, Terms), session_id=self._entropy(messages.SESSION_ID_NBYTES))
        self._terms = terms
        accept = Accept(
            session_id=terms.session_id,
            version=terms.version,
            protection=terms.protection,
            lanes=terms.lanes,
            chunk_nbytes=terms.chunk_nbytes,
        )
        self._send_record(accept)
        return []

    def _check_terms_and_confirm(self, value: object) -> list[Event]:
        """Check the terms; send CONFIRM; the session exists."""
        accept, terms = _expect(value, Accept), _expect(self._terms, Terms)
        check_accept(accept, terms)
        self._send_record(Confirm())
        return [Established(replace(terms, session_id=accept.session_id, initiator=True))]

    def _establish(self, value: object) -> list[Event]:
        """The session exists."""
        return [Established(_expect(self._terms, Terms))]

    def _end_silently(self, value: object) -> list[Event]:
        """Say nothing."""
        self._out.clear()
        return []

    def _end_with_reject(self, value: object) -> list[Event]:
        """Send REJECT."""
        self._send_record(_expect(value, Reject))
        return []

    def _end_by_reject(self, value: object) -> list[Event]:
        """Raise what the REJECT stands for."""
        raise error_of(_expect(value, Reject))

    def _end_by_close(self, value: object) -> list[Event]:
        """Raise HandshakeError."""
        state = _expect(value, State)
        raise HandshakeError(f"the peer closed the connection in state {state.value} of the handshake")

    def _end_by_fault(self, value: object) -> list[Event]:
        """Raise RemoteProtocolError or AuthenticationError."""
        raise _expect(value, KVTransportError)

    # --- sending ------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        self._out += data
        self._transcript += data

    def _send_suite_messages(self) -> None:
        """Send ours from the present step on, up to the peer's next one."""
        script = self._suite.script
        while self._suite_step < len(script) and script[self._suite_step][0] is self.role:
            self._send(self._suite.produce(self._suite_step, bytes(self._transcript)))
            self._suite_step += 1

    def _send_record(self, record: messages.Record) -> None:
        self._out += messages.frame_record(self._suite.seal(messages.encode_record(record)))


def _expect(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise LocalProtocolError(f"{type(value).__name__} where a handshake has {kind.__name__}")
    return value


# --- the table -------------------------------------------------------------------------------------------


class _Transition(NamedTuple):
    next: State
    action: Callable[[Handshake, object], list[Event]]


_I, _R = Role.INITIATOR, Role.RESPONDER
_DRIVER_INPUTS = (Input.START, Input.PROVED, Input.PROCEED, Input.REFUSE)
_ENDS = (State.ESTABLISHED, State.FAILED)
_INPUT_OF_RECORD: dict[type[messages.Record], Input] = {
    Hello: Input.HELLO,
    Accept: Input.ACCEPT,
    Reject: Input.REJECT,
    Confirm: Input.CONFIRM,
}

_TRANSITIONS: dict[tuple[Role, State, Input], _Transition] = {
    (_I, State.IDLE, Input.START): _Transition(State.PROOF, Handshake._ask_for_proof),
    (_I, State.PROOF, Input.PROVED): _Transition(State.SUITE, Handshake._send_preamble),
    (_I, State.SUITE, Input.SUITE_MORE): _Transition(State.SUITE, Handshake._run_suite),
    (_I, State.SUITE, Input.SUITE_LAST): _Transition(State.HELLO, Handshake._run_suite),
    (_I, State.HELLO, Input.HELLO): _Transition(State.DECIDE, Handshake._meet_peer),
    (_I, State.DECIDE, Input.PROCEED): _Transition(State.ACCEPT, Handshake._send_hello),
    (_I, State.ACCEPT, Input.ACCEPT): _Transition(State.ESTABLISHED, Handshake._check_terms_and_confirm),
    (_R, State.IDLE, Input.START): _Transition(State.PREAMBLE, Handshake._wait_for_peer),
    (_R, State.PREAMBLE, Input.PREAMBLE): _Transition(State.PROOF, Handshake._take_preamble),
    (_R, State.PROOF, Input.PROVED): _Transition(State.SUITE, Handshake._wait_for_peer),
    (_R, State.SUITE, Input.SUITE_MORE): _Transition(State.SUITE, Handshake._run_suite),
    (_R, State.SUITE, Input.SUITE_LAST): _Transition(State.HELLO, Handshake._run_suite_send_hello),
    (_R, State.HELLO, Input.HELLO): _Transition(State.DECIDE, Handshake._meet_peer),
    (_R, State.DECIDE, Input.PROCEED): _Transition(State.CONFIRM, Handshake._send_accept),
    (_R, State.CONFIRM, Input.CONFIRM): _Transition(State.ESTABLISHED, Handshake._establish),
    **{
        (role, state, taken): _Transition(State.FAILED, action)
        for role, states in ((_I, (State.HELLO, State.ACCEPT)), (_R, (State.HELLO, State.CONFIRM)))
        for state in states
        for taken, action in ((Input.REJECT, Handshake._end_by_reject),)
    },
    **{
        (role, state, Input.REFUSE): _Transition(State.FAILED, action)
        for role in Role
        for state, action in (
            (State.PROOF, Handshake._end_silently),
            (State.DECIDE, Handshake._end_with_reject),
        )
    },
    **{
        (role, state, taken): _Transition(State.FAILED, action)
        for role in Role
        for state in State
        if state not in _ENDS
        for taken, action in (
            (Input.CLOSE, Handshake._end_by_close),
            (Input.MALFORMED, Handshake._end_by_fault),
        )
    },
}


class Row(NamedTuple):
    """One line of the table, in words."""

    role: str
    state: str
    input: str
    next: str
    action: str


def transition_table() -> list[Row]:
    """Return a row for every (role, state, input): the table that the machine runs on, for docs and tests.

    An action that finds a fault in what it was given also ends in FAILED.
    """
    rows = []
    for role in Role:
        for state in State:
            for taken in Input:
                listed = _TRANSITIONS.get((role, state, taken))
                if listed:
                    after, action = listed.next, listed.action.__name__.strip("_").replace("_", " ")
                elif taken in _DRIVER_INPUTS or state in _ENDS:
                    after, action = state, "raise LocalProtocolError"
                else:
                    after, action = State.FAILED, "raise RemoteProtocolError"
                rows.append(Row(role.value, state.value, taken.value, after.value, action))
    return rows
