"""F3, F4: a process stands still: the peer for too long, the peer for a moment, our own."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtransport import Config, Endpoint
from kvtransport.errors import PeerLost
from kvtransport.testing.side import ProcessSide
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    OF,
    ROUNDS,
    SLOW_S,
    TO,
    check_delivered,
    check_landed,
    check_median,
    check_states,
    check_untouched,
    linked_to,
    post,
    rewrite,
    stopped,
)
from tests.faults.proxy import Fault
from tests.waiting import until

LANDED = (0, 1)
MID_CHUNK = len(LANDED) * FRAME + HEADER + 1000
OWN_PAUSE_S = 5
DEAD_AFTER_S = 2.0


def test_f03_sender_stopped(tcp):
    """Found dead by its silence; what it still sends when it goes on lands nowhere."""
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        post(peer, here)
        assert held.reached.wait(20)
        until(lambda: here.progress("t")[0] == len(LANDED) * CHUNK)
        start = time.monotonic()
        with stopped(peer.pid):
            error = here.error("t")
            assert DEAD_AFTER_S - 0.3 < time.monotonic() - start < DEAD_AFTER_S + 0.3 + SLOW_S
            assert type(error) is PeerLost
            assert error.cause == "heartbeat"
            check_states(error, LANDED)
            check_landed(here, LANDED)
            rewrite(here)
        held.go.set()
        theirs = peer.error("t")
        assert type(theirs) is PeerLost
        check_delivered(theirs)
        assert peer.call("connection_state") == "lost"
        check_untouched(here)


def test_f03_receiver_stopped(way):
    with way.linked() as rig:
        peer, here = rig.process(), rig.here
        here.pool("of", OF)
        peer.pool("to", TO)
        here.gate("g", 1)
        peer.recv("t", "to", IDS)
        here.send("t", "of", IDS, gate="g")
        until(lambda: here.state("t") == "matched")
        start = time.monotonic()
        with stopped(peer.pid):
            error = here.error("t")
            assert DEAD_AFTER_S - 0.3 < time.monotonic() - start < DEAD_AFTER_S + 0.3 + SLOW_S
            assert type(error) is PeerLost
            assert error.cause == "heartbeat"
            check_delivered(error)
        theirs = peer.error("t")
        assert type(theirs) is PeerLost
        check_states(theirs, ())
        peer.holds("to", TO.memory())


def test_f03_found_after_two_seconds(far):
    """By endpoints that don't know of each other."""
    peer = far("peer")
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(linked_to(peer)) for _ in range(ROUNDS)]
        for here in sides:
            here.pool("to", TO)
            here.recv("t", "to", IDS)
        workers = stack.enter_context(ThreadPoolExecutor(ROUNDS))

        def seconds(here) -> float:
            error = here.error("t")
            assert (type(error), error.cause) == (PeerLost, "heartbeat")
            return time.monotonic() - start

        start = time.monotonic()
        with stopped(peer.pid):
            took = list(workers.map(seconds, sides))
    check_median(took, DEAD_AFTER_S - 0.3, DEAD_AFTER_S + 0.3)


@pytest.mark.parametrize("we_receive", [True, False])
def test_f04_peer_stopped_for_half_a_second(tcp, we_receive):
    """Nobody is declared dead, and the transfer goes on."""
    held = Fault("lane", "down" if we_receive else "up", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        source, destination = (rig.peer, rig.here) if we_receive else (rig.here, rig.peer)
        post(source, destination)
        assert held.reached.wait(20)
        with stopped(rig.process().pid):
            time.sleep(0.5)  # the fault itself
        held.go.set()
        assert source.result("t")["nbytes"] == destination.result("t")["nbytes"] == len(IDS) * CHUNK
        destination.holds("to", TO.after(OF, IDS, IDS))


@pytest.fixture
def frozen():
    """A process whose endpoint has the default limits; it connects to whom a test says."""
    side = ProcessSide("frozen")
    side.call("start", config={"backends": ["tcp"]})
    yield side
    side.end()


@pytest.mark.parametrize("patience_s", [30.0, 2.0], ids=["a patient peer", "a peer that gives up"])
def test_f04_our_own_pause_declares_nobody_dead(frozen, patience_s):
    """Who has stood still blames nobody: the transfer goes on, or ends by the verdict of the other side."""
    with Endpoint(Config(backends=("tcp",), dead_after_s=patience_s)) as patient:
        address = patient.listen("127.0.0.1:0")
        frozen.call("connect", address=address)
        connection = patient.accept()
        memory = TO.memory()
        pool = patient.register(TO.views(memory))
        frozen.pool("of", OF)
        frozen.gate("g", 1)
        ours = connection.recv_blocks(pool, IDS, key="t")
        frozen.send("t", "of", IDS, gate="g")
        until(lambda: ours.state == "matched")
        with stopped(frozen.pid):
            time.sleep(OWN_PAUSE_S)  # the fault itself
        if patience_s > OWN_PAUSE_S:
            frozen.mark("g", 0)
            assert frozen.result("t")["nbytes"] == ours.result(20).nbytes == len(IDS) * CHUNK
            assert (TO.views(memory)[0] == OF.views(OF.memory())[0][: TO.count]).all()
            return
        theirs, error = frozen.error("t"), ours.exception()
        assert type(error) is PeerLost
        assert error.cause == "heartbeat"
        assert type(theirs) is PeerLost
        assert theirs.cause != "heartbeat"
