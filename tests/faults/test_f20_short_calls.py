"""F20: socket calls that move less than was asked, are interrupted or would block, in both processes, at random.

Signals reach none of the engine's threads, which block them, and loopback seldom moves less than was asked; so a shim
does both (`shims/sockets.c`, which says what it does and why nothing of it is more than a kernel may do).
"""

import numpy as np
import pytest

from kvtransport.testing.blocks import Blocks
from tests.faults.preload import built, preloaded

CALLS, DEEDS = ("recv", "recvmsg", "send", "sendmsg"), ("whole", "short", "interrupted", "again")
SIZES = (
    Blocks(1, 1),
    Blocks(3, 100, layers=2, gap=7),
    Blocks(200, 1000, gap=24),
    Blocks(40, 65536, layers=2),
    Blocks(3, (1 << 20) + 13, gap=51),
)
MESSAGES = (b"", b"a", bytes(range(256)) * 300)
ENOUGH, MOST_ROUNDS = 5, 20


@pytest.fixture
def counts(tmp_path):
    """The shim's numbers, as they are: its processes have the file mapped."""
    path = tmp_path / "counts"
    made = np.memmap(path, dtype=np.uint64, mode="w+", shape=len(CALLS) * len(DEEDS) + 2)
    made.flush()
    return made


def connected(far, counts, seed, **config):
    with preloaded(built("sockets"), KVT_SHIM_SEED=seed, KVT_SHIM_COUNTS=counts.filename):
        ours, theirs = far("ours", lanes=2, **config), far("theirs", lanes=2, **config)
    ours.call("connect", address=theirs.call("listen", address="127.0.0.1:0"))
    theirs.call("accept")
    return ours, theirs


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("protection", ["plain", "digest"])
def test_f20_no_byte_is_lost(far, counts, protection, seed):
    """Transfers both ways until every call has met with everything some times."""
    ours, theirs = connected(far, counts, seed, protection=protection, chunk_nbytes=65536)
    table = counts[:-2].reshape(len(CALLS), len(DEEDS))
    for n in range(MOST_ROUNDS):
        for source, destination in ((ours, theirs), (theirs, ours)):
            for size, of in enumerate(SIZES):
                moves(source, destination, f"{source.name} {n} {size}", of)
            for at, data in enumerate(MESSAGES):
                source.message(f"message {n} {at}", data)
            assert destination.messages(len(MESSAGES)) == list(MESSAGES)
        if (table >= ENOUGH).all():
            break
    assert {side.call("connection_state") for side in (ours, theirs)} == {"open"}
    seen = dict(zip(CALLS, [dict(zip(DEEDS, row, strict=True)) for row in table.tolist()], strict=True))
    assert (table >= ENOUGH).all(), f"the shim stood beside the calls that are used: {seen}"
    assert counts[-1] > 0, "no edge had to be made: the lanes aren't edge-triggered any more"


def moves(source, destination, key, of):
    to = Blocks(of.count, of.nbytes, layers=of.layers, gap=of.gap, seed=2)
    source.pool(key, of)
    destination.pool(key, to)
    ids = range(of.count)
    destination.recv(key, key, ids)
    source.send(key, key, ids[::-1])
    assert (
        source.result(key)["nbytes"] == destination.result(key)["nbytes"] == of.layers * of.count * of.nbytes
    )
    destination.holds(key, to.after(of, ids, ids[::-1]))
    for side in (source, destination):
        side.call("close_pool", name=key)
