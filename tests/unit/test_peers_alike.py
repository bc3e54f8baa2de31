"""Peers that call themselves alike, and peers that are gone before their messages are taken."""

import pytest

from kvtransport import Config, Endpoint

LIMIT_S = 20
pytestmark = pytest.mark.timeout(120)


def test_two_that_advertise_one_name_live_side_by_side(endpoint):
    hub = endpoint()
    where = hub.listen("127.0.0.1:0")
    pairs = []
    for _ in range(3):
        one = endpoint()
        one.listen("127.0.0.1:0", advertise=("workers.local:7000",))
        pairs.append((one, one.connect(where), hub.accept(LIMIT_S)))
    for one, connection, accepted in pairs:
        connection.send_message(b"there").result(LIMIT_S)
        accepted.send_message(b"back").result(LIMIT_S)
        assert [data for _, data in one.recv_messages(timeout=LIMIT_S)] == [b"back"]
        assert connection.state == accepted.state == "open"
    assert len(hub.connections()) == 3


def test_messages_of_peers_that_are_gone_are_all_there(endpoint):
    hub = endpoint()
    where = hub.listen("127.0.0.1:0")
    count = 300
    for number in range(count):
        one = endpoint()
        one.connect(where, timeout=LIMIT_S).send_message(str(number).encode()).result(LIMIT_S)
        one.close()
    found = []
    while len(found) < count and (some := hub.recv_messages(timeout=LIMIT_S)):
        found += some
    assert [data for _, data in found] == [str(number).encode() for number in range(count)]
    assert len({connection.peer.incarnation for connection, _ in found}) == count
    assert not hub._acceptor.roster._lost


def leave_messages(turns, hub, where, messages):
    """Be a peer that sends them and is gone."""
    with Endpoint(Config(backends=("tcp",))) as one:
        connection = one.connect(where, timeout=LIMIT_S)
        for message in messages:
            connection.send_message(message).result(LIMIT_S)
        one_of_them = one.incarnation
    turns.until(lambda: one_of_them not in hub._acceptor.roster._entries)


def test_messages_of_peers_that_are_gone_are_bounded_all_together(endpoint, turns, caplog):
    hub, alive = endpoint(max_protocol_nbytes=1 << 20, max_message_queue_nbytes=2 << 20), endpoint()
    where = hub.listen("127.0.0.1:0")
    alive.connect(where).send_message(bytes(100_000)).result(LIMIT_S)
    for number in range(20):
        leave_messages(turns, hub, where, [number.to_bytes(1) * 50_000, number.to_bytes(1) * 50_000])
    roster = hub._acceptor.roster
    turns.until(lambda: len(roster._lost) <= 9)
    found = []
    while some := hub.recv_messages():
        found += [(data[0], len(data)) for _, data in some]
    assert found[0] == (0, 100_000)  # of who lives, the oldest
    assert found[1:][-10:] == [(n, 50_000) for n in (15, 15, 16, 16, 17, 17, 18, 18, 19, 19)]
    assert sum(nbytes for _, nbytes in found) <= 1 << 20
    assert not roster._lost
    warnings = [one for one in caplog.records if "max_protocol_nbytes" in one.getMessage()]
    assert 1 <= len(warnings) <= 10


def test_many_that_are_gone_cost_more_than_their_messages(endpoint, turns):
    hub = endpoint(max_protocol_nbytes=1 << 20)
    where = hub.listen("127.0.0.1:0")
    for _ in range(70):
        leave_messages(turns, hub, where, [b""])
    turns.until(lambda: len(hub._acceptor.roster._lost) <= 64)
    assert 50 <= len(hub.recv_messages()) <= 64
    for _ in range(40):  # what was taken counts no more
        leave_messages(turns, hub, where, [b""])
    assert len(hub.recv_messages()) == 40
    assert not hub._acceptor.roster._lost


def test_messages_of_the_living_are_never_dropped(endpoint):
    hub, one = endpoint(max_protocol_nbytes=1 << 20), endpoint()
    connection = one.connect(hub.listen("127.0.0.1:0"), timeout=LIMIT_S)
    for number in range(40):
        connection.send_message(number.to_bytes(1) * 100_000).result(LIMIT_S)
    assert [data[0] for _, data in hub.recv_messages(LIMIT_S)] == list(range(40))
