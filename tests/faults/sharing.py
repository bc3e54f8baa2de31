"""Sharing: ends that share memory with a peer of this host, and what of it a process holds.

Here: pools that a peer maps, large transfers to be interrupted, the channel as a fault takes it away, mappings. Not
here: the faults.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvtransport.testing.blocks import Blocks
from kvtransport.testing.side import LocalSide
from kvtransport.testing.worker import main
from tests.faults.keeper import Keeper, KeepingActor
from tests.waiting import until

BOTH = {"backends": ["shm", "tcp"]}
SMALL = Blocks(16, 1 << 18)
"""The source of a large stream: its blocks are named again and again."""
COUNT = 2048
LARGE = Blocks(COUNT, SMALL.nbytes)
REPEATED = [n % SMALL.count for n in range(COUNT)]


class SharingActor(KeepingActor):
    """An Actor whose pools may be of memory that peers map."""

    def do_pool_of(self, kind: str, name: str, blocks: dict[str, int]) -> None:
        """Make a pool. kind: "allocate": peers map it; "register": they read it by process_vm_readv."""
        if kind == "register":
            self.do_pool(name, blocks)
            return
        spec = Blocks(**blocks)
        kept = self.memory[name] = []
        for layer in spec.memory():
            kept.append(np.frombuffer(self.endpoint.allocate(nbytes=layer.nbytes), np.uint8))
            kept[-1][:] = layer
        self.pools[name] = self.endpoint.register(spec.views(kept))

    def do_room(self, name: str) -> None:
        """Make a pool that a large stream fits into; its pages come as it is written."""
        self.memory[name] = [np.zeros(LARGE.count * LARGE.nbytes, np.uint8)]
        self.pools[name] = self.endpoint.register(self.memory[name][0].reshape(LARGE.count, LARGE.nbytes))

    def do_check_room(self, name: str, blocks: list[int]) -> None:
        check_blocks(self.memory[name][0], blocks)

    def do_shared(self) -> bool:
        return self.connection.shared()[0] == "up"

    def do_operations(self) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
        return self.endpoint.stats()["operations"]

    def do_explain(self) -> str:
        return self.connection.explain()

    def do_cut_channel(self) -> int:
        return cut_channels()


class Sharer(Keeper):
    """A process with such an Actor."""

    program = (str(Path(__file__)),)


def local() -> LocalSide:
    """Return a side of this process with such an Actor."""
    here = LocalSide("here")
    here.actor = SharingActor()
    return here


@contextlib.contextmanager
def sharing_with(peer: Sharer, **config: object) -> Iterator[LocalSide]:
    """Yield an endpoint of this process that shares memory with a peer whose endpoint has been started."""
    here = local()
    try:
        here.call("start", config={**BOTH, **config})
        here.call("connect", address=peer.call("listen", address="127.0.0.1:0"))
        peer.call("accept")
        until(lambda: here.call("shared") and peer.call("shared"))
        yield here
    finally:
        here.call("close")


def in_mid_copy(source, destination, kind: str) -> None:
    """Begin a large transfer; return while it is being copied."""
    source.call("pool_of", kind=kind, name="of", blocks=SMALL.to_json())
    destination.call("room", name="to")
    destination.recv("t", "to", range(COUNT))
    source.send("t", "of", REPEATED)
    until(lambda: destination.progress("t")[0] > 0)
    assert not destination.done("t"), "it is over already: a larger one would do"


def check_copied(here: LocalSide, blocks) -> None:
    """Assert that these blocks of the room hold what the source has."""
    check_blocks(here.actor.memory["to"][0], blocks)


def check_blocks(memory, blocks) -> None:
    """See `check_copied`."""
    found = memory.reshape(LARGE.count, LARGE.nbytes)
    sent = SMALL.views(SMALL.memory())[0]
    for block in blocks:
        assert (found[block] == sent[REPEATED[block]]).all(), f"block {block} is sealed and holds other bytes"


@dataclass(frozen=True)
class Held:
    """What a process holds: descriptors, and mappings of memory that only others may write."""

    descriptors: int
    mappings: int

    @classmethod
    def now(cls) -> "Held":
        """Look at this process."""
        with open("/proc/self/maps") as lines:
            mappings = sum(" r--s " in line and "memfd:" in line for line in lines)
        return cls(len(os.listdir("/proc/self/fd")), mappings)


def cut_channels() -> int:
    """Shut down every channel of this process, found by its name; return how many there were."""
    cut = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with copy:
            if copy.family != socket.AF_UNIX or copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            with contextlib.suppress(OSError):
                names = (copy.getsockname(), copy.getpeername())
                if any(name.startswith(b"\0kvtransport-") for name in names if isinstance(name, bytes)):
                    copy.shutdown(socket.SHUT_RDWR)
                    cut += 1
    return cut


@contextlib.contextmanager
def started(make=Sharer, **config: object) -> Iterator[Sharer]:
    """Yield a process whose endpoint is there."""
    peer = make("peer")
    try:
        peer.call("start", config={**BOTH, **config})
        yield peer
    finally:
        peer.end()


if __name__ == "__main__":
    main(SharingActor())
