"""One side of a peer's transfer: memory, and which bytes of it a run moves. What the two peers' workers
share.

Both peers are one-sided: the initiator does the work, the other side only registers its memory. What moves
is a descriptor (address, length) for each contiguous piece; its index in the prepared list is the same on
both sides for equal ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bench import measure
from bench.arena import Arena
from bench.cases import LATENCY_BATCH, Case, Side, batch_ids, case_of, ids_of

Indices = npt.NDArray[np.int64]


class Descriptors:
    """The geometry of one side: every piece that a run might move, by index."""

    def __init__(self, case: Case, side: Side, base: int) -> None:
        self.case = case
        self.base = base
        self.blocks = case.side_blocks(side)
        self.rows = case.block_nbytes // case.row_nbytes if case.sliced else 1
        self.stride = case.side_block_nbytes(side) // self.rows
        self.nbytes = case.row_nbytes // 2 if case.sliced else case.block_nbytes

    def addresses(self, indices: Indices) -> Indices:
        return self.base + indices * self.stride

    def every(self) -> Indices:
        return np.arange(self.case.tensors * self.blocks * self.rows, dtype=np.int64)

    def of(self, ids: Indices) -> Indices:
        """Return the indices of all pieces of blocks `ids`, tensor by tensor."""
        tensors = np.arange(self.case.tensors, dtype=np.int64)[:, None, None] * self.blocks
        pieces = (tensors + ids[None, :, None]) * self.rows + np.arange(self.rows, dtype=np.int64)
        return pieces.ravel()


class PeerEnd:
    """The commands that both peers' workers have."""

    def __init__(self) -> None:
        self.case: Case = case_of("a")
        self.side: Side = "src"
        self.arena: Any = None

    def do_allocate(self, case: str, side: Side) -> None:
        self.case = case_of(case)
        self.side = side
        self.arena = Arena(self.case, side)

    def do_wipe(self) -> None:
        self.arena.wipe()

    def do_check(self, seed: int, count: int = 0) -> dict[str, Any]:
        """Check every byte of the destination after a run (count 0) or a batch of `count` runs."""
        if count:
            source, here = (batch_ids(self.case, seed, side, count).ravel() for side in ("src", "dst"))
        else:
            source, here = (ids_of(self.case, seed, side) for side in ("src", "dst"))
        return {"wrong": self.arena.wrong_blocks(source, here)}

    def do_usage(self) -> dict[str, Any]:
        return {"cpu_s": measure.cpu_s(), "uss": measure.uss_nbytes()}

    def do_pin(self, cpus: list[int], main_only: bool = False) -> None:
        measure.pin_process(cpus, main_only)

    def descriptors(self, side: Side, base: int) -> Descriptors:
        return Descriptors(self.case, side, base)

    @property
    def other_side(self) -> Side:
        return "dst" if self.side == "src" else "src"

    def run_ids(self, seed: int, side: Side) -> Indices:
        return ids_of(self.case, seed, side)

    def run_batch_ids(self, seed: int, side: Side, count: int = LATENCY_BATCH) -> Indices:
        return batch_ids(self.case, seed, side, count)
