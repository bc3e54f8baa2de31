"""What holds of the handshake whatever the bytes are, and however they are cut."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.errors import KVTransportError, LocalProtocolError
from kvtransport.protocol.auth import NullSuite
from kvtransport.protocol.handshake import Established, Handshake, PeerKnown, ProveLink, State
from kvtransport.protocol.messages import Hello, Reachability, Role

words = st.text(st.characters(categories=("L", "N", "P")), max_size=20)
hellos = st.builds(
    Hello,
    incarnation=st.binary(min_size=16, max_size=16),
    version_min=st.just(1),
    version_max=st.integers(1, 9),
    protection=st.sampled_from(("plain", "digest")),
    lanes=st.integers(1, 32),
    chunk_nbytes=st.integers(64, 1 << 20),
    reachability=st.builds(Reachability, hostname=words, pid=st.integers(0, 2**22)),
    name=words,
    capabilities=st.integers(0, 2**63 - 1),
    addresses=st.lists(words.filter(bool), max_size=4).map(tuple),
    features=st.lists(words, max_size=4, unique=True).map(tuple),
)


class Side:
    """A machine and a willing driver, who gives it bytes in pieces of the sizes that `cut` yields."""

    def __init__(self, role, hello, cut):
        entropy = b"entropy of a test, not random. ." * 2
        self.machine = Handshake(role, hello, NullSuite(lambda n: entropy[:n]), entropy=lambda n: entropy[:n])
        self.cut = cut
        self.events = []
        self.sent = b""
        self.unread = b""
        self._answer(self.machine.start())

    def _answer(self, events):
        for event in events:
            self.events.append(event)
            if isinstance(event, ProveLink):
                self._answer(self.machine.proved())
            elif isinstance(event, PeerKnown):
                self._answer(self.machine.proceed())

    def take(self, data):
        self.unread += data
        while self.unread and (size := min(self.machine.wants(), self.cut())):
            unit, self.unread = self.unread[:size], self.unread[size:]
            self._answer(self.machine.receive(unit))

    def say(self):
        data = self.machine.outgoing()
        self.sent += data
        return data


def converse(initiator, responder):
    talking = True
    while talking:
        first, second = initiator.say(), None
        responder.take(first)
        second = responder.say()
        initiator.take(second)
        talking = bool(first or second)


@given(hellos, hellos, st.data())
def test_any_split_gives_the_same_events(ours, theirs, data):
    whole = Side(Role.INITIATOR, ours, lambda: 1 << 20), Side(Role.RESPONDER, theirs, lambda: 1 << 20)
    converse(*whole)
    sizes = st.integers(1, 40)
    cut = (
        Side(Role.INITIATOR, ours, lambda: data.draw(sizes)),
        Side(Role.RESPONDER, theirs, lambda: data.draw(sizes)),
    )
    converse(*cut)
    for a, b in zip(whole, cut, strict=True):
        assert a.machine.state is b.machine.state is State.ESTABLISHED
        assert a.events == b.events
        assert a.sent == b.sent
        assert not b.unread


@given(hellos, hellos)
def test_both_sides_agree_on_the_stricter(ours, theirs):
    initiator, responder = (
        Side(Role.INITIATOR, ours, lambda: 1 << 20),
        Side(Role.RESPONDER, theirs, lambda: 1 << 20),
    )
    converse(initiator, responder)
    a, b = initiator.events[-1].terms, responder.events[-1].terms
    for name in ("session_id", "version", "protection", "lanes", "chunk_nbytes", "capabilities"):
        assert getattr(a, name) == getattr(b, name)
    assert (a.peer, b.peer) == (theirs, ours)
    assert a.protection == ("digest" if "digest" in (ours.protection, theirs.protection) else "plain")
    assert a.lanes == min(ours.lanes, theirs.lanes)
    assert a.chunk_nbytes == min(ours.chunk_nbytes, theirs.chunk_nbytes)


def survives(role, hello, stream):
    """A machine that is given `stream` ends established, waiting, or with one error of the tree."""
    side, message = Side(role, hello, lambda: 1 << 20), ""
    try:
        side.take(stream)
    except LocalProtocolError:
        raise
    except KVTransportError as e:
        side, message = None, str(e)
    assert message.isprintable()
    return side


@given(hellos, hellos, st.sampled_from(Role), st.data())
def test_mutated_and_truncated_streams(ours, theirs, role, data):
    sides = Side(Role.INITIATOR, ours, lambda: 1 << 20), Side(Role.RESPONDER, theirs, lambda: 1 << 20)
    converse(*sides)
    victim, other = sides if role is Role.INITIATOR else sides[::-1]
    stream = bytearray(other.sent)
    for _ in range(data.draw(st.integers(0, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream = bytes(stream[: data.draw(st.integers(0, len(stream)))])
    hello = ours if role is Role.INITIATOR else theirs
    side = survives(role, hello, stream)
    if side and len(stream) < len(other.sent):
        assert side.machine.state is not State.ESTABLISHED
    elif side and side.machine.state is State.ESTABLISHED:
        assert isinstance(side.events[-1], Established)
        assert (
            msgspec.structs.asdict(side.events[-1].terms.peer).keys() == msgspec.structs.asdict(hello).keys()
        )
        assert victim.machine.state is State.ESTABLISHED


@given(st.sampled_from(Role), hellos, st.binary(max_size=300))
def test_random_streams(role, hello, stream):
    side = survives(role, hello, stream)
    assert side is None or side.machine.state is not State.ESTABLISHED


@given(hellos, st.binary(max_size=300), st.integers(0, 20_000))
def test_random_records(hello, noise, length):
    prefix = Side(Role.INITIATOR, hello, lambda: 1).say()  # preamble and nonce: what comes next are records
    survives(Role.RESPONDER, hello, prefix + length.to_bytes(4, "little") + noise)
    survives(Role.INITIATOR, hello, bytes(32) + length.to_bytes(4, "little") + noise)
