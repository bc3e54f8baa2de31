"""F1, F2: the peer is killed in mid-transfer, also while a forked child of it lives on."""

import pytest

from kvtransport.errors import PeerLost
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    SLOW_S,
    check_delivered,
    check_landed,
    check_states,
    check_untouched,
    post,
    rewrite,
    within,
)
from tests.faults.proxy import Fault
from tests.waiting import until

LANDED = (0, 1, 2)
MID_CHUNK = len(LANDED) * FRAME + HEADER + 1000


@pytest.mark.parametrize("child", [False, True], ids=["alone", "forked child lives"])
def test_f01_sender_killed(tcp, child):
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        if child:
            peer.fork()
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


@pytest.mark.parametrize("child", [False, True], ids=["alone", "forked child lives"])
def test_f02_receiver_killed(tcp, child):
    held = Fault("lane", "up", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.process(), rig.here
        if child:
            peer.fork()
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
