"""F9, F10: a bit arrives other than it was sent, in a payload or in a header."""

import pytest

from kvtransport.errors import IntegrityError, PeerAborted, PeerLost, RemoteProtocolError
from tests.faults.peers import (
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

BAD = 4


@pytest.mark.parametrize("bad", [0, BAD, len(IDS) - 1])
@pytest.mark.parametrize("byte", [0, 12345, 65535])
def test_f09_payload_flipped(tcp, byte, bad):
    flip = Fault("lane", "down", bad * FRAME + HEADER + byte, "flip")
    with tcp.linked(flip) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        error, theirs = here.error("t"), peer.error("t")
        assert flip.reached.is_set()
        assert type(error) is IntegrityError
        assert error.retryable
        assert type(theirs) is PeerAborted
        check_delivered(theirs)
        assert theirs.delivered is False
        sealed = [block for block in IDS if block != bad]
        check_states(error, sealed)
        check_landed(here, sealed)
        rewrite(here)
        here.recv("again", "to", IDS, key="t")
        peer.send("again", "of", IDS, key="t")
        here.result("again")
        check_landed(here, IDS)


@pytest.mark.parametrize("byte", [0, 4, 8, 16, 60])
def test_f10_lane_header_flipped(tcp, byte):
    flip = Fault("lane", "down", BAD * FRAME + byte, "flip")
    with tcp.linked(flip) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        with within(SLOW_S):
            error, theirs = here.error("t"), peer.error("t")
        assert flip.reached.is_set()
        assert type(error) is RemoteProtocolError
        check_states(error, IDS[:BAD])
        check_landed(here, IDS[:BAD])
        assert type(theirs) is PeerLost
        assert theirs.cause == "closed"
        check_delivered(theirs)
        rewrite(here)
        tcp.proxy.close()
        check_untouched(here)
        assert here.call("connection_state") == "lost"


@pytest.mark.parametrize("we_receive", [True, False])
def test_f10_control_header_flipped(tcp, we_receive):
    """Whoever reads it ends the connection, and says why; the other side has lost its peer."""
    lane, control = ("down", "up") if we_receive else ("up", "down")
    held = Fault("lane", lane, BAD * FRAME + HEADER + 5, "hold")
    flip = Fault("control", control, None, "flip")
    with tcp.linked(held, flip) as rig:
        source, destination = (rig.peer, rig.here) if we_receive else (rig.here, rig.peer)
        post(source, destination)
        assert held.reached.wait(20)
        flip.armed.set()
        error, theirs = source.error("t"), destination.error("t")
        assert type(error) is RemoteProtocolError
        check_delivered(error)
        assert type(theirs) is PeerLost
        assert set(IDS) - set(theirs.failed_block_ids) <= set(IDS[:BAD])
