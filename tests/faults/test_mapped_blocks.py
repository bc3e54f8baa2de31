"""Blocks that are read where they lie: what is there, until when, and what leaving the `with` says."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from kvtransport.errors import BackendUnavailable, GrantError, PeerLost, PermissionDenied, StaleGrant
from kvtransport.testing.blocks import Blocks
from tests.faults.peers import CHUNK, IDS, OF, TO, Through, stopped
from tests.waiting import until

SOME = [7, 2, 5]
SHARED = {"backends": ["shm", "tcp"]}


@pytest.fixture(scope="module")
def harness():
    made = Through("shm", "127.0.0.1:0", config=SHARED, allocates=True)
    yield made
    made.close()


@pytest.fixture
def rig(harness):
    """The far side owns, and its memory can be mapped."""
    with harness.linked() as linked:
        linked.peer.pool("of", OF)
        yield linked


def mapped(rig, token: str, **options):
    return rig.here.actor.connection.map_blocks(token, **options)


def sent() -> np.ndarray:
    return OF.views(OF.memory())[0]


def revoked(rig) -> bool:
    """False: the word that the blocks were left is on its way."""
    try:
        rig.peer.revoke("g")
    except GrantError:
        return False
    return True


def memfds() -> int:
    """Mappings of memory that a peer allocated; ours are none here."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:kvtransport ")


@pytest.mark.parametrize("ids", [SOME, None], ids=["some", "all"])
def test_what_is_there(rig, ids):
    """The granted blocks in their order, not copied, and nobody can write to them."""
    token = rig.peer.grant("g", "of", ids)
    with mapped(rig, token) as m:
        there = list(IDS if ids is None else ids)
        assert m.layer_names == ("layer0",)
        assert list(m.block_ids) == there
        assert [bytes(block) for block in m.blocks("layer0")] == [bytes(sent()[i]) for i in there]
        assert np.shares_memory(m.block(0, 1), m.array(0)[there[1]])
        rig.peer.fill("of", OF, 0x5A)  # it is the owner's memory, as it is now
        assert (m.block(0, 0) == 0x5A).all()
        for array in (m.block(0, 0), m.array(0)):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
        with pytest.raises(IndexError):
            m.block(0, len(there))
        with pytest.raises(ValueError, match="layer9"):
            m.array("layer9")
    assert rig.peer.result("g") == {}  # its only reader has finished
    assert rig.peer.state("g") == "read"


def test_it_is_kept_while_it_is_mapped(rig):
    """Longer than it would have lasted; its owner isn't let to revoke it, and reads go by it."""
    rig.here.pool("to", TO)
    token = rig.peer.grant("g", "of", SOME, ttl_s=0.2)
    short = rig.peer.grant("short", "of", [0], ttl_s=0.4)
    with mapped(rig, token) as m, mapped(rig, token):
        with pytest.raises(GrantError, match="2 times") as refused:
            rig.peer.revoke("g")
        assert type(refused.value) is GrantError
        assert isinstance(rig.peer.error("short"), StaleGrant), short
        rig.here.read("t", token, "to", SOME)
        rig.here.result("t")
        assert (m.block(0, 0) == sent()[SOME[0]]).all()
        assert rig.peer.state("g") == "open"
    assert rig.peer.result("g") == {}
    rig.here.holds("to", TO.after(OF, SOME, SOME))


def test_revoke_is_free_again_afterwards(rig):
    """A standing grant goes on after its reader has left it, also by an error, and is then revoked as any."""
    token = rig.peer.grant("g", "of", SOME, readers=None)
    with pytest.raises(KeyError), mapped(rig, token) as m:
        raise KeyError("of the user's")
    with pytest.raises(StaleGrant):
        m.close()  # nothing was checked
    m = mapped(rig, token)
    m.close()
    m.close()
    until(lambda: revoked(rig))
    assert rig.peer.state("g") == "revoked"
    with pytest.raises(StaleGrant):
        mapped(rig, token)


@pytest.mark.parametrize("by", ["revoke", "reuse", "close_pool"])
@pytest.mark.parametrize("readers", [1, None], ids=["counted", "standing"])
def test_the_end_is_known_at_the_exit(rig, by, readers):
    """From the moment that the owner's call has returned; the arrays are memory for as long as they are kept."""
    token = rig.peer.grant("g", "of", SOME, readers=readers)
    with pytest.raises(StaleGrant) as raised, mapped(rig, token) as m:
        kept = m.block(0, 0)
        if by == "revoke":
            rig.peer.revoke("g", force=True)
        elif by == "reuse":
            rig.peer.reuse("of", SOME[:1])
        else:
            rig.peer.call("close_pool", name="of")
    assert raised.value.key == token
    assert int(kept.sum()) == int(sent()[SOME[0]].sum())
    with pytest.raises(StaleGrant):
        m.close()


def test_other_blocks_may_be_reused(rig):
    """What isn't granted is no matter of the reader's."""
    token = rig.peer.grant("g", "of", SOME)
    with mapped(rig, token):
        rig.peer.reuse("of", [i for i in IDS if i not in SOME])


def test_the_owner_dies(rig):
    """Killed inside: its blocks stay as they were, and yet nothing that was computed of them is called good."""
    token = rig.peer.grant("g", "of", SOME)
    m = mapped(rig, token)
    kept = m.block(0, 0)
    rig.process().kill()
    os.waitid(os.P_PID, rig.process().pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(PeerLost) as raised:
        m.close()
    assert raised.value.cause == "reset"
    assert (kept == sent()[SOME[0]]).all()
    with pytest.raises(PeerLost):
        mapped(rig, token)


def test_the_owner_goes(rig):
    """It closes its connection: whoever is first to know of it says so."""
    token = rig.peer.grant("g", "of", SOME, readers=None)
    with pytest.raises((StaleGrant, PeerLost)), mapped(rig, token):
        rig.peer.call("close_connection")


def test_the_owner_stands_still(rig):
    """It is stopped inside, and the blocks are read and found good nonetheless."""
    token = rig.peer.grant("g", "of", SOME)
    with mapped(rig, token) as m, stopped(rig.process().pid):
        assert (m.block(0, 2) == sent()[SOME[2]]).all()
        m.close()


def test_no_such_grant(rig):
    """The owner's answer is that to any token; a grant to write isn't one to read."""
    write = rig.peer.grant("w", "of", SOME, mode="write")
    for token in (write, "AAAAAAAAAAAAAAAAAAAAAA"):
        with pytest.raises(PermissionDenied):
            mapped(rig, token)
    with pytest.raises(ValueError, match="token"):
        mapped(rig, "no token")


def test_it_waits_for_the_grant(rig):
    """The reader is first."""
    rig.peer.call("pool", name="small", blocks=Blocks(1, 64).to_json(), allocated=True)
    with pytest.raises(PermissionDenied):
        mapped(rig, "AAAAAAAAAAAAAAAAAAAAAA", wait_grant_s=0.05)
    token = rig.peer.grant("g", "small", [0], token="AAAAAAAAAAAAAAAAAAAAAA")
    with mapped(rig, token, wait_grant_s=5) as m:
        assert m.block(0, 0).shape == (64,)


def test_nothing_is_left(rig):
    """No descriptor, no mapping once the arrays are gone and the pool is closed."""
    warm = mapped(rig, rig.peer.grant("warm", "of", SOME))
    warm.close()
    before, maps = rig.here.call("counts"), memfds()
    assert maps > 0
    for n in range(20):
        with mapped(rig, rig.peer.grant(f"g{n}", "of", SOME)) as m:
            m.blocks(0)
        rig.peer.result(f"g{n}")
    assert (rig.here.call("counts"), memfds()) == (before, maps)
    kept = m.block(0, 0)
    del m, warm
    rig.peer.call("close_pool", name="of")
    assert (kept == sent()[SOME[0]]).all()
    assert memfds() > 0
    del kept
    until(lambda: memfds() == 0)


def test_plain_memory_cannot_be_mapped():
    """It says what would help, holds nothing, and the grant can be read nonetheless."""
    harness = Through("shm", "127.0.0.1:0", config=SHARED)
    with harness.linked() as rig:
        rig.peer.pool("of", OF)
        rig.here.pool("to", TO)
        token = rig.peer.grant("g", "of", SOME, readers=None)
        with pytest.raises(BackendUnavailable) as raised:
            mapped(rig, token)
        assert "Endpoint.allocate" in raised.value.remedy
        rig.here.read("t", token, "to", SOME)
        rig.here.result("t")
        until(lambda: revoked(rig))
    harness.close()


def test_without_shared_memory_there_is_none(tcp):
    """Over TCP alone."""
    with tcp.linked() as rig:
        rig.peer.pool("of", Blocks(2, CHUNK))
        token = rig.peer.grant("g", "of", [0], readers=None)
        with pytest.raises(BackendUnavailable) as raised:
            mapped(rig, token)
        assert "on this host" in raised.value.remedy
        until(lambda: revoked(rig))
