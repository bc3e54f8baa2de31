"""Peers: two connected ends for a test of faults, the far one a process, with or without a proxy between them.

Here: how they come about, the memory that they move, what they must say when it fails. Not here: the faults.

Lanes are one and a chunk is a block, unless a test says otherwise: so a byte of the link names a block.
"""

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvtransport.testing.blocks import Blocks
from kvtransport.testing.harness import Harness, Rig
from kvtransport.testing.side import LocalSide, Side
from tests.faults.keeper import Keeper
from tests.faults.proxy import Fault, Proxy
from tests.waiting import until

CHUNK = 65536
HEADER, TRAILER = 64, 16
FRAME = HEADER + CHUNK + TRAILER
COUNT = 12
OF = Blocks(COUNT, CHUNK)
TO = Blocks(COUNT, CHUNK, gap=64, seed=2)
IDS = tuple(range(COUNT))
SLOW_S = 0.5
"""For what takes 50 or 100 ms, the one time that a busy machine makes it slow; `check_median` has the bound itself."""
ROUNDS = 5


@dataclass
class Through(Harness):
    """TCP with a process, or memory shared beside it; `faults`, if any, happen in a proxy that this side dials."""

    faults: tuple[Fault, ...] = ()
    proxy: Proxy | None = None

    @contextlib.contextmanager
    def linked(self, *faults: Fault, **config: object) -> Iterator[Rig]:
        """Connect two endpoints."""
        self.faults = faults
        try:
            with self.rig(**{"lanes": 1, "chunk_nbytes": CHUNK, **config}) as rig:
                if "shm" in self.config.get("backends", ()):
                    until(lambda: rig.here.actor.connection.shared()[0] == "up")
                yield rig
        finally:
            if self.proxy is not None:
                self.proxy.close()
            self.proxy = None

    def _peer(self) -> Side:
        kept, self._spare = self._spare, None
        return kept or Keeper("peer")

    def _listen(self, peer: Side) -> str:
        address = super()._listen(peer)
        if self.faults:
            self.proxy = Proxy(address, self.faults)
            address = self.proxy.address
        return address


def post(source: Side, destination: Side, key: str = "t", **options: object) -> None:
    """Post the receive and the send of all blocks, each to its own number."""
    source.pool("of", OF)
    destination.pool("to", TO)
    destination.recv(key, "to", IDS, **options)
    source.send(key, "of", IDS, **options)


@contextlib.contextmanager
def linked_to(peer: Side, **config: object) -> Iterator[LocalSide]:
    """An endpoint of this process, connected to a process that has one; many may be, each with its own connection."""
    here = LocalSide("here")
    try:
        here.call("start", config={"backends": ["tcp"], **config})
        here.call("connect", address=peer.call("listen", address="127.0.0.1:0"))
        peer.call("accept")
        yield here
    finally:
        here.call("close")


def states(error) -> dict[int, str]:
    """Return the states of the blocks of a pool of one group."""
    return {block: state for group in error.blocks.values() for block, state in group.items()}


def check_states(error, sealed, poisoned=None) -> None:
    """Assert that just these blocks are sealed, and that the error says the rest of it too."""
    rest = [block for block in IDS if block not in sealed] if poisoned is None else poisoned
    assert states(error) == {b: "sealed" if b in sealed else "poisoned" for b in (*sealed, *rest)}
    assert error.failed_block_ids == sorted(rest)
    assert error.quiesced is True
    assert error.key == "t"


def check_landed(side, sealed) -> None:
    """Assert that this process's destination holds what was sent, in these blocks."""
    here, sent = TO.views(side.actor.memory["to"])[0], OF.views(OF.memory())[0]
    for block in sealed:
        assert (here[block] == sent[block]).all(), f"block {block} is sealed and holds other bytes"


def rewrite(side, value: int = 0xAB) -> None:
    """Reuse all blocks at once: fill them, as their owner may."""
    for view in TO.views(side.actor.memory["to"]):
        view[:] = value


def check_untouched(side, value: int = 0xAB) -> None:
    """Assert that no foreign byte has come since `rewrite`."""
    for view in TO.views(side.actor.memory["to"]):
        assert (view == value).all()


def check_delivered(error) -> None:
    """Assert what a source's error says."""
    assert error.delivered in (None, False)
    assert error.quiesced is True
    assert error.blocks == {}


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP to a child of ours, seen to have happened; SIGCONT at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        assert os.waitid(os.P_PID, pid, os.WSTOPPED) is not None
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def within(seconds: float, times: list[float] | None = None) -> Iterator[None]:
    """Assert that the block takes no longer; add what it took to `times`."""
    start = time.monotonic()
    yield
    took = time.monotonic() - start
    assert took < seconds, f"it took {took:.3f} s"
    if times is not None:
        times.append(took)


def check_median(took: Iterable[float], least: float, most: float) -> None:
    """Assert that the median of several times lies within bounds: one that a busy machine made long is no proof."""
    times = sorted(took)
    assert len(times) >= ROUNDS
    median = statistics.median(times)
    assert least <= median < most, f"median {median:.4f} s of {[round(one, 4) for one in times]}"
