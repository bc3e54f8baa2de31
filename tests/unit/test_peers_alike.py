"""Peers that call themselves alike, and peers that are gone before their messages are taken."""

import pytest

from kvtransport.errors import PeerLost

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


def test_f17_who_is_found_where_another_was_has_taken_its_place(endpoint, turns, monkeypatch, free_port):
    """The old one's end is not told: its host has lost power, say."""
    ours, before, after = endpoint(), endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    before.listen(where)
    old = ours.connect(where)
    for listener_id, (_, listener) in list(before._acceptor._listeners.items()):
        before.engine.remove_listener(listener_id)
        listener.close()
    after.listen(where)
    monkeypatch.setattr(ours._acceptor, "_connected", lambda place: None)  # as if it had been lost
    new = ours.connect(where, timeout=LIMIT_S)
    assert new.peer.incarnation == after.incarnation
    turns.until(lambda: old.state == "lost")
    assert isinstance(old._error, PeerLost)
    assert old._error.cause == "restarted"


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
