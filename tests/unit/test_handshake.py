"""The handshake machine: its table, what it says and doesn't, and how each kind of misfit ends."""

from collections import Counter

import msgspec
import pytest

from kvtransport.errors import (
    AuthenticationError,
    DowngradeError,
    HandshakeError,
    LocalProtocolError,
    RemoteProtocolError,
    ResourceLimit,
    VersionMismatch,
)
from kvtransport.protocol import messages
from kvtransport.protocol.auth import NullSuite
from kvtransport.protocol.handshake import (
    Established,
    Handshake,
    Input,
    PeerKnown,
    ProveLink,
    State,
    transition_table,
)
from kvtransport.protocol.messages import Accept, Confirm, Hello, Kind, Preamble, Reachability, Reject, Role


def hello(incarnation=b"i" * 16, **changes):
    base = Hello(
        incarnation=incarnation,
        version_min=1,
        version_max=1,
        protection="plain",
        lanes=2,
        chunk_nbytes=1 << 20,
        reachability=Reachability(),
    )
    return msgspec.structs.replace(base, **changes)


def pair(ours=None, theirs=None):
    initiator = Handshake(Role.INITIATOR, ours or hello(), NullSuite())
    responder = Handshake(Role.RESPONDER, theirs or hello(b"r" * 16), NullSuite())
    return initiator, responder


def answer(machine, events):
    """Do what a willing driver does with events; return all that came."""
    seen = []
    while events:
        event = events.pop(0)
        seen.append(event)
        if isinstance(event, ProveLink):
            events += machine.proved()
        elif isinstance(event, PeerKnown):
            events += machine.proceed()
    return seen


def feed(machine, data):
    """Give a machine its bytes, in the sizes that it wants; return (events, bytes that it doesn't want)."""
    seen = []
    while data and (size := machine.wants()):
        unit, data = data[:size], data[size:]
        seen += answer(machine, machine.receive(unit))
    return seen, data


def run(initiator, responder):
    """Connect the two until neither has anything to say; return their events."""
    seen = {initiator: answer(initiator, initiator.start()), responder: answer(responder, responder.start())}
    talking = True
    while talking:
        talking = False
        for a, b in ((initiator, responder), (responder, initiator)):
            data = a.outgoing()
            if data:
                talking = True
                events, rest = feed(b, data)
                assert not rest
                seen[b] += events
    return seen[initiator], seen[responder]


def at(role, state):
    """Return a machine in `state`."""
    initiator, responder = pair()
    machine, other = (initiator, responder) if role is Role.INITIATOR else (responder, initiator)
    if state is State.FAILED:
        machine.start()
        with pytest.raises(HandshakeError):
            machine.close()
    waiting = {machine: b"", other: b""}
    while machine.state is not state:
        for m, o in ((machine, other), (other, machine)):
            if machine.state is state:
                break
            step = {State.IDLE: m.start, State.PROOF: m.proved, State.DECIDE: m.proceed}.get(m.state)
            if step:
                step()
            else:
                size = m.wants()
                unit, waiting[m] = waiting[m][:size], waiting[m][size:]
                m.receive(unit)
            waiting[o] += m.outgoing()
    return machine


REACHED = [
    (role, state)
    for role, missing in (
        (Role.INITIATOR, (State.PREAMBLE, State.CONFIRM)),
        (Role.RESPONDER, (State.ACCEPT,)),
    )
    for state in State
    if state not in missing
]


def test_two_machines_agree():
    initiator, responder = pair(
        hello(lanes=4, chunk_nbytes=65_536, protection="digest", capabilities=6, features=("a", "b")),
        hello(b"r" * 16, lanes=3, chunk_nbytes=1 << 20, capabilities=3, features=("b",), name="decode"),
    )
    first, second = run(initiator, responder)
    assert initiator.state is responder.state is State.ESTABLISHED
    ours, theirs = first[-1].terms, second[-1].terms
    assert ours.session_id == theirs.session_id
    assert len(ours.session_id) == 16
    assert ours.peer.name == "decode"
    for terms in (ours, theirs):
        assert (terms.version, terms.protection, terms.lanes, terms.chunk_nbytes) == (1, "digest", 3, 65_536)
        assert (terms.capabilities, terms.features, terms.identity) == (2, ("b",), None)
    assert [type(e) for e in first] == [type(e) for e in second] == [ProveLink, PeerKnown, Established]


def test_sessions_have_different_ids():
    ids = {run(*pair())[0][-1].terms.session_id for _ in range(10)}
    assert len(ids) == 10


def test_nothing_is_said_before_the_link_is_proved():
    initiator, responder = pair()
    assert initiator.start() == [ProveLink(needed=True)]
    assert initiator.outgoing() == b""
    assert initiator.wants() == 0
    responder.start()
    assert responder.receive(Preamble(1, 1, Kind.CONTROL, 1).encode()) == [ProveLink(needed=True)]
    assert responder.outgoing() == b""
    assert responder.wants() == 0
    for machine in (initiator, responder):
        machine.refuse()
        assert machine.state is State.FAILED
        assert machine.outgoing() == b""


def test_frames_after_the_handshake_are_not_wanted():
    initiator, responder = pair()
    initiator.start(), responder.start()
    initiator.proved()
    feed(responder, initiator.outgoing())
    feed(initiator, responder.outgoing())
    feed(responder, initiator.outgoing())
    feed(initiator, responder.outgoing())
    assert initiator.state is State.ESTABLISHED
    events, rest = feed(responder, initiator.outgoing() + b"frames")
    assert isinstance(events[-1], Established)
    assert rest == b"frames"
    assert responder.wants() == 0


def test_more_than_wanted_is_the_drivers_error():
    _, responder = pair()
    responder.start()
    with pytest.raises(LocalProtocolError):
        responder.receive(bytes(33))
    assert responder.state is State.PREAMBLE


@pytest.mark.parametrize(
    ("ours", "theirs"), [((1, 1), (2, 3)), ((4, 5), (2, 3))], ids=["initiator older", "initiator newer"]
)
def test_disjoint_versions(ours, theirs):
    initiator, responder = pair(
        hello(version_min=ours[0], version_max=ours[1]),
        hello(b"r" * 16, version_min=theirs[0], version_max=theirs[1]),
    )
    with pytest.raises(VersionMismatch, match=r"1 to 1 here, 2 to 3 there|4 to 5 here, 2 to 3 there"):
        run(initiator, responder)
    with pytest.raises(VersionMismatch, match="the peer refused the session: version"):
        feed(responder, initiator.outgoing())
    assert initiator.state is responder.state is State.FAILED


def test_neighbouring_versions_meet():
    first, second = run(*pair(hello(version_max=3), hello(b"r" * 16, version_min=2, version_max=5)))
    assert first[-1].terms.version == second[-1].terms.version == 3


def test_protection_that_the_suite_has_not():
    initiator, responder = pair(theirs=hello(b"r" * 16, protection="aead"))
    with pytest.raises(HandshakeError, match="needs a key"):
        run(initiator, responder)
    with pytest.raises(HandshakeError, match="protection"):
        feed(responder, initiator.outgoing())


def test_suites_that_do_not_meet_get_no_answer():
    _, responder = pair()
    responder.start()
    with pytest.raises(AuthenticationError):
        responder.receive(Preamble(1, 1, Kind.CONTROL, 2, b"k" * 16).encode())
    assert responder.outgoing() == b""


def test_a_lane_is_no_control_connection():
    _, responder = pair()
    responder.start()
    with pytest.raises(RemoteProtocolError, match="lane"):
        responder.receive(Preamble(1, 1, Kind.LANE, 1).encode())
    assert responder.outgoing() == b""


@pytest.mark.parametrize("refuser", Role)
def test_a_session_that_is_not_wanted(refuser):
    initiator, responder = pair()
    initiator.start(), responder.start()
    initiator.proved()
    feed(responder, initiator.outgoing())
    data = responder.outgoing()
    while size := initiator.wants():
        initiator.receive(data[:size])
        data = data[size:]
    assert initiator.state is State.DECIDE
    if refuser is Role.INITIATOR:
        initiator.refuse("session", "connected already")
        with pytest.raises(HandshakeError, match="session: connected already"):
            feed(responder, initiator.outgoing())
        return
    initiator.proceed()
    data = initiator.outgoing()
    while size := responder.wants():
        responder.receive(data[:size])
        data = data[size:]
    responder.refuse("limit", "too many connections")
    with pytest.raises(ResourceLimit, match="too many connections"):
        feed(initiator, responder.outgoing())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"protection": "plain"}, DowngradeError),
        ({"protection": "aead"}, RemoteProtocolError),
        ({"lanes": 64}, RemoteProtocolError),
        ({"chunk_nbytes": 64}, RemoteProtocolError),
        ({"version": 2}, RemoteProtocolError),
    ],
    ids=str,
)
def test_accept_must_be_what_was_agreed(change, error):
    initiator, responder = pair(hello(protection="digest"))
    initiator.start(), responder.start()
    initiator.proved()
    feed(responder, initiator.outgoing())
    feed(initiator, responder.outgoing())
    accept = Accept(session_id=bytes(16), version=1, protection="digest", lanes=2, chunk_nbytes=1 << 20)
    bad = messages.encode_record(msgspec.structs.replace(accept, **change))
    with pytest.raises(error):
        feed(initiator, messages.frame_record(bad))
    feed(responder, initiator.outgoing()[:0])
    assert initiator.state is State.FAILED


def test_a_hello_that_differs_from_its_preamble_is_a_downgrade():
    _, responder = pair()
    answer(responder, responder.start())
    feed(responder, Preamble(1, 2, Kind.CONTROL, 1).encode() + bytes(32))
    responder.outgoing()
    with pytest.raises(DowngradeError):
        feed(responder, messages.frame_record(messages.encode_record(hello())))
    assert b"downgrade" in responder.outgoing()


def test_a_reason_is_escaped():
    initiator, responder = pair()
    initiator.start(), responder.start()
    initiator.proved()
    feed(responder, initiator.outgoing())
    responder.outgoing()
    feed(initiator, bytes(32))
    reject = messages.encode_record(Reject(field="sess\x1bion", reason="a\nb" + "c" * 500))
    with pytest.raises(HandshakeError) as caught:
        feed(initiator, messages.frame_record(reject))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("role", "state"), REACHED, ids=lambda v: v.value)
def test_every_driver_input_in_every_state(role, state):
    listed = {
        row.input: row for row in transition_table() if (row.role, row.state) == (role.value, state.value)
    }
    for name in ("start", "proved", "proceed", "refuse"):
        machine = at(role, state)
        assert machine.state is state
        row = listed[name]
        if row.action == "raise LocalProtocolError":
            with pytest.raises(LocalProtocolError):
                getattr(machine, name)()
        else:
            getattr(machine, name)()
        assert machine.state.value == row.next


@pytest.mark.parametrize(("role", "state"), REACHED, ids=lambda v: v.value)
def test_close_in_every_state(role, state):
    machine = at(role, state)
    over = state in (State.ESTABLISHED, State.FAILED)
    with pytest.raises(LocalProtocolError if over else HandshakeError):
        machine.close()
    assert machine.state is (state if over else State.FAILED)


@pytest.mark.parametrize(
    "record",
    [
        hello(),
        Accept(session_id=bytes(16), version=1, protection="plain", lanes=2, chunk_nbytes=1 << 20),
        Reject(field="x"),
        Confirm(),
    ],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize(
    ("role", "state"),
    [(r, s) for r, s in REACHED if s in (State.HELLO, State.ACCEPT, State.CONFIRM)],
    ids=lambda v: v.value,
)
def test_every_record_in_every_state(role, state, record):
    machine = at(role, state)
    row = next(
        row
        for row in transition_table()
        if (row.role, row.state, row.input) == (role.value, state.value, type(record).__name__.upper())
    )
    data = messages.frame_record(messages.encode_record(record))
    machine.receive(data[:4])
    if row.next == "FAILED":
        error = HandshakeError if isinstance(record, Reject) else RemoteProtocolError
        with pytest.raises(error):
            machine.receive(data[4:])
    else:
        machine.receive(data[4:])
    assert machine.state.value == row.next


def test_the_table_is_complete():
    rows = transition_table()
    assert len(rows) == len(Role) * len(State) * len(Input)
    assert set(Counter((r.role, r.state, r.input) for r in rows).values()) == {1}
    for row in rows:
        assert row.next in State.__members__
        if row.state in ("ESTABLISHED", "FAILED"):
            assert row.next == row.state
    # every state but the two ends leads on, and every state can be reached
    for role in Role:
        reached, todo = set(), {"IDLE"}
        while todo:
            reached |= todo
            todo = {r.next for r in rows if r.role == role.value and r.state in todo} - reached
        assert reached == {s.value for r, s in REACHED if r is role}
