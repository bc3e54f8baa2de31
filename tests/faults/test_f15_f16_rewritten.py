"""F15, F16: an owner that reuses and rewrites while it is read; a reader that dies with a lease in its hand."""

import time
from collections import Counter

import pytest

from kvtransport import new_token
from kvtransport.errors import GrantError, PeerLost, StaleGrant
from tests.faults.churn import Churner, check, words
from tests.faults.peers import CHUNK, IDS, OF, SLOW_S, TO, linked_to, states
from tests.waiting import until

COUNT = 8
READS = 3000
TTL_S = 0.5


def read_while_rewritten(here, token: str, nbytes: int, reads: int) -> Counter:
    """Read so often; assert that nothing that is sealed is stale or torn. Return how often what came of it.

    For 1,000,000 reads: call it with that number, from a script.
    """
    target = words(COUNT, nbytes)
    pool = here.actor.endpoint.register(target)
    ids, seen, newest = list(range(COUNT)), Counter(), 0
    for n in range(reads):
        target[:] = 0
        handle = here.actor.connection.read_blocks(token, pool, ids, wait_grant_s=20 * (n % 2))
        try:
            handle.result(20)
        except GrantError as error:
            seen[type(error).__name__] += 1
            sealed = [block for block, state in states(error).items() if state == "sealed"]
            seen["sealed before the end"] += bool(sealed)
        else:
            seen["read"] += 1
            sealed = ids
        generations = check(target[sealed], sealed)
        assert len(generations) <= 1, f"blocks of generations {generations} by one read"
        # The owner has rewritten a generation once and for all: what is older than the newest seen is stale.
        for generation in generations:
            assert generation >= newest
            newest = generation
    pool.close()
    return seen


@pytest.mark.parametrize("nbytes", [256, 16384, 65536])
@pytest.mark.parametrize(
    ("backend", "protection", "own", "named"),
    [
        ("tcp", "plain", False, False),
        ("tcp", "digest", False, False),
        ("shm", "plain", True, False),
        ("shm", "plain", True, True),
        ("shm", "plain", False, True),
    ],
    ids=["tcp plain", "tcp digest", "shm", "shm, unasked", "shm, memory of the user's, unasked"],
)
def test_f15_rewritten_at_full_speed(nbytes, backend, protection, own, named):
    """By reuse: no stale and no torn block is sealed; and both ends of the race were seen.

    named: the reader finds the grants by itself, where the reads are small.
    """
    peer, token = Churner("owner"), new_token()
    config = {"backends": ["tcp"] if backend == "tcp" else ["shm", "tcp"], "protection": protection}
    try:
        peer.call("start", config=config)
        with linked_to(peer, **config) as here:
            peer.call("churn", token=token, count=COUNT, nbytes=nbytes, own=own, named=named)
            seen: Counter = Counter()
            while not (
                seen["read"] and seen["StaleGrant"] + seen["PermissionDenied"]
            ):  # the suite has a limit
                seen += read_while_rewritten(here, token, nbytes, READS // 12)
            assert peer.call("rest") > 10
    finally:
        peer.end()


def holding(owner, reader, **options):
    """Let a reader hold a grant of the owner's."""
    owner.pool("of", OF)
    token = owner.grant("g", "of", IDS, **options)
    reader.hold("l", token)
    reader.held("l")
    return token


def test_f16_the_reader_dies_with_a_lease(tcp):
    """Its lease is gone with it, and the grant, that others may read, has its whole ttl again and no more."""
    with tcp.linked() as rig:
        holding(rig.here, rig.process(), ttl_s=TTL_S)
        time.sleep(TTL_S)  # the lease outlives it
        assert rig.here.state("g") == "open"
        rig.process().kill()
        start = time.monotonic()
        error = rig.here.error("g")
        assert TTL_S - 0.05 < time.monotonic() - start < TTL_S + 1
        assert type(error) is StaleGrant
        assert rig.here.state("g") == "expired"
        rig.here.call("close_pool", name="of")


def test_f16_the_named_reader_dies(tcp):
    """Whom alone it was for: it has ended at once, and says so."""
    with tcp.linked() as rig:
        holding(rig.here, rig.process(), ttl_s=None, to="peer")
        start = time.monotonic()
        rig.process().kill()
        error = rig.here.error("g")
        assert time.monotonic() - start < SLOW_S
        assert type(error) is PeerLost
        assert error.quiesced is True
        assert rig.here.state("g") == "revoked"
        rig.here.call("close_pool", name="of")


def test_f16_the_owner_dies(tcp):
    """The lease and the read that waits end with PeerLost; nothing lands."""
    with tcp.linked() as rig:
        peer, here = rig.process(), rig.here
        holding(peer, here)
        here.pool("to", TO)
        here.read("t", new_token(), "to", IDS, wait_grant_s=20)
        peer.kill()
        for handle in ("l", "t"):
            assert type(here.error(handle)) is PeerLost
        here.holds("to", TO.memory())
        here.call("close_pool", name="to")


def test_f16_a_lease_lost_with_its_connection(far):
    """The grant outlives the connection; who connects again reads by it."""
    peer = far("owner")
    with linked_to(peer) as here:
        token = holding(peer, here, ttl_s=30)
        here.call("close_connection")
        until(lambda: peer.call("connection_state") == "lost")
        assert type(here.error("l")).__name__ == "ConnectionClosed"
    with linked_to(peer) as other:
        other.pool("to", TO)
        other.read("t", token, "to", IDS)
        # One reader was let in, and it wasn't this one: the grant is for the first to show the token.
        assert isinstance(other.error("t"), GrantError)
        peer.revoke("g")
        token = peer.grant("again", "of", IDS, to=other.actor.endpoint.incarnation.hex())
        other.read("t", token, "to", IDS)
        assert other.result("t")["nbytes"] == len(IDS) * CHUNK
        other.holds("to", TO.after(OF, IDS, IDS))
