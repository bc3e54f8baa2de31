"""F23, F24: a process that shares its memory is killed while that is copied, or while it copies ours.

By memory that is mapped, and by process_vm_readv. F1 and F2 are the same deaths over TCP.
"""

import pytest

from kvtransport.errors import PeerLost
from tests.faults.peers import ROUNDS, SLOW_S, check_delivered, check_median, states, within
from tests.faults.sharing import (
    COUNT,
    SMALL,
    Held,
    check_copied,
    in_mid_copy,
    sharing_with,
    started,
)
from tests.waiting import until

KNOWN_S = 0.05
pytestmark = pytest.mark.timeout(120)
KINDS = pytest.mark.parametrize("kind", ["allocate", "register"], ids=["mapped", "process_vm_readv"])
CHILDREN = pytest.mark.parametrize("child", ["none", "of fork", "keeps the sockets"])


def give_child(peer, child: str) -> None:
    if child == "of fork":
        peer.fork()
    elif child == "keeps the sockets":
        peer.clone()


def owner_dies(kind: str, child: str, took: list[float]) -> None:
    """What is sealed then is what was sent, and nothing of the owner's is kept."""
    with started() as peer:
        held = Held.now()
        with sharing_with(peer) as here:
            give_child(peer, child)
            in_mid_copy(peer, here, kind)
            assert Held.now().mappings > held.mappings
            peer.kill()
            with within(SLOW_S, took):
                error = here.error("t")
            assert (type(error), error.cause) == (PeerLost, "reset")
            assert error.retryable
            assert error.quiesced is True
            found = states(error)
            assert set(found) == set(range(COUNT))
            check_copied(here, (block for block, state in found.items() if state == "sealed"))
            here.actor.memory["to"][0][:] = 0xAB  # at once: nobody stores there any more
            assert here.actor.handles["t"].done()
            until(lambda: Held.now().mappings == held.mappings)  # with the session, though the handle is kept
            assert (here.actor.memory["to"][0] == 0xAB).all()
            here.call("close_pool", name="to")
        until(lambda: Held.now() == held)


@CHILDREN
@KINDS
def test_f23_f24_owner_killed_in_mid_copy(kind, child):
    owner_dies(kind, child, [])


@KINDS
def test_f23_f24_known_within_50_ms(kind):
    took = []
    for _ in range(ROUNDS):
        owner_dies(kind, "none", took)
    check_median(took, 0, KNOWN_S)


@CHILDREN
@KINDS
def test_f02_f23_reader_killed_in_mid_copy(kind, child):
    """The owner may free at once what the dead had mapped."""
    with started() as peer:
        held = Held.now()
        with sharing_with(peer) as here:
            give_child(peer, child)
            in_mid_copy(here, peer, kind)
            peer.kill()
            with within(SLOW_S):
                error = here.error("t")
            assert (type(error), error.cause) == (PeerLost, "reset")
            check_delivered(error)
            here.call("close_pool", name="of")
        until(lambda: Held.now() == held)


@KINDS
def test_f24_what_was_copied_before_stays(kind):
    """A transfer that is over is over: its bytes are ours, wherever they came from."""
    with started() as peer, sharing_with(peer) as here:
        peer.call("pool_of", kind=kind, name="of", blocks=SMALL.to_json())
        here.pool("to", SMALL)
        here.recv("t", "to", range(SMALL.count))
        peer.send("t", "of", reversed(range(SMALL.count)))
        assert here.result("t")["backend"] == "shm"
        peer.kill()
        until(lambda: here.call("connection_state") == "lost")
        here.holds("to", SMALL.after(SMALL, range(SMALL.count), reversed(range(SMALL.count))))
