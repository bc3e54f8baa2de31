"""An owner that rewrites its blocks as fast as it can, and the side that has such a process.

Every word of a block is (block, generation). A generation is granted whole, under one token, for a moment; then its
blocks are reused and rewritten at once. So whoever reads two generations by one read has read what was not granted.
"""

import random
import threading
from pathlib import Path

import numpy as np

from kvtransport.testing.actor import Actor
from kvtransport.testing.side import ProcessSide
from kvtransport.testing.worker import main

LONGEST_S = 0.0005  # that a generation stays, if it stays at all


def words(count: int, nbytes: int) -> np.ndarray:
    """Return memory for blocks of words, zeroed: the first block is block 1."""
    return np.zeros((count, nbytes // 8), np.uint64)


def check(blocks: np.ndarray, of: list[int]) -> set[int]:
    """Assert that rows hold whole blocks of these numbers; return their generations."""
    held = blocks >> np.uint64(32)
    assert (held == np.array(of, np.uint64)[:, None] + np.uint64(1)).all(), "bytes of another block"
    generations = blocks & np.uint64(0xFFFFFFFF)
    assert (generations == generations[:, :1]).all(), "a torn block"
    return set(generations[:, 0].tolist())


class ChurningActor(Actor):
    """An Actor with an owner that never rests."""

    def do_churn(self, token: str, count: int, nbytes: int, own: bool, named: bool) -> None:
        """Begin. own: memory that a peer on this host can map. named: the grants are for the peer alone."""
        self.grant_to = self.connection.peer if named else None
        self.blocks = words(count, nbytes)
        if own:
            self.own = self.endpoint.allocate(nbytes=count * nbytes)
            self.blocks = np.frombuffer(self.own, np.uint64).reshape(count, -1)
        self.names = np.arange(1, count + 1, dtype=np.uint64)[:, None] << np.uint64(32)
        self.pools["churn"] = self.endpoint.register(self.blocks)
        self.going, self.generation = True, 0
        self.thread = threading.Thread(target=self._run, args=(token, random.Random(1)))
        self.thread.start()

    def _run(self, token: str, order: random.Random) -> None:
        pool, pause = self.pools["churn"], threading.Event()
        while self.going:
            pool.reuse(range(len(self.blocks)))
            self.generation += 1
            self.blocks[:] = self.names | np.uint64(self.generation)
            pool.grant(None, token=token, readers=None, to=self.grant_to)
            if order.random() < 0.5:
                pause.wait(order.random() * LONGEST_S)

    def do_rest(self) -> int:
        """End; return how many generations there were."""
        self.going = False
        self.thread.join()
        self.pools.pop("churn").close()
        return self.generation


class Churner(ProcessSide):
    """A process that runs this module."""

    program = (str(Path(__file__)),)


if __name__ == "__main__":
    main(ChurningActor())
