"""F14: a grant expires, or is ended by its owner, before and during a read that the link holds up in mid-chunk."""

import pytest

from kvtransport.errors import PermissionDenied, StaleGrant
from tests.faults.peers import (
    CHUNK,
    FRAME,
    HEADER,
    IDS,
    OF,
    SLOW_S,
    TO,
    check_landed,
    check_untouched,
    rewrite,
    states,
    within,
)
from tests.faults.proxy import Fault
from tests.waiting import until

LANDED = (0, 1, 2)
MID_CHUNK = len(LANDED) * FRAME + HEADER + 1000
HOW = pytest.mark.parametrize("how", ["expire", "revoke", "reuse"])
TTL_S = 1.0


def end(owner, how: str) -> None:
    """Let it come to its end, and rewrite the blocks at once."""
    if how == "revoke":
        owner.revoke("g")
    elif how == "reuse":
        owner.reuse("of", [IDS[-1]])
    until(lambda: owner.state("g") == ("expired" if how == "expire" else "revoked"))
    owner.fill("of", OF, 0xCD)


@HOW
def test_f14_during_the_read(tcp, how):
    """What had verified stays sealed and is of before the end; the held rest lands nowhere."""
    held = Fault("lane", "down", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        owner, reader = rig.peer, rig.here
        owner.pool("of", OF)
        reader.pool("to", TO)
        token = owner.grant("g", "of", IDS, ttl_s=TTL_S if how == "expire" else 30)
        reader.read("t", token, "to", IDS)
        assert held.reached.wait(20)
        until(lambda: reader.progress("t")[0] == len(LANDED) * CHUNK)
        end(owner, how)
        with within(SLOW_S):
            error = reader.error("t")
        assert type(error) is StaleGrant
        assert states(error) == {b: "sealed" if b in LANDED else "poisoned" for b in IDS}
        assert (error.key, error.quiesced, error.retryable) == (token, True, False)
        check_landed(reader, LANDED)
        rewrite(reader)
        held.go.set()
        reader.read("again", token, "to", IDS)
        assert type(reader.error("again")) is StaleGrant
        check_untouched(reader)
        owner.call("close_pool", name="of")  # nobody uses it any more


@HOW
def test_f14_before_the_read(tcp, how):
    """While its request still queued: no data, and the owner's answer says nothing."""
    with tcp.linked() as rig:
        owner, reader = rig.peer, rig.here
        owner.pool("of", OF)
        reader.pool("to", TO)
        token = owner.grant("g", "of", IDS, ttl_s=0.05 if how == "expire" else 30)
        end(owner, how)
        reader.read("t", token, "to", IDS)
        error = reader.error("t")
        assert type(error) is PermissionDenied
        assert states(error) == dict.fromkeys(IDS, "poisoned")
        reader.holds("to", TO.memory())


@HOW
def test_f14_between_the_lease_and_the_read(tcp, how):
    """To who has held it, it is stale; a lease that outlives a ttl has kept it."""
    with tcp.linked() as rig:
        owner, reader = rig.peer, rig.here
        owner.pool("of", OF)
        reader.pool("to", TO)
        token = owner.grant("g", "of", IDS, ttl_s=0.3, readers=2)
        reader.hold("l", token)
        reader.held("l")
        if how == "expire":
            reader.release("l")
        end(owner, how)
        assert how == "expire" or type(reader.error("l")) is StaleGrant
        reader.read("t", token, "to", IDS)
        assert type(reader.error("t")) is StaleGrant
        reader.holds("to", TO.memory())


@pytest.mark.parametrize("how", ["revoke", "reuse", "expire"])
def test_f14_during_a_write(tcp, how):
    """The owner is the destination: when its call returns, what the link still holds lands nowhere."""
    held = Fault("lane", "up", MID_CHUNK, "hold")
    with tcp.linked(held) as rig:
        writer, owner = rig.here, rig.peer
        writer.pool("of", OF)
        owner.pool("to", TO)
        token = owner.grant("g", "to", IDS, mode="write", ttl_s=TTL_S if how == "expire" else 30)
        writer.write("t", token, "of", IDS)
        assert held.reached.wait(20)
        if how == "revoke":
            owner.revoke("g")
        elif how == "reuse":
            owner.reuse("to", [0])
        owner.error("g")
        owner.fill("to", TO, 0xCD)
        error = writer.error("t")
        assert type(error) is StaleGrant
        assert (error.delivered, error.blocks) == (False, {})
        held.go.set()
        writer.message("m", b"fence")
        owner.messages(1)
        expected = TO.memory()
        for view in TO.views(expected):
            view[:] = 0xCD
        owner.holds("to", expected)
