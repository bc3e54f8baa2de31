"""The cases of `kvtransport bench`: shapes of memory, and the block ids that are moved.

Here: arithmetic, the same in both processes for equal (case, scale, seed). Not here: memory (`arena`), how bytes
move (`verbs`). The shapes are those of the bench in the source tree (bench/cases.py), so that figures compare.

Invariant: destination ids of one round are all different.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Side = Literal["source", "destination"]

KIB: Final = 1 << 10
BATCH: Final = 80
"""Transfers of a round of a latency case, one after the other, into different blocks."""
WARM_UP_SHARE: Final = 5
"""Of which one in so many, the first ones, isn't measured."""


@dataclass(frozen=True)
class Case:
    """`tensors` of `blocks` x `block_nbytes` on each side; a transfer moves `ids` blocks, the same in every tensor.

    id_step: ids are multiples of it, so that no two are adjacent. latency: each transfer is timed by itself.
    """

    name: str
    title: str
    tensors: int
    blocks: int
    block_nbytes: int
    ids: int
    id_step: int = 1
    latency: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes that one transfer moves."""
        return self.tensors * self.ids * self.block_nbytes

    @property
    def pool_nbytes(self) -> int:
        """The bytes of memory on each side."""
        return self.tensors * self.blocks * self.block_nbytes

    @property
    def transfers(self) -> int:
        """Transfers of a round."""
        return min(BATCH, self.blocks // self.id_step // self.ids) if self.latency else 1

    def scaled(self, scale: int) -> Case:
        """Return the case with a part of its blocks, and of those that move. ValueError: nothing would be left."""
        if scale < 1 or self.blocks // scale < self.id_step:
            raise ValueError(f"case {self.name} can't be divided by {scale}: it has {self.blocks} blocks")
        return dataclasses.replace(self, blocks=self.blocks // scale, ids=max(1, self.ids // scale))

    def block_ids(self, seed: int, side: Side) -> Ids:
        """Return the ids of a round, [transfer, block]."""
        random = np.random.default_rng([seed, 0 if side == "source" else 1])
        chosen = random.permutation(self.blocks // self.id_step)[: self.transfers * self.ids]
        return chosen.astype(np.int64).reshape(self.transfers, self.ids) * self.id_step


CASES: Final = {
    case.name: case
    for case in (
        Case("a", "512 MiB in pieces of 64 KiB", 32, 512, 64 * KIB, 256),
        Case("b", "one block of 32 layers, 2 MiB", 32, 512, 64 * KIB, 1, latency=True),
        Case("c", "one piece of 4 KiB", 1, 65_536, 4 * KIB, 1, latency=True),
        Case("d", "32,768 pieces of 4 KiB, never adjacent", 32, 8192, 4 * KIB, 1024, id_step=2),
        Case("e", "MLA: 61 layers x 64 pieces of 73,728 bytes", 61, 256, 73_728, 64),
    )
}


def case_of(name: str, scale: int = 1) -> Case:
    """Return a case by its name. ValueError: there is none, or it can't be scaled so."""
    if name not in CASES:
        raise ValueError(f"case {name!r} is unknown; the cases are {', '.join(CASES)}")
    return CASES[name].scaled(scale)
