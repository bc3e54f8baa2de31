"""F22: a byte changes in the destination's memory after it has landed, before it is sealed."""

import pytest

from kvtransport.errors import IntegrityError, PeerAborted
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    OF,
    TO,
    check_delivered,
    check_landed,
    check_states,
    post,
)
from tests.faults.proxy import Fault
from tests.waiting import until

BAD = 5


@pytest.mark.parametrize("byte", [0, 777, CHUNK - 1])
def test_f22_flipped_after_landing(tcp, byte):
    """The digest is made of what lies in place when the trailer comes."""
    trailer = Fault("lane", "down", BAD * FRAME + HEADER + CHUNK, "hold")
    with tcp.linked(trailer) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        assert trailer.reached.wait(20)
        landed, sent = TO.views(here.actor.memory["to"])[0][BAD], OF.views(OF.memory())[0][BAD]
        until(lambda: (landed == sent).all())
        landed[byte] ^= 1
        trailer.go.set()
        error, theirs = here.error("t"), peer.error("t")
        assert type(error) is IntegrityError
        sealed = [block for block in IDS if block != BAD]
        check_states(error, sealed)
        check_landed(here, sealed)
        assert type(theirs) is PeerAborted
        assert theirs.delivered is False
        check_delivered(theirs)
