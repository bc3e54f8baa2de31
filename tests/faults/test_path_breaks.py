"""The way of a transfer breaks in the middle: shared memory is gone, the session isn't. It goes on by TCP."""

import pytest

from tests.faults.sharing import COUNT, SMALL, Held, check_copied, in_mid_copy, sharing_with, started
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("kind", ["allocate", "register"], ids=["mapped", "process_vm_readv"])
@pytest.mark.parametrize("breaks", ["here", "peer"])
@pytest.mark.parametrize("we_receive", [True, False], ids=["we receive", "we send"])
def test_a_transfer_goes_on_by_tcp(kind, breaks, we_receive):
    with started() as peer, sharing_with(peer) as here:
        source, destination = (peer, here) if we_receive else (here, peer)
        in_mid_copy(source, destination, kind)
        assert (here if breaks == "here" else peer).call("cut_channel") == 1
        got, sent = destination.result("t"), source.result("t")
        assert got["nbytes"] == sent["nbytes"] == COUNT * SMALL.nbytes
        assert 0 < got["resumed_nbytes"] < got["nbytes"]
        assert got["resumed_nbytes"] == sent["resumed_nbytes"]
        assert got["backend"] == sent["backend"] == "tcp"
        check_counted(source, "send", sent)
        check_counted(destination, "recv", got)
        if we_receive:
            check_copied(here, range(COUNT))
        else:
            destination.call("check_room", name="to", blocks=list(range(COUNT)))
        later_goes_by_tcp(source, destination)
        for side in (here, peer):
            assert side.call("connection_state") == "open"
            assert "shm: refused: the channel of shared memory was closed" in side.call("explain")


def check_counted(side, operation, result) -> None:
    """Each way has the bytes that went by it; the transfer is counted once."""
    cells = {name: of[operation]["ok"] for name, of in side.call("operations").items() if operation in of}
    assert {name: cell["nbytes"] for name, cell in cells.items()} == {
        "shm": result["resumed_nbytes"],
        "tcp": result["nbytes"] - result["resumed_nbytes"],
    }
    assert (cells["shm"]["count"], cells["tcp"]["count"]) == (0, 1)


def later_goes_by_tcp(source, destination) -> None:
    before = Held.now().mappings
    destination.pool("later", SMALL)
    destination.recv("later", "later", range(SMALL.count))
    source.send("later", "of", range(SMALL.count))
    assert destination.result("later")["backend"] == source.result("later")["backend"] == "tcp"
    assert source.result("later")["resumed_nbytes"] == 0
    destination.holds("later", SMALL.after(SMALL, range(SMALL.count), range(SMALL.count)))
    assert Held.now().mappings <= before


def test_what_is_posted_meanwhile_waits_for_nothing():
    """The channel breaks before a transfer meets its partner, which was to be copied."""
    with started() as peer, sharing_with(peer) as here:
        peer.call("pool_of", kind="allocate", name="of", blocks=SMALL.to_json())
        here.pool("to", SMALL)
        here.recv("t", "to", range(SMALL.count))
        until(lambda: here.call("cut_channel") == 1)
        until(lambda: not here.call("shared"))
        peer.send("t", "of", range(SMALL.count))
        result = here.result("t")
        assert (result["backend"], result["resumed_nbytes"]) == ("tcp", 0)
        here.holds("to", SMALL.after(SMALL, range(SMALL.count), range(SMALL.count)))
