"""F7: the link ends by FIN or RST, at any byte of a frame. The simulator tries every byte of small ones."""

import pytest

from kvtransport.errors import PeerLost
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
    post,
    rewrite,
    within,
)
from tests.faults.proxy import Fault

IN_CHUNK = {
    "before the first byte": 0,
    "in the header": 17,
    "after the header": HEADER,
    "in the body": HEADER + 4097,
    "before the trailer": HEADER + CHUNK,
    "in the trailer": HEADER + CHUNK + 3,
}
KNOWN_S = 0.05

EVERY = {
    "header": range(HEADER + 1),
    "body": range(HEADER + 1, HEADER + CHUNK, 4099),
    "trailer": range(HEADER + CHUNK, FRAME + 1),
}


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("place", IN_CHUNK.values(), ids=IN_CHUNK)
def test_f07_lane_cut(tcp, how, place):
    """Both sides lose the peer; blocks that had come whole may be sealed, all others are poisoned."""
    cut_lane(tcp, how, place)


@pytest.mark.parametrize("part", EVERY)
def test_f07_lane_cut_everywhere(tcp, part):
    """The same at every byte of header and trailer, and at each some thousandth of the body; FIN and RST in turn."""
    took = []
    for n, place in enumerate(EVERY[part]):
        cut_lane(tcp, "rst" if n % 2 else "fin", place, took)
    check_median(took, 0, KNOWN_S)


def cut_lane(tcp, how, place, took=None):
    cut = Fault("lane", "down", 3 * FRAME + place, how)
    with tcp.linked(cut) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        assert cut.reached.wait(20)
        with within(SLOW_S, took):
            error, theirs = here.error("t"), peer.error("t")
        assert type(error) is type(theirs) is PeerLost
        assert error.cause == theirs.cause == "reset"
        sealed = [block for block in IDS if block not in error.failed_block_ids]
        whole = [0, 1, 2, 3] if place == FRAME else [0, 1, 2]
        assert sealed == whole[: len(sealed)], (how, place)
        assert how == "rst" or sealed == whole, place  # a RST may overtake what the kernel still held
        check_states(error, sealed)
        check_landed(here, sealed)
        check_delivered(theirs)
        rewrite(here)
        tcp.proxy.close()
        check_untouched(here)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_f07_control_cut(tcp, how, way):
    """The control connection's end, in mid-transfer."""
    took = []
    for _ in range(ROUNDS):
        cut_control(tcp, how, way, took)
    check_median(took, 0, KNOWN_S)


def cut_control(tcp, how, way, took):
    held = Fault("lane", "up", FRAME + HEADER + 99, "hold")
    cut = Fault("control", way, None, how)
    with tcp.linked(held, cut) as rig:
        peer, here = rig.peer, rig.here
        post(here, peer)
        assert held.reached.wait(20)
        cut.armed.set()  # the next frame is a PING, within 250 ms
        assert cut.reached.wait(20)
        with within(SLOW_S, took):
            error, theirs = peer.error("t"), here.error("t")
        assert type(error) is type(theirs) is PeerLost
        assert error.cause == theirs.cause == "reset"
        check_states(error, [block for block in IDS[:1] if block not in error.failed_block_ids])
        check_delivered(theirs)
        sealed = [block for block in IDS if block not in error.failed_block_ids]
        found = peer.call("digests", name="to")
        held.go.set()
        tcp.proxy.close()
        assert peer.call("digests", name="to") == found
        assert set(sealed) <= {0}
