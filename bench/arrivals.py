"""The requests of case h: who sends how many blocks to whom, and when. Every process computes the same from
(seed, rate).

Here: arithmetic only. Open loop: a request comes when it is planned, whatever became of those before it, and its
latency counts from then. Whoever posts late, or has to wait for room, makes it longer.

Invariant: a plan has its requests in the order of their times, as many of each class. The classes come in random
order and the gaps are exponential, so the bytes offered in a round are always the same, when they come is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.cases import Ids, case_of

CLASSES = (1, 4, 16, 64, 256)
"""Blocks of a request."""
ENDS = 4
"""Endpoints of each side, each connected with each of the other side's."""
CASE = case_of("h")
BLOCK_NBYTES = CASE.tensors * CASE.block_nbytes
LARGE, RESERVE = 64, 256
"""Blocks of a request that counts as large, and what these leave to others."""
APART = 4.0
"""A request that is alone has so many times as long as its bytes take at the limit's rate, and APART_S more."""
APART_S = 0.004


@dataclass(frozen=True)
class Request:
    """One transfer. `at_s`: from the begin of the round."""

    index: int
    at_s: float
    blocks: int
    sender: int
    receiver: int

    @property
    def nbytes(self) -> int:
        return self.blocks * BLOCK_NBYTES


def crowd(seed: int, each: int, nbytes_per_s: float) -> list[Request]:
    """Return a round's plan: Poisson arrivals, `each` requests of each class, `nbytes_per_s` offered on average."""
    rng = np.random.default_rng([seed, 10])
    blocks = rng.permutation(np.repeat(CLASSES, each))
    gap_s = float(blocks.mean()) * BLOCK_NBYTES / nbytes_per_s
    at = np.cumsum(rng.exponential(gap_s, len(blocks)))
    ends = rng.integers(0, ENDS, (len(blocks), 2))
    rows = zip(at, blocks, ends, strict=True)
    return [Request(i, float(t), int(n), int(s), int(r)) for i, (t, n, (s, r)) in enumerate(rows)]


def alone(blocks: int, count: int, nbytes_per_s: float) -> list[Request]:
    """Return a plan of one class, one request after the other on an idle link."""
    gap_s = blocks * BLOCK_NBYTES / nbytes_per_s * APART + APART_S
    return [Request(i, i * gap_s, blocks, 0, 0) for i in range(count)]


def source_ids(seed: int, request: Request) -> Ids:
    """Return the blocks that a request sends."""
    rng = np.random.default_rng([seed, 11, request.index])
    return rng.permutation(CASE.blocks)[: request.blocks].astype(np.int64)


class Room:
    """The receivers' blocks: which are free, what lies in each. One room for all, as their pools share memory.

    A request that finds too few waits; a smaller one behind it doesn't. Large ones leave RESERVE free, so that small
    ones never wait for memory: their latency is about the transport.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 12])
        blocks = CASE.side_blocks("dst")
        self._free = np.ones(blocks, dtype=bool)
        self._from = np.full(blocks, -1, dtype=np.int64)
        self._waiting: list[Request] = []

    def enter(self, request: Request) -> None:
        self._waiting.append(request)

    def admit(self) -> tuple[Request, Ids] | None:
        """Return the first request that there is room for, and blocks for it; None: there is none."""
        free = np.flatnonzero(self._free)
        for place, request in enumerate(self._waiting):
            if request.blocks + (RESERVE if request.blocks >= LARGE else 0) <= len(free):
                del self._waiting[place]
                ids: Ids = self._rng.permutation(free)[: request.blocks].astype(np.int64)
                self._free[ids] = False
                return request, ids
        return None

    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def leave(self, ids: Ids, source: Ids) -> None:
        """The blocks `ids` now hold the blocks `source`, and may be overwritten."""
        self._free[ids] = True
        self._from[ids] = source

    def contents(self) -> tuple[Ids, Ids]:
        """Return (source blocks, blocks that hold them), of all that were ever written."""
        written = np.flatnonzero(self._from >= 0)
        return self._from[written], written


def slowdowns(
    latencies_us: Sequence[Sequence[float]],
    plans: Sequence[Sequence[Request]],
    alone_us: Sequence[dict[int, float]],
) -> dict[int, float]:
    """Return each sender's mean slowdown: a request's latency over its class's alone, in the same round."""
    of: dict[int, list[float]] = {sender: [] for sender in range(ENDS)}
    for took, plan, base in zip(latencies_us, plans, alone_us, strict=True):
        for us, request in zip(took, plan, strict=True):
            of[request.sender].append(us / base[request.blocks])
    return {sender: float(np.mean(values)) for sender, values in of.items() if values}
