"""F1, F2: the peer is killed in mid-transfer, also while a forked child of it lives on.

A child of `os.fork` has closed its copies of the sockets; one of the bare system call keeps them, so that no socket
tells of the end of its parent: only the parent's pidfd does.
"""

import pytest

from kvtransport.errors import PeerLost
from kvtransport.testing.blocks import Blocks
from tests.faults.keeper import sockets
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    ROUNDS,
    SLOW_S,
    check_delivered,
    check_landed,
    check_median,
    check_states,
    check_untouched,
    linked_to,
    post,
    rewrite,
    within,
)
from tests.faults.proxy import Fault
from tests.waiting import until

LANDED = (0, 1, 2)
MID_CHUNK = len(LANDED) * FRAME + HEADER + 1000
KNOWN_S = 0.05
HALF = Blocks(4, CHUNK, layers=2)
CHILDREN = pytest.mark.parametrize("child", ["none", "of fork", "keeps the sockets"])


def give_child(peer, child: str) -> None:
    if child == "of fork":
        peer.fork()
    elif child == "keeps the sockets":
        before = sockets(peer.pid)
        assert len(before) >= 2  # control, a lane
        assert sockets(peer.clone()) >= before


@CHILDREN
def test_f01_sender_killed(tcp, child):
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        give_child(peer, child)
        post(peer, here)
        assert held.reached.wait(20)
        until(lambda: here.progress("t")[0] == len(LANDED) * CHUNK)
        peer.kill()
        with within(SLOW_S):
            error = here.error("t")
        assert type(error) is PeerLost
        assert error.cause == "reset"
        assert error.retryable
        check_states(error, LANDED)
        check_landed(here, LANDED)
        rewrite(here)
        assert here.call("connection_state") == "lost"
        with pytest.raises(PeerLost):
            here.recv("late", "to", IDS)
        here.call("close_pool", name="to")


@CHILDREN
def test_f02_receiver_killed(tcp, child):
    held = Fault("lane", "up", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        give_child(peer, child)
        post(here, peer)
        assert held.reached.wait(20)
        peer.kill()
        with within(SLOW_S):
            error = here.error("t")
        assert type(error) is PeerLost
        assert error.cause == "reset"
        check_delivered(error)
        here.call("close_pool", name="of")


def test_f01_late_bytes_of_the_dead_land_nowhere(tcp):
    """What the network still holds when the sender dies isn't stored once its transfer is over."""
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        post(peer, here)
        assert held.reached.wait(20)
        peer.kill()
        assert type(here.error("t")) is PeerLost
        rewrite(here)
        held.go.set()
        tcp.proxy.close()  # returns when the proxy has passed on all that it had
        check_untouched(here)


def half_way(source, destination, key: str) -> None:
    """Begin a transfer whose second layer waits for a gate."""
    source.pool(key, HALF)
    destination.pool(key, HALF)
    source.gate(key, HALF.layers)
    destination.recv(key, key, range(HALF.count))
    source.send(key, key, range(HALF.count), gate=key)
    source.mark(key, 0)
    until(lambda: destination.progress(key)[0] == HALF.count * CHUNK)


@pytest.mark.parametrize("child", ["none", "keeps the sockets"])
def test_f01_f02_known_within_50_ms(far, child):
    """To the destination of one transfer and to the source of another one."""
    took = []
    for peer in [far(f"peer {n}") for n in range(ROUNDS)]:
        with linked_to(peer) as here:
            half_way(peer, here, "f01")
            half_way(here, peer, "f02")
            give_child(peer, child)
            peer.kill()
            with within(SLOW_S, took):
                errors = here.error("f01"), here.error("f02")
            assert [(type(error), error.cause) for error in errors] == [(PeerLost, "reset")] * 2
    check_median(took, 0, KNOWN_S)
