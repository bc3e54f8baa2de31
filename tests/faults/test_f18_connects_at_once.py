"""F18: both sides connect to each other at once; a hundred threads connect to one peer."""

import threading

from kvtransport import Config, Endpoint
from tests.faults.peers import IDS, OF, TO
from tests.waiting import until

THREADS = 100


def moves(connection, endpoint, peer, key: str) -> None:
    """Send all blocks over it, and see them arrive."""
    pool = endpoint.register(OF.views(OF.memory()))
    peer.pool(key, TO)
    peer.recv(key, key, IDS)
    connection.send_blocks(pool, IDS, key=key).result(20)
    peer.result(key)
    peer.holds(key, TO.after(OF, IDS, IDS))


def one_round(peer, n: int) -> None:
    """Both listen, both connect; one session comes of it."""
    with Endpoint(Config(backends=("tcp",))) as ours:
        where = ours.listen("127.0.0.1:0")
        theirs = peer.call("listen", address="127.0.0.1:0")
        peer.ask("connect", address=where)
        connection = ours.connect(theirs, timeout=20)
        peer.answer("connect")
        until(lambda: peer.call("connection_state") == "open" and connection.state == "open")
        assert ours.connections() == [connection]
        assert ours.connect(theirs) is connection
        assert peer.call("stats")["connections"] == 1
        moves(connection, ours, peer, f"t{n}")
    until(lambda: peer.call("stats")["connections"] == 0)


def test_f18_both_connect_at_once(far):
    peer = far("peer")
    for n in range(10):
        one_round(peer, n)


def test_f18_a_hundred_threads_connect_to_one_peer(far):
    peer = far("peer")
    where = peer.call("listen", address="127.0.0.1:0")
    found, barrier = [], threading.Barrier(THREADS)
    with Endpoint(Config(backends=("tcp",))) as ours:

        def connect() -> None:
            barrier.wait(30)
            found.append(ours.connect(where, timeout=20))

        threads = [threading.Thread(target=connect) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert len(found) == THREADS
        assert len(set(map(id, found))) == 1
        peer.call("accept")
        assert peer.call("stats")["connections"] == len(ours.connections()) == 1
        moves(found[0], ours, peer, "t")
