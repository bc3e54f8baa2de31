"""Arena: the memory of one side of a case, and what must be in it.

Here: the pattern of the source, and the check of every byte of the destination. Not here: moving.

Invariant: a word of the source is a function of (tensor, block, word) alone and never zero, and the destination
is zeroed before each round: what did not arrive shows, and so does what landed where it must not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from kvtransport.cli.bench.cases import Case, Ids

if TYPE_CHECKING:
    from kvtransport.endpoint import Endpoint
    from kvtransport.memory.pool import BlockPool

Words = npt.NDArray[np.uint64]

_BLOCK_STEP: Final = np.uint64(0x9E3779B97F4A7C15)  # odd
_WORD_STEP: Final = np.uint64(0xC2B2AE3D27D4EB4E)  # even: a word's lowest bit is its block's, which is set
_AT_ONCE_NBYTES: Final = 4 << 20  # stays in a cache


class Arena:
    """All tensors of a side, in memory of the endpoint's, so that what can be shared is."""

    def __init__(self, endpoint: Endpoint, case: Case) -> None:
        """Zeroed. ResourceLimit: there is no room."""
        self.case = case
        memory: Any = endpoint.allocate(nbytes=case.pool_nbytes)
        self._data: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.tensors = self._data.reshape(case.tensors, case.blocks, case.block_nbytes)
        self._step = max(1, _AT_ONCE_NBYTES // case.block_nbytes)

    def register(self, endpoint: Endpoint) -> BlockPool:
        """Return a pool of it: opaque blocks, a layer for each tensor."""
        return endpoint.register(list(self.tensors))

    def fill(self) -> None:
        """Write the pattern of a source."""
        every = np.arange(self.case.blocks, dtype=np.int64)
        for tensor in range(self.case.tensors):
            words = self.tensors[tensor].view(np.uint64)
            for first in range(0, self.case.blocks, self._step):
                words[first : first + self._step] = self._pattern(tensor, every[first : first + self._step])

    def wipe(self) -> None:
        """Write zeros."""
        self._data.fill(0)

    def wrong_blocks(self, theirs: Ids, ours: Ids) -> int:
        """Return how many blocks don't hold what they must: the source's blocks `theirs` at `ours`, else zeros."""
        untouched = np.ones(self.case.blocks, dtype=bool)
        untouched[ours] = False
        return sum(
            self._wrong_moved(tensor, theirs, ours) + int(self.tensors[tensor][untouched].any(axis=1).sum())
            for tensor in range(self.case.tensors)
        )

    def _wrong_moved(self, tensor: int, theirs: Ids, ours: Ids) -> int:
        wrong = 0
        words = self.tensors[tensor].view(np.uint64)
        for first in range(0, len(ours), self._step):
            part = slice(first, first + self._step)
            wrong += int((words[ours[part]] != self._pattern(tensor, theirs[part])).any(axis=1).sum())
        return wrong

    def _pattern(self, tensor: int, blocks: Ids) -> Words:
        """Return the words of some blocks of a source's tensor, [block, word]."""
        index = np.uint64(tensor * self.case.blocks) + blocks.astype(np.uint64)
        base = (index * np.uint64(2) + np.uint64(1)) * _BLOCK_STEP
        words: Words = base[:, None] + np.arange(self.case.block_nbytes // 8, dtype=np.uint64) * _WORD_STEP
        return words
