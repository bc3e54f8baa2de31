"""Endpoints that find each other: connect, accept, both at once, again, in time, by every form of address."""

import asyncio
import os
import random
import socket
import threading
import time
from functools import partial

import pytest

from kvtransport.acceptor.arrivals import KEPT
from kvtransport.errors import (
    ConnectionClosed,
    ConnectTimeout,
    HandshakeError,
    InsecureConfigError,
    NoCommonPath,
    PeerLost,
    WaitTimeout,
)

LOOPBACK = "127.0.0.1:0"


@pytest.fixture
def lost(turns):
    """Wait until a Connection is lost; return why."""

    def wait(connection):
        turns.until(lambda: connection._error is not None)
        assert connection.state == "lost"
        return connection._error

    return wait


def at_once(*calls):
    """Make calls in threads of their own, at the same moment; return what they returned."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number, call):
        barrier.wait(20)
        results[number] = call()

    threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


# --- one peer ---


@pytest.mark.parametrize("form", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix"])
def test_connect_and_accept(endpoint, form, tmp_path):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(f"unix:{tmp_path}/s" if form == "unix" else form)
    connection = ours.connect(where)
    accepted = theirs.accept()
    assert connection.state == accepted.state == "open"
    assert (connection.peer.incarnation, accepted.peer.incarnation) == (theirs.incarnation, ours.incarnation)
    assert connection.peer.pid == accepted.peer.pid == os.getpid()
    assert connection.peer.uid == accepted.peer.uid == os.geteuid()
    assert connection.peer.address == where
    assert ours.connections() == [connection]
    text = connection.explain()
    assert f"tcp, to {where}" in text
    assert ("plain" if form == "unix" else "digest") in text
    assert "inproc: refused" in text


def test_to_a_connected_peer_the_same_connection(endpoint):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)
    connection = ours.connect(where)
    assert ours.connect(where) is connection
    assert ours.connect(theirs.descriptor()) is connection
    assert ours.connect("localhost:" + where.rpartition(":")[2]) is connection
    assert ours.connect(where, wait=False) is connection
    accepted = theirs.accept()
    with pytest.raises(WaitTimeout):
        theirs.accept(timeout=0)
    ours_at = ours.listen(LOOPBACK)
    assert theirs.connect(ours_at) is accepted  # by the handshake: it didn't know the address
    assert theirs.connect(ours.descriptor()) is accepted


def test_a_lost_connection_stays_so_and_connect_makes_a_new_one(endpoint, lost):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)
    first, accepted = ours.connect(where), theirs.accept()
    first.close()
    lost(accepted)
    second = ours.connect(where)
    assert second is not first
    assert first.state == "lost"
    assert theirs.accept() is not accepted


def test_the_peers_restart_is_told(endpoint, lost, free_port):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(f"127.0.0.1:{free_port}")
    before = ours.connect(where)
    descriptor = theirs.descriptor()
    theirs.close()
    lost(before)
    again = endpoint()
    assert again.listen(where) == where
    after = ours.connect(where)
    assert after.peer.incarnation == again.incarnation
    with pytest.raises(PeerLost, match="descriptor") as caught:
        ours.connect(descriptor)
    assert caught.value.cause == "restarted"


def test_an_endpoint_does_not_connect_to_itself(endpoint):
    ours = endpoint()
    with pytest.raises(HandshakeError, match="itself"):
        ours.connect(ours.listen(LOOPBACK))
    both = endpoint(backends=None)
    both.listen(LOOPBACK)
    with pytest.raises(HandshakeError, match="itself"):
        both.connect(both.descriptor())


def test_in_one_process_without_sockets(endpoint):
    ours, theirs = endpoint(backends=None), endpoint(backends=None)
    connection = ours.connect("inproc:" + theirs.incarnation.hex())
    assert theirs.accept().peer.incarnation == ours.incarnation
    assert ours.connect(theirs.descriptor().replace("@", "@127.0.0.1:1")) is connection
    assert connection.backend == "inproc"
    assert "same process" in connection.explain()


def test_a_descriptor_prefers_the_first_backend_allowed(endpoint):
    theirs = endpoint(backends=None)
    theirs.listen(LOOPBACK)
    for allowed, expected in (((None), "inproc"), (("inproc", "tcp"), "inproc"), (("tcp", "inproc"), "tcp")):
        assert endpoint(backends=allowed).connect(theirs.descriptor()).backend == expected
    only = endpoint(backends=("inproc",))
    with pytest.raises(NoCommonPath) as caught:
        only.connect("127.0.0.1:7000")
    assert caught.value.reasons == {"tcp": "not among Config.backends"}


def test_require_leaves_no_other_way(endpoint):
    theirs = endpoint(backends=None)
    where = theirs.listen(LOOPBACK)
    assert endpoint(backends=None, require={"host": ("tcp",)}).connect(theirs.descriptor()).backend == "tcp"
    with pytest.raises(NoCommonPath) as caught:
        endpoint(backends=None, require={"host": ("inproc",)}).connect(where)
    assert caught.value.reasons == {"tcp": "not among Config.require"}
    other_memory = endpoint(backends=None, require={"cuda": ("inproc",)})
    assert other_memory.connect(where).backend == "shm"


def test_peers_that_nobody_accepts_and_that_have_gone_do_not_pile_up(endpoint):
    theirs = endpoint()
    where = theirs.listen(LOOPBACK)
    queue = theirs._acceptor.arrivals._queue
    for _ in range(KEPT + 20):
        ours = endpoint()
        ours.connect(where).close()
        ours.close()
    assert len(theirs._acceptor.arrivals._queue) <= KEPT + 8, len(queue)


# --- many at once ---


@pytest.mark.parametrize("round_", range(10))
def test_f18_both_sides_connect_at_once(endpoint, round_):
    ours, theirs = endpoint(), endpoint()
    at_ours, at_theirs = ours.listen(LOOPBACK), theirs.listen(LOOPBACK)
    half = 5
    found = at_once(*[lambda: ours.connect(at_theirs)] * half, *[lambda: theirs.connect(at_ours)] * half)
    assert len(set(map(id, found[:half]))) == len(set(map(id, found[half:]))) == 1
    assert found[0]._session.id == found[-1]._session.id
    assert ours.connections() == [found[0]]
    assert theirs.connections() == [found[-1]]


def test_f18_a_hundred_threads_connect_to_one_peer(endpoint):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)
    found = at_once(*[lambda: ours.connect(where)] * 100)
    assert len(set(map(id, found))) == 1
    assert theirs.accept().state == "open"
    with pytest.raises(WaitTimeout):
        theirs.accept(timeout=0)


@pytest.mark.parametrize("seed", range(60))
def test_f18_every_mix_of_connects_ends_in_one_session(endpoint, turns, seed):
    mix = random.Random(seed)
    backends = mix.choice([("tcp",), None])
    ours, theirs = endpoint(backends=backends), endpoint(backends=backends)
    ours.listen(LOOPBACK), theirs.listen(mix.choice([LOOPBACK, "[::1]:0"]))
    both = [(ours, theirs), (theirs, ours)]
    calls = []
    for _ in range(mix.randint(2, 6)):
        one, other = mix.choice(both)
        where = mix.choice([other.descriptor(), other._acceptor.addresses()[0]])
        calls.append(partial(one.connect, where, timeout=20, wait=mix.random() < 0.7))
    found = at_once(*calls)
    turns.until(
        lambda: ours.connections() and theirs.connections() and all(c.state == "open" for c in found), 20
    )
    assert len({c._session.id for c in (*found, *ours.connections(), *theirs.connections())}) == 1


def test_f18_in_one_process(endpoint):
    ours, theirs = endpoint(backends=None), endpoint(backends=None)
    at_ours, at_theirs = (f"inproc:{e.incarnation.hex()}" for e in (ours, theirs))
    found = at_once(*[lambda: ours.connect(at_theirs)] * 5, *[lambda: theirs.connect(at_ours)] * 5)
    assert len(set(map(id, found[:5]))) == len(set(map(id, found[5:]))) == 1
    assert found[0]._session.id == found[-1]._session.id


def test_many_peers_of_one_endpoint(endpoint):
    hub = endpoint()
    where = hub.listen(LOOPBACK)
    spokes = [endpoint() for _ in range(12)]
    found = at_once(*[lambda spoke=spoke: spoke.connect(where) for spoke in spokes])
    assert {c.peer.incarnation for c in found} == {hub.incarnation}
    assert {hub.accept().peer.incarnation for _ in spokes} == {s.incarnation for s in spokes}


# --- in time ---


def test_who_listens_later_is_found(endpoint, free_port):
    ours, theirs = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    future = ours._acceptor.connect(where, 20)
    assert not future.done()
    theirs.listen(where)
    assert future.result(20).peer.incarnation == theirs.incarnation


def test_a_unix_socket_that_comes_later_is_found(endpoint, tmp_path):
    ours, theirs = endpoint(), endpoint()
    future = ours._acceptor.connect(f"unix:{tmp_path}/s", 20)
    theirs.listen(f"unix:{tmp_path}/s")
    assert future.result(20).state == "open"


def test_the_timeout_holds_and_says_why(endpoint, free_port):
    ours, before = endpoint(), time.monotonic()
    with pytest.raises(
        ConnectTimeout, match=f"127.0.0.1:{free_port} within 0.3 s.*Connection refused"
    ) as caught:
        ours.connect(f"127.0.0.1:{free_port}", timeout=0.3)
    assert 0.29 < time.monotonic() - before < 1.5
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.retryable


def test_each_request_has_its_own_timeout(endpoint, free_port):
    ours = endpoint()
    where = f"127.0.0.1:{free_port}"
    patient = ours._acceptor.connect(where, 20)
    with pytest.raises(ConnectTimeout):
        ours.connect(where, timeout=0.1)
    theirs = endpoint()
    theirs.listen(where)
    assert patient.result(20).state == "open"


def test_who_accepts_and_says_nothing_is_timed_out(endpoint):
    ours = endpoint()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ConnectTimeout, match="the last try"),
    ):
        ours.connect(f"127.0.0.1:{server.getsockname()[1]}", timeout=0.3)


def test_a_second_address_is_tried(endpoint, free_port):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)
    assert ours.connect([f"127.0.0.1:{free_port}", where]).peer.address == where


def test_names_that_nobody_has(endpoint):
    ours = endpoint()
    with pytest.raises(ConnectTimeout, match=r"nowhere\.invalid"):
        ours.connect("nowhere.invalid:7000", timeout=0.5)
    with pytest.raises(ConnectTimeout):
        ours.connect("a" * 70 + ".invalid:7000", timeout=0.2)


@pytest.mark.parametrize(
    "where", ["", "7000", "127.0.0.1", "[::1:7000", "inproc:12", "kvt1:00@", [], "unix:" + "x" * 200]
)
def test_malformed(endpoint, where):
    ours = endpoint(backends=None)
    for wait in (True, False):
        with pytest.raises(ValueError):
            ours.connect(where, timeout=5, wait=wait)


def test_beyond_the_host_needs_a_key(endpoint, caplog):
    ours = endpoint()
    with pytest.raises(InsecureConfigError, match="insecure=True"):
        ours.connect("192.0.2.1:7000", timeout=5)
    with pytest.raises(InsecureConfigError):
        ours.listen("0.0.0.0:0")
    loud, wide = endpoint(insecure=True), endpoint(insecure=True)
    where = wide.listen("0.0.0.0:0", advertise=("127.0.0.1:1",))
    assert "127.0.0.1:1" in wide.descriptor()
    loud.connect(where.replace("0.0.0.0", "127.0.0.1"))
    assert sum("insecure=True" in r.message and r.levelname == "WARNING" for r in caplog.records) == 2


# --- without waiting ---


def test_a_connection_before_its_session(endpoint, free_port):
    ours, theirs = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    connection = ours.connect(where, timeout=20, wait=False)
    assert connection.state == "connecting"
    assert ours.connect(where, wait=False) is connection
    theirs.listen(where)
    assert ours.connect(where, timeout=20) is connection
    assert connection.state == "open"
    assert connection.peer.incarnation == theirs.incarnation


def test_a_connection_that_gets_no_session(endpoint, lost, free_port):
    connection = endpoint().connect(f"127.0.0.1:{free_port}", timeout=0.1, wait=False)
    assert isinstance(lost(connection), ConnectTimeout)


def test_the_peers_dial_serves_a_connection_that_waits(endpoint):
    ours, theirs = endpoint(), endpoint()
    at_ours = ours.listen(LOOPBACK)
    waiting = ours.connect(theirs.descriptor().replace("@", "@127.0.0.1:1"), timeout=20, wait=False)
    theirs.connect(at_ours)
    assert ours.connect(theirs.descriptor().replace("@", "@127.0.0.1:2"), timeout=20) is waiting
    assert waiting.state == "open"


def test_two_names_of_one_peer(endpoint, turns):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)
    first = ours.connect("localhost:" + where.rpartition(":")[2], timeout=20, wait=False)
    second = ours.connect(where, timeout=20)
    assert ours.connect("localhost:" + where.rpartition(":")[2], timeout=20)._session.id == second._session.id
    turns.until(lambda: first.state != "connecting")
    assert first._session.id == second._session.id
    assert theirs.accept().state == "open"
    with pytest.raises(WaitTimeout):
        theirs.accept(timeout=0)


def test_await_and_cancel(endpoint, turns, free_port):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen(LOOPBACK)

    async def main():
        assert (await ours.connect_async(where)).state == "open"
        with pytest.raises(ConnectTimeout):
            await ours.connect_async(f"127.0.0.1:{free_port}", timeout=0.1)
        task = asyncio.create_task(ours.connect_async(f"127.0.0.1:{free_port}", timeout=60))
        while not ours._acceptor._dials:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 30))
    turns.until(lambda: not ours._acceptor._dials)


# --- the end ---


def test_what_was_posted_before_close_ends_too(endpoint, lost):
    ours = endpoint()
    inside, go = threading.Event(), threading.Event()
    ours._acceptor.loop.post(lambda: (inside.set(), go.wait(10)))
    assert inside.wait(10)
    later = ours.connect("127.0.0.1:1", timeout=60, wait=False)  # the thread hasn't seen it
    pending = ours._acceptor.connect("127.0.0.1:2", 60)
    thread = threading.Thread(target=ours.close)
    thread.start()
    while ours._acceptor.loop.post(lambda: None):  # until close has told the thread to end
        pass
    go.set()
    thread.join(10)
    assert isinstance(pending.exception(10), ConnectionClosed)
    assert isinstance(lost(later), ConnectionClosed)


def test_close_ends_every_wait(endpoint, lost, free_port):
    ours = endpoint()
    pending = ours._acceptor.connect(f"127.0.0.1:{free_port}", 60)
    later = ours.connect("127.0.0.1:1", timeout=60, wait=False)
    waiting = []

    def wait_for_peer():
        try:
            ours.accept(timeout=60)
        except ConnectionClosed as e:
            waiting.append(e)

    thread = threading.Thread(target=wait_for_peer)
    thread.start()
    ours.close()
    ours.close()
    thread.join(10)
    assert len(waiting) == 1
    assert isinstance(pending.exception(10), ConnectionClosed)
    assert isinstance(lost(later), ConnectionClosed)
    for call in (
        ours.accept,
        ours.descriptor,
        ours.stats,
        lambda: ours.connect(LOOPBACK),
        lambda: ours.listen(LOOPBACK),
    ):
        with pytest.raises(ConnectionClosed):
            call()
    assert ours.closed
    assert "closed" in repr(ours)


def test_close_is_the_peers_loss(endpoint, lost, tmp_path):
    ours, theirs = endpoint(), endpoint()
    connection, accepted = ours.connect(theirs.listen(f"unix:{tmp_path}/s")), theirs.accept()
    theirs.close()
    assert isinstance(lost(connection), PeerLost)
    assert isinstance(lost(accepted), ConnectionClosed)
    assert not os.path.exists(tmp_path / "s")


def test_stats(endpoint):
    ours, theirs = endpoint(), endpoint()
    ours.connect(theirs.listen(LOOPBACK))
    theirs.accept()
    stats = theirs.stats()
    assert stats["connections"] == stats["handshakes_accepted"] == 1
    assert len(stats["peers"]) == 1


def test_messages_find_their_connection(endpoint):
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen(LOOPBACK))
    accepted = theirs.accept()
    connection.send_message(b"hello").result(10)
    assert theirs.recv_messages(timeout=10) == [(accepted, b"hello")]
    assert theirs.recv_messages() == []
