"""The cases of the work W: shapes, and the ids that are moved. Every process of the bench computes the same
from (case, seed).

Here: arithmetic only, so that a peer's worker can import it in a venv that has numpy and nothing else. The
raw limits have the same table in bench/limits/work.cpp.

Terms: a case has `tensors` of `blocks` x `block_nbytes` on each side; the same ids are moved in every
tensor. Cases f and fs move half of each row (NHD: a token's heads) of a block, so a block is `rows` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Side = Literal["src", "dst"]
Ids = npt.NDArray[np.int64]

KIB = 1 << 10
PAGE = 4 * KIB
SOURCE_PAGES = 262_144
N_COUNTS = (1, 10, 100, 1_000, 10_000, 32_768, 131_072, 1_000_000)
LATENCY_BATCH = 80
"""Runs of a latency case in a round: into different blocks, so all are posted before the first is sent."""
LATENCY_WARM_UPS = 16  # of which the first are not measured: as many as the raw limits leave out (kWarmups)
WARM_UP = 1_000_000  # added to a run's seed: other ids, so that what it leaves behind is wrong for the run
CONN_COUNTS = (1, 4, 16, 64, 128, 256)


@dataclass(frozen=True)
class Case:
    """One case: what lies on each side, and how much of it moves."""

    name: str
    title: str
    tensors: int
    blocks: int
    block_nbytes: int
    ids: int
    id_step: int = 1
    row_nbytes: int = 0
    compact_dst: bool = False
    dst_blocks: int = 0
    latency: bool = False

    @property
    def sliced(self) -> bool:
        return self.row_nbytes > 0

    @property
    def nbytes(self) -> int:
        """The bytes that one run moves."""
        return self.tensors * self.ids * self.block_nbytes // (2 if self.sliced else 1)

    def side_blocks(self, side: Side) -> int:
        return self.dst_blocks or self.blocks if side == "dst" else self.blocks

    def side_block_nbytes(self, side: Side) -> int:
        return self.block_nbytes // 2 if side == "dst" and self.compact_dst else self.block_nbytes

    def side_nbytes(self, side: Side) -> int:
        """The bytes of all tensors of a side."""
        return self.tensors * self.side_blocks(side) * self.side_block_nbytes(side)


_CASES = {
    case.name: case
    for case in (
        Case("a", "512 MiB: 8,192 x 64 KiB", 32, 512, 64 * KIB, 256),
        Case("b", "one block: 32 x 64 KiB", 32, 512, 64 * KIB, 1, latency=True),
        Case("c", "one 4 KiB piece", 1, 65_536, PAGE, 1, latency=True),
        Case("d", "32,768 x 4 KiB, never adjacent", 32, 8192, PAGE, 1024, id_step=2),
        Case("e", "MLA: 61 layers x 64 blocks x 73,728 B", 61, 256, 73_728, 64),
        # K and V apart, 16 tokens x 8 heads x 128 x 2 bytes: 2 KiB a token, of which 4 heads move.
        Case(
            "f", "262,144 x 1 KiB, NHD heads, TP 1 to 2", 64, 512, 32 * KIB, 256, 1, 2 * KIB, compact_dst=True
        ),
        Case("fs", "262,144 x 1 KiB, sliced at both ends", 64, 512, 32 * KIB, 256, 1, 2 * KIB),
        # Room for seven of the largest requests at once, and for small ones beside them.
        Case("h", "1 to 256 blocks, Poisson, 4 to 4", 32, 512, 64 * KIB, 256, dst_blocks=2048),
    )
}
CASE_NAMES = (*_CASES, "g", "n", "conns")


def case_of(name: str) -> Case:
    """Return a case by its name; `n:COUNT` is COUNT pieces of 4 KiB."""
    if name.startswith("n:"):
        count = int(name[2:])
        # Source ids repeat above 1 GiB. Destination ids can't, so the destination grows with the count.
        latency = count <= 1000
        dst_blocks = count * LATENCY_BATCH if latency else count
        title = f"{count:,} x 4 KiB"
        return Case(name, title, 1, SOURCE_PAGES, PAGE, count, dst_blocks=dst_blocks, latency=latency)
    return _CASES[name]


def ids_of(case: Case, seed: int, side: Side) -> Ids:
    """Return the block ids that a run moves; equal in every process for equal arguments."""
    rng = np.random.default_rng([seed, 0 if side == "src" else 1])
    if case.name.startswith("n:"):
        return _page_ids(case, rng, side)
    universe = case.side_blocks(side) // case.id_step
    return rng.permutation(universe)[: case.ids].astype(np.int64) * case.id_step


def _page_ids(case: Case, rng: np.random.Generator, side: Side) -> Ids:
    if side == "dst":
        return rng.permutation(case.side_blocks("dst"))[: case.ids].astype(np.int64)
    ids = rng.integers(0, SOURCE_PAGES, case.ids, dtype=np.int64)
    follows = np.flatnonzero(np.diff(ids) == 1) + 1
    ids[follows] = (ids[follows] + 7) % SOURCE_PAGES  # neighbours would be merged: not this case
    return ids


def batch_ids(case: Case, seed: int, side: Side, count: int) -> Ids:
    """Return ids for `count` runs in flight at once, [count, case.ids]; destination ids are all distinct."""
    rng = np.random.default_rng([seed, 2 if side == "src" else 3])
    universe = case.side_blocks(side) // case.id_step
    need = count * case.ids
    if side == "dst" and need > universe:
        raise ValueError(f"case {case.name}: {count} runs of {case.ids} ids don't fit {universe} blocks")
    flat = rng.permutation(universe)[:need] if need <= universe else rng.integers(0, universe, need)
    return flat.astype(np.int64).reshape(count, case.ids) * case.id_step
