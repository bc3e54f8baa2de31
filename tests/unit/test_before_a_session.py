"""Connections that were given out before their session (`connect(wait=False)`), and closed at any time."""

import random
import threading

import pytest

import kvtransport as kvt
from kvtransport.acceptor.lanes import Lane
from kvtransport.errors import ConnectionClosed, WaitTimeout

LIMIT_S = 20
pytestmark = pytest.mark.timeout(120)


def messages_pass(one, other):
    """Two ends of one session."""
    one.send_message(b"there").result(LIMIT_S)
    other.send_message(b"back").result(LIMIT_S)


def test_closed_while_nobody_is_there(endpoint, turns, free_port):
    ours, theirs = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    early = ours.connect(where, timeout=60, wait=False)
    turns.until(lambda: ours._acceptor._dials)
    early.close()
    turns.until(lambda: not ours._acceptor._dials)  # nobody waits any more: nobody dials
    assert not ours._acceptor._premade
    theirs.listen(where)
    with pytest.raises(WaitTimeout):
        theirs.accept(timeout=0.2)
    later = ours.connect(where, timeout=LIMIT_S)
    assert later is not early
    messages_pass(later, theirs.accept(LIMIT_S))
    assert early.state == "lost"
    with pytest.raises(ConnectionClosed):
        early.send_message(b"late")


def test_closed_before_its_first_try(endpoint, turns, free_port):
    ours, held = endpoint(), threading.Event()
    ours._acceptor.loop.post(lambda: held.wait(LIMIT_S))
    for number in range(100):
        ours.connect(f"127.0.0.{1 + number}:{free_port}", timeout=60, wait=False).close()
    assert not ours._acceptor._premade
    held.set()
    turns.until(lambda: not ours._acceptor.loop._posted)
    assert not ours._acceptor._dials


def test_made_while_the_endpoint_closes(endpoint, free_port):
    ours = endpoint()
    ours._acceptor.stop()
    late = ours.connect(f"127.0.0.1:{free_port}", timeout=60, wait=False)
    assert late.state == "lost"
    assert not ours._acceptor._premade


def test_its_own_timeout_where_another_waits_longer(endpoint, turns, free_port):
    ours, theirs = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    patient = ours._acceptor.connect(where, 60)
    longer = ours.connect(where, timeout=0.3, wait=False)
    assert ours.connect(where, timeout=0.1, wait=False) is longer
    assert ours.connect(f"127.0.0.1:{free_port}", timeout=0.2, wait=False) is longer
    turns.until(lambda: longer.state == "lost")
    assert "within 0.3 s" in str(longer._error)
    assert not ours._acceptor._premade
    assert not patient.done()
    theirs.listen(where)
    messages_pass(patient.result(LIMIT_S), theirs.accept(LIMIT_S))


@pytest.mark.parametrize("patient", [False, True])
def test_lost_while_its_lanes_are_joined(endpoint, turns, monkeypatch, patient):
    ours, theirs = endpoint(), endpoint()
    where, dial, kept = theirs.listen("127.0.0.1:0"), Lane.dial, []
    monkeypatch.setattr(Lane, "dial", lambda lane: kept.append(lane))
    early = ours.connect(where, timeout=60, wait=False)
    future = ours._acceptor.connect(where, 60) if patient else None
    first = theirs.accept(LIMIT_S)
    turns.until(lambda: kept)
    monkeypatch.setattr(Lane, "dial", dial)
    first.close()
    turns.until(lambda: early.state == "lost" and early._error is not None)
    if future is not None:
        assert future.result(LIMIT_S) is not early
        messages_pass(future.result(), theirs.accept(LIMIT_S))
        return
    turns.until(lambda: not ours._acceptor._dials)  # nobody waits any more: nobody dials
    assert not ours._acceptor._premade
    with pytest.raises(WaitTimeout):
        theirs.accept(timeout=0.2)


@pytest.mark.parametrize("wait", [True, False])
def test_closed_while_another_waits_for_the_same_peer(endpoint, turns, free_port, wait):
    ours, theirs = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    early = ours.connect(where, timeout=60, wait=False)
    patient = ours._acceptor.connect(where, 60)
    turns.until(lambda: ours._acceptor._dials)
    early.close()
    later = None if wait else ours.connect(where, timeout=60, wait=False)
    theirs.listen(where)
    found = patient.result(LIMIT_S)
    assert found is not early
    assert later in (None, found)
    messages_pass(found, theirs.accept(LIMIT_S))


def test_a_timeout_of_its_own_after_the_one_before_was_closed(endpoint, turns, free_port):
    ours = endpoint()
    where = f"127.0.0.1:{free_port}"
    ours.connect(where, timeout=60, wait=False).close()
    later = ours.connect(where, timeout=0.2, wait=False)
    turns.until(lambda: later.state == "lost")
    assert "within 0.2 s" in str(later._error)


@pytest.mark.parametrize("other", ["nobody", "one who waits", "one who was given another"])
def test_the_peers_dial_is_not_given_to_what_was_closed(endpoint, turns, other):
    ours, theirs = endpoint(), endpoint()
    at_ours = ours.listen("127.0.0.1:0")
    elsewhere = theirs.descriptor().replace("@", "@127.0.0.1:1")
    early = ours.connect(elsewhere, timeout=60, wait=False)
    turns.until(lambda: ours._acceptor._dials)
    early._on_close = None  # its dial hasn't heard of it yet
    early.close()
    patient = ours._acceptor.connect(elsewhere, 60) if other == "one who waits" else None
    later = ours.connect(elsewhere, timeout=60, wait=False) if other == "one who was given another" else None
    turns.until(lambda: not ours._acceptor.loop._posted)
    found = theirs.connect(at_ours, timeout=LIMIT_S)
    turns.until(ours.connections)
    (accepted,) = ours.connections()
    assert accepted is not early
    if patient is not None:
        assert patient.result(LIMIT_S) is accepted
    elif later is not None:
        assert later is accepted
    else:
        assert ours.accept(LIMIT_S) is accepted
    messages_pass(found, accepted)


def test_refused_before_there_is_a_session(endpoint, free_port):
    """By key and by token: who comes later is told, as by a connection that was open."""
    ours, theirs = endpoint(), endpoint()
    where, token = f"127.0.0.1:{free_port}", kvt.new_token()
    early = ours.connect(where, timeout=LIMIT_S, wait=False)
    early.refuse("key", "out of memory")
    early.refuse(token, "out of time")
    theirs.listen(where)
    back, pool = theirs.accept(LIMIT_S), theirs.register(bytearray(64))
    waiting = {
        "out of memory": back.recv_blocks(pool, [0], key="key"),
        "out of time": back.read_blocks(token, pool, [1], wait_grant_s=LIMIT_S),
    }
    for reason, transfer in waiting.items():
        with pytest.raises(kvt.PeerAborted, match=reason):
            transfer.result(LIMIT_S / 4)


@pytest.mark.parametrize("seed", range(20))
def test_closed_at_any_time(endpoint, turns, seed):
    order = random.Random(seed)
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen("127.0.0.1:0")
    for _ in range(5):
        early = ours.connect(where, timeout=60, wait=False)
        pause = threading.Event()
        threading.Timer(order.random() * 0.004, pause.set).start()
        pause.wait(LIMIT_S)
        early.close()
    later = ours.connect(where, timeout=LIMIT_S)
    later.send_message(b"here").result(LIMIT_S)
    turns.until(lambda: not ours._acceptor._dials and not ours._acceptor._premade)
    assert ours.connections() == [later]
