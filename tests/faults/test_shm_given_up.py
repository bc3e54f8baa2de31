"""F3, F4, F11, F15, F29 in the middle of a copy: a side gives up, or stands still, while memory is read.

Over shared memory no byte is on a lane, that a proxy might hold: transfers are large, and are caught in the middle.
"""

import time

import pytest

from kvtransport import wait
from kvtransport.errors import PeerAborted, PeerLost, TransferCancelled
from tests.faults.peers import (
    ROUNDS,
    SLOW_S,
    check_delivered,
    check_median,
    states,
    stopped,
    within,
)
from tests.faults.sharing import (
    COUNT,
    SMALL,
    check_copied,
    in_mid_copy,
    sharing_with,
    started,
)
from tests.waiting import until

REUSABLE_S = 0.001
DEAD_AFTER_S = 2.0
pytestmark = pytest.mark.timeout(120)
KINDS = pytest.mark.parametrize("kind", ["allocate", "register"], ids=["mapped", "process_vm_readv"])


def sealed_of(error) -> list[int]:
    return [block for block, state in states(error).items() if state == "sealed"]


def rewrite_first(here, error) -> range:
    """Fill the blocks that were being copied, before anything else: what still landed there would be seen."""
    first = min(block for block, state in states(error).items() if state == "poisoned")
    blocks = range(first, min(first + (4 << 20) // SMALL.nbytes, COUNT))
    here.actor.memory["to"][0][blocks.start * SMALL.nbytes : blocks.stop * SMALL.nbytes] = 0xAB
    return blocks


def sends_again(source, destination, key: str) -> None:
    """Move some blocks by the same way, behind all that went before."""
    destination.pool(key, SMALL)
    destination.recv(key, key, range(SMALL.count))
    source.send(key, "of", range(SMALL.count))
    assert destination.result(key)["backend"] == source.result(key)["backend"] == "shm"
    destination.holds(key, SMALL.after(SMALL, range(SMALL.count), range(SMALL.count)))


@KINDS
def test_f11_destination_cancels_in_mid_copy(kind):
    """What was there is reusable within a millisecond, and no byte lands afterwards."""
    took = []
    for _ in range(ROUNDS):
        with started() as peer, sharing_with(peer) as here:
            in_mid_copy(peer, here, kind)
            handle = here.actor.handles["t"]
            start = time.perf_counter()
            handle.cancel()
            wait([handle], 20)
            took.append(time.perf_counter() - start)
            error = handle.exception()
            rewritten = rewrite_first(here, error)
            assert type(error) is TransferCancelled
            assert error.quiesced is True
            check_copied(here, (block for block in sealed_of(error) if block not in rewritten))
            for memory in (
                here.actor.memory["to"][0][: rewritten.start * SMALL.nbytes],
                here.actor.memory["to"][0][rewritten.stop * SMALL.nbytes :],
            ):
                memory[:] = 0xAB
            theirs = peer.error("t")
            assert type(theirs) is PeerAborted
            check_delivered(theirs)
            sends_again(peer, here, "again")
            assert (here.actor.memory["to"][0] == 0xAB).all()
    check_median(took, 0, REUSABLE_S)


@KINDS
@pytest.mark.parametrize("how", ["cancel", "close the pool"])
def test_f11_f15_source_rewrites_in_mid_copy(kind, how):
    """Once its transfer is over, nothing that is read from it is sealed."""
    with started() as peer, sharing_with(peer) as here:
        in_mid_copy(here, peer, kind)
        here.cancel("t")
        if how == "cancel":
            with within(SLOW_S):
                error = here.error("t")
            assert type(error) is TransferCancelled
            check_delivered(error)
        else:
            here.actor.pools["of"].close(timeout=20)
            until(lambda: here.done("t"))
        for layer in here.actor.memory["of"]:
            layer[:] = 0xCD
        theirs = peer.error("t")
        assert type(theirs) is PeerAborted
        peer.call("check_room", name="to", blocks=sealed_of(theirs))


@KINDS
def test_f03_owner_stopped_in_mid_copy(kind):
    """Its memory can be read while it stands still, but it answers nothing: it is found dead by its silence."""
    with started() as peer, sharing_with(peer) as here:
        peer.call("pool_of", kind=kind, name="of", blocks=SMALL.to_json())
        peer.gate("g", 1)
        here.pool("to", SMALL)
        here.recv("t", "to", range(SMALL.count))
        peer.send("t", "of", range(SMALL.count), gate="g")
        until(lambda: here.state("t") == "matched")
        start = time.monotonic()
        with stopped(peer.pid):
            error = here.error("t")
            assert DEAD_AFTER_S - 0.3 < time.monotonic() - start < DEAD_AFTER_S + 0.3 + SLOW_S
            assert (type(error), error.cause) == (PeerLost, "heartbeat")
        theirs = peer.error("t")
        assert type(theirs) is PeerLost
        check_delivered(theirs)
        here.holds("to", SMALL.memory())


@KINDS
@pytest.mark.parametrize("we_receive", [True, False], ids=["we receive", "we send"])
def test_f04_peer_stopped_for_half_a_second_in_mid_copy(kind, we_receive):
    with started() as peer, sharing_with(peer) as here:
        source, destination = (peer, here) if we_receive else (here, peer)
        in_mid_copy(source, destination, kind)
        with stopped(peer.pid):
            time.sleep(0.5)  # the fault itself
        assert source.result("t")["backend"] == destination.result("t")["backend"] == "shm"
        destination.call("check_room", name="to", blocks=list(range(COUNT)))


def test_f29_abort_storm():
    """Nine of ten are cancelled at once; the others are whole, and every guard comes back."""
    with started() as peer, sharing_with(peer) as here:
        peer.call("pool_of", kind="allocate", name="of", blocks=SMALL.to_json())
        here.call("room", name="to")
        for n in range(50):
            names = [f"{n}.{k}" for k in range(SMALL.count)]
            for k, name in enumerate(names):
                here.recv(name, "to", [k], match_timeout_s=5)
                peer.send(name, "of", [k], match_timeout_s=5)
                if k % 10:
                    (here if k % 2 else peer).cancel(name)
            for k, name in enumerate(names):
                got = here.error(name)
                sent = peer.error(name)
                assert (got is None) or (sent is not None)
                if got is None:
                    check_copied(here, [k])
                assert k % 10 or (got is None and sent is None)
        here.call("close_pool", name="to")
        sends_again(peer, here, "again")
        peer.call("close_pool", name="of")
