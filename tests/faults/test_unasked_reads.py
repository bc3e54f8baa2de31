"""Reads that ask the owner nothing: small ones, over shared memory, of a grant that the reader was shown."""

import numpy as np
import pytest

import kvtransport as kvt
from kvtransport.errors import LayoutMismatch, StaleGrant
from kvtransport.testing.blocks import Blocks
from tests.faults.peers import CHUNK, IDS, OF, TO, Through, stopped
from tests.waiting import until

LIMIT_S = 10
FEW = [0, 1]
MANY = [*IDS] * 4  # more than the calling thread copies by itself


@pytest.fixture(params=[True, False], ids=["mapped", "by process_vm_readv"])
def rig(request):
    """Two sides with memory shared, and grants for the reader alone."""
    harness = Through(
        "shm", "127.0.0.1:0", config={"backends": ["shm", "tcp"]}, allocates=request.param, names_readers=True
    )
    with harness.linked() as linked:
        linked.peer.pool("of", OF)
        linked.here.pool("to", TO)
        yield linked
    harness.close()


def read(side, handle: str, token: str, ids=FEW) -> None:
    side.read(handle, token, "to", ids, subset=ids)


def shown(rig, handle: str, token: str) -> None:
    """The owner's half of it is there when a read is over before its call returns."""

    def at_once() -> bool:
        read(rig.here, handle, token)
        before = rig.here.done(handle)
        rig.here.result(handle)
        return before

    until(at_once)


def test_the_owner_stands_still(rig):
    """It is stopped, and its blocks are read nonetheless; a large read waits for it."""
    here, token = rig.here, rig.peer.grant("g", "of", IDS, readers=None)
    shown(rig, "first", token)
    here.pool("large", Blocks(len(MANY), CHUNK))
    with stopped(rig.process().pid):
        for n in range(50):
            read(here, f"t{n}", token)
            assert here.done(f"t{n}")
        here.read("large", token, "large", range(len(MANY)), subset=MANY)
        assert not here.done("large")
    assert here.result("t49")["backend"] == "shm"
    assert here.result("large")["nbytes"] == len(MANY) * CHUNK
    here.holds("to", TO.after(OF, FEW, FEW))


def test_the_owner_counts_them(rig):
    """One read finishes a grant for one, and the owner hears of it; a second is refused, whoever is quicker."""
    here, peer = rig.here, rig.peer
    shown(rig, "warm", peer.grant("standing", "of", IDS, readers=None))
    for n in range(20):
        token = peer.grant(f"g{n}", "of", FEW)
        here.read(f"t{n}", token, "to", FEW)
        assert here.done(f"t{n}")
        here.read(f"again{n}", token, "to", FEW)
        here.result(f"t{n}")
        assert isinstance(here.error(f"again{n}"), StaleGrant)
        assert peer.result(f"g{n}") == {}
        assert peer.state(f"g{n}") == "read"


def test_with_a_lease_any_number(rig):
    """Of a counted grant, too; after its release none."""
    here, peer = rig.here, rig.peer
    token = peer.grant("g", "of", FEW, to=None)
    here.hold("l", token)
    until(lambda: here.call("held", handle="l"))
    for n in range(5):
        here.read(f"t{n}", token, "to", FEW)
        assert here.done(f"t{n}")
        here.result(f"t{n}")
    here.call("release", handle="l")
    here.read("late", token, "to", FEW)
    assert isinstance(here.error("late"), StaleGrant)
    assert peer.state("g") == "read"


@pytest.mark.parametrize("by", ["revoke", "reuse"])
def test_the_end_is_seen_at_once(rig, by):
    """When the owner's call has returned, not one read more succeeds."""
    here, peer = rig.here, rig.peer
    for n in range(20):
        token = peer.grant(f"g{n}", "of", FEW, readers=None)
        here.read(f"t{n}", token, "to", FEW)
        here.result(f"t{n}")
        if by == "revoke":
            peer.revoke(f"g{n}")
        else:
            peer.reuse("of", [1])
        here.read(f"late{n}", token, "to", FEW)
        assert isinstance(here.error(f"late{n}"), StaleGrant)


FORM = {"num_kv_heads": 4, "tokens_per_block": 4}


def test_what_fits_one_pool_need_not_fit_another(rig):
    """That two pools agree is found out once: for these two, and for blocks of the same number."""
    here, peer, blocks = rig.here, rig.peer, Blocks(len(IDS), 4 * 4 * 96)
    peer.pool("formed", blocks, form=FORM | {"order": "HND"})
    for pool, order in (("alike", "HND"), ("other", "NHD")):
        here.pool(pool, blocks, form=FORM | {"order": order})
    token = peer.grant("g", "formed", IDS, readers=None)

    def at_once() -> bool:
        here.read("alike", token, "alike", FEW, subset=FEW)
        before = here.done("alike")
        here.result("alike")
        return before

    until(at_once)
    here.read("other", token, "other", FEW, subset=FEW)
    assert isinstance(here.error("other"), LayoutMismatch)
    here.holds("other", blocks.memory())
    here.read("fewer", token, "alike", FEW)  # than were granted
    assert isinstance(here.error("fewer"), LayoutMismatch)
    until(at_once)


def test_what_was_granted_before_the_session_is_shown_when_it_comes():
    """The first read of it asks nobody."""
    config = kvt.Config(backends=("shm", "tcp"))
    with kvt.Endpoint(config) as owner, kvt.Endpoint(config) as reader:
        of, to = (
            end.register(np.frombuffer(end.allocate(nbytes=CHUNK), np.uint8)[None]) for end in (owner, reader)
        )
        grants = [of.grant([0], to=reader.incarnation) for _ in range(50)]
        back = reader.connect(owner.listen("127.0.0.1:0"), timeout=LIMIT_S)
        there = owner.accept(timeout=LIMIT_S)
        until(lambda: {back.backend, there.backend} == {"shm"})
        reads = []
        for grant in grants:
            read = back.read_blocks(grant.token, to, [0])
            reads.append(read.done())
            read.result(LIMIT_S)
        assert sum(reads) > len(reads) // 2
