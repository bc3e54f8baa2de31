"""Of two sessions with one peer which stays: the roster's rules, without sockets."""

import itertools
import os
import random

import msgspec
import pytest

from kvtransport.acceptor.reachability import process_started
from kvtransport.acceptor.roster import Found, Roster, Ruling
from kvtransport.protocol.agreement import Terms
from kvtransport.protocol.messages import Hello, Reachability

STARTED = process_started(os.getpid())
LOW, HIGH = b"\0" * 16, b"\xff" * 16
HERE = Reachability(boot_id="this boot", net_ns=1, pid_ns=1, pid=os.getpid(), pid_started=STARTED)
ENDED = msgspec.structs.replace(HERE, pid_started=STARTED - 1)
ELSEWHERE = Reachability(boot_id="another boot", net_ns=1)


class Handshake:
    def __init__(self, dialled):
        self.dialled = dialled
        self.displaced = False

    def displace(self):
        self.displaced = True


class Session:
    def __init__(self, number=0):
        self.id = number.to_bytes(16, "big")
        self.messages = 0
        self.silent = 0.0

    def silent_s(self):
        return self.silent

    def stats(self):
        return {"messages_received": self.messages}


class Connection:
    def __init__(self, peer=None):
        self.peer = peer
        self.attached = []
        self.state = "open"

    def _attach(self, session, *, peer, backend_name):
        self.attached.append((session, peer, backend_name))
        return self.state != "lost"


def found(incarnation, *, address=None, addresses=(), reachability=HERE):
    hello = Hello(
        incarnation=incarnation,
        version_min=1,
        version_max=1,
        protection="plain",
        lanes=1,
        chunk_nbytes=4096,
        reachability=reachability,
        addresses=addresses,
    )
    terms = Terms(hello, None, 1, "plain", 1, 4096, 0, (), b"s" * 16)
    return Found(terms, "tcp", None, address)


def roster(ours=LOW, max_peers=10):
    return Roster(ours, HERE, max_peers)


def test_the_first_handshake_goes_on():
    for dialled in (True, False):
        assert roster().claim(HIGH, Handshake(dialled)) is Ruling.GO


def test_claiming_twice_is_claiming():
    r, dial = roster(), Handshake(True)
    assert r.claim(HIGH, dial) is r.claim(HIGH, dial) is Ruling.GO


def test_the_lower_incarnations_dial_stays():
    r, ours, theirs = roster(LOW), Handshake(True), Handshake(False)
    assert r.claim(HIGH, ours) is Ruling.GO
    assert r.claim(HIGH, theirs) is Ruling.CROSSING
    assert not ours.displaced


def test_the_higher_incarnation_gives_its_dial_up():
    r, ours, theirs = roster(HIGH), Handshake(True), Handshake(False)
    assert r.claim(LOW, ours) is Ruling.GO
    assert r.claim(LOW, theirs) is Ruling.GO
    assert ours.displaced
    r.release(LOW, ours)  # it isn't the holder any more
    assert r.claim(LOW, Handshake(True)) is Ruling.WAIT


@pytest.mark.parametrize("ours", [LOW, HIGH])
def test_our_dial_waits_for_the_peers(ours):
    r, theirs, dial, changes = roster(ours), Handshake(False), Handshake(True), []
    r.on_change = lambda: changes.append(1)
    peer = b"p" * 16
    assert r.claim(peer, theirs) is Ruling.GO
    assert r.claim(peer, dial) is Ruling.WAIT
    assert not changes
    r.release(peer, theirs)
    assert changes
    assert r.claim(peer, dial) is Ruling.GO


def test_a_newer_dial_of_the_same_peer_takes_the_olders_place():
    r, older, newer = roster(), Handshake(False), Handshake(False)
    assert r.claim(HIGH, older) is Ruling.GO
    assert r.claim(HIGH, newer, polite=True) is Ruling.WAIT
    assert r.claim(HIGH, newer) is Ruling.GO
    assert older.displaced


def test_an_open_session_stays():
    r = roster()
    r.claim(HIGH, Handshake(False))
    r.opened(found(HIGH), Session(), Connection(), ready=True)
    for dialled in (True, False):
        assert r.claim(HIGH, Handshake(dialled)) is Ruling.CONNECTED
    r.lost(Session().id)
    assert r.claim(HIGH, Handshake(True)) is Ruling.GO


def test_no_more_peers_than_allowed():
    r = roster(max_peers=2)
    held = [Handshake(False) for _ in range(2)]
    for number, handshake in enumerate(held):
        assert r.claim(bytes([number]) * 16, handshake) is Ruling.GO
    assert r.claim(HIGH, Handshake(True)) is Ruling.FULL
    r.release(bytes(16), held[0])
    assert r.claim(HIGH, Handshake(True)) is Ruling.GO


def test_connections_are_found_until_the_session_is_lost():
    r, connection = roster(), Connection("the peer")
    r.opened(found(HIGH, address="127.0.0.1:7"), Session(), connection, ready=False)
    assert r.joined(HIGH, None, None) is None
    assert r.at("127.0.0.1:7") is None
    assert r.made_ready(Session().id)
    assert r.joined(HIGH, None, "localhost:7") is connection
    assert r.at("127.0.0.1:7") is r.at("localhost:7") is r.sender(Session().id) is connection
    assert r.lost(Session().id) == [connection]
    assert r.lost(Session().id) == []
    assert r.at("127.0.0.1:7") is r.joined(HIGH, None, None) is None
    assert r.connections() == []
    assert r.sender(Session().id) is None
    assert not r.made_ready(Session().id)


def test_a_lost_connection_is_found_until_its_last_message():
    r, sessions = roster(max_peers=1000), [Session(number) for number in range(600)]
    connections = [Connection() for _ in sessions]
    for number, (session, connection) in enumerate(zip(sessions, connections, strict=True)):
        r.opened(found(number.to_bytes(16, "little")), session, connection, ready=True)
        session.messages = 3
        assert r.sender(session.id) is connection
        r.lost(session.id)
    for session, connection in zip(sessions, connections, strict=True):
        assert [r.sender(session.id) for _ in range(3)] == [connection, connection, None]
    assert not r._lost


def test_a_closed_connection_is_never_given_a_session():
    r, first, closed = roster(), Connection("the peer"), Connection()
    closed.state = "lost"
    r.opened(found(HIGH), Session(), first, ready=True)
    assert r.joined(HIGH, closed, None) is first
    assert r.lost(Session().id) == [first]


def test_a_connection_that_is_ending_is_not_given_out():
    r, connection = roster(), Connection()
    r.opened(found(HIGH, address="127.0.0.1:7"), Session(), connection, ready=True)
    connection.state = "lost"
    assert r.at("127.0.0.1:7") is r.joined(HIGH, None, None) is None
    assert r.claim(HIGH, Handshake(True)) is Ruling.CONNECTED  # until the engine says so


@pytest.mark.parametrize("ending", [0, 1])
def test_a_session_of_which_one_connection_is_ending_is_not_given_out(ending):
    r, connections = roster(), [Connection("the peer"), Connection()]
    r.opened(found(HIGH, address="127.0.0.1:7"), Session(), connections[0], ready=True)
    assert r.joined(HIGH, connections[1], None) is connections[1]
    connections[ending].state = "lost"
    assert r.at("127.0.0.1:7") is r.joined(HIGH, None, None) is None


def test_a_connection_that_was_made_before_shares_the_session():
    r, first, second = roster(), Connection("the peer"), Connection()
    r.opened(found(HIGH), Session(), first, ready=True)
    assert r.joined(HIGH, second, None) is second
    assert r.joined(HIGH, second, None) is second
    attached = [(session.id, peer, name) for session, peer, name in second.attached]
    assert attached == [(Session().id, "the peer", "tcp")]
    assert r.lost(Session().id) == [first, second]


def test_a_told_address_counts_on_the_same_host_only():
    for reachability, known in ((HERE, True), (ELSEWHERE, False)):
        r, connection = roster(), Connection()
        r.opened(
            found(HIGH, addresses=("127.0.0.1:7",), reachability=reachability),
            Session(),
            connection,
            ready=True,
        )
        assert (r.at("127.0.0.1:7") is connection) is known


@pytest.mark.parametrize(
    ("old", "new", "address", "replaced"),
    [
        (ENDED, HERE, None, "always"),
        (ENDED, HERE, "127.0.0.1:7", "always"),
        (HERE, HERE, None, "never"),
        (HERE, HERE, "127.0.0.1:7", "lost or silent"),
        (ELSEWHERE, ELSEWHERE, "10.0.0.1:7", "lost or silent"),
        (ELSEWHERE, ELSEWHERE, None, "never"),
        (HERE, ELSEWHERE, None, "never"),
        (ELSEWHERE, HERE, None, "never"),
    ],
)
@pytest.mark.parametrize(("lost", "silent"), [(False, 0.0), (False, 0.4), (False, 0.6), (True, 0.0)])
def test_who_takes_whose_place(old, new, address, replaced, lost, silent):
    told = (address or "127.0.0.1:7",)
    when = {"always": True, "never": False, "lost or silent": lost or silent > 0.5}
    replaced = when[replaced]
    r, connection, session = roster(), Connection(), Session()
    session.silent = silent
    before = found(HIGH, address=address, addresses=told, reachability=old)
    after = found(b"n" * 16, addresses=told, reachability=new)
    r.opened(before, session, connection, ready=True)
    if lost:
        r.lost(session.id)
    sessions, connections = r.predecessors(after.hello, address)
    assert connections == ([connection] if replaced else [])
    assert sessions == ([session] if replaced and not lost else [])
    assert r.has_rivals(after.hello, address) == (address is not None and not lost)
    assert r.predecessors(before.hello, address) == ([], [])
    assert not r.has_rivals(before.hello, address)
    elsewhere = msgspec.structs.replace(after.hello, addresses=("127.0.0.1:8",))
    assert r.predecessors(elsewhere, address) == ([], [])


class Side:
    """One end of two that dial each other: the rules that `inbound` and `attempt` follow."""

    def __init__(self, ours, peer):
        self.roster, self.peer = roster(ours), peer
        self.opened = []

    def open(self, number):
        self.roster.opened(found(self.peer), Session(number), Connection(), ready=True)
        self.opened.append(number)


class Crossing:
    """A dial of one side, as both ends see it, in steps that those of another dial may overtake."""

    def __init__(self, number, dialler, other):
        self.number, self.dialler, self.other = number, dialler, other
        self.dial, self.inbound = Handshake(True), Handshake(False)
        self.steps = iter((self.known, self.hello, self.accept, self.confirm))
        self.over = False

    def step(self):
        if self.dial.displaced or self.inbound.displaced:
            self.end()
        if not self.over:
            next(self.steps, self.end)()

    def known(self):
        """The dialler reads the responder's HELLO."""
        ruling = self.dialler.roster.claim(self.dialler.peer, self.dial)
        if ruling is Ruling.WAIT:
            self.steps = itertools.chain((self.known,), self.steps)
        elif ruling is not Ruling.GO:
            self.end()

    def hello(self):
        """The responder reads the dialler's."""
        if self.other.roster.claim(self.other.peer, self.inbound) is not Ruling.GO:
            self.end()

    def accept(self):
        """The dialler reads ACCEPT, and confirms."""
        self.dialler.open(self.number)

    def confirm(self):
        """The responder reads CONFIRM."""
        self.other.open(self.number)
        self.end()

    def end(self):
        self.over = True
        self.dialler.roster.release(self.dialler.peer, self.dial)
        self.other.roster.release(self.other.peer, self.inbound)


@pytest.mark.parametrize("seed", range(300))
def test_f18_whatever_the_order_one_session_comes_of_it(seed):
    order = random.Random(seed)
    low, high = Side(LOW, HIGH), Side(HIGH, LOW)
    dials = [Crossing(n, *order.choice([(low, high), (high, low)])) for n in range(4)]
    for _ in range(1000):
        going = [d for d in dials if not d.over]
        if not going:
            break
        order.choice(going).step()
    assert not [d for d in dials if not d.over]
    assert len(low.opened) == 1
    assert low.opened == high.opened
