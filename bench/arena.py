"""The memory of one side: tensors in one arena of plain anonymous memory that begins at a page, as the raw
limits' does, or of memory that a peer can map; the pattern of the source, the check of every byte.

Invariant: a word of the source is a function of (tensor, block, word index) alone, so the destination's
process checks what arrived without the source. No source word is zero, and the destination is zeroed before
each run, so what did not arrive shows, and so does what landed outside.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from bench.cases import Case, Ids, Side

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

_BLOCK_STEP = np.uint64(0x9E3779B97F4A7C15)
_WORD_STEP = np.uint64(
    0xC2B2AE3D27D4EB4E
)  # even: so a word's lowest bit is the block base's, set below: never zero


def _anonymous(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _mappable(nbytes: int) -> mmap.mmap:
    """Return what `Endpoint.allocate(nbytes=)` returns. It needs no Endpoint: a case's Endpoints share it."""
    from kvtransport.memory.allocation import HostMemory  # which the peers' venv hasn't

    return HostMemory(nbytes)


class Arena:
    """All tensors of one side of a case."""

    def __init__(self, case: Case, side: Side, mapped: bool = False) -> None:
        self.case = case
        self.side: Side = side
        self.blocks = case.side_blocks(side)
        self.block_nbytes = case.side_block_nbytes(side)
        self._memory = _mappable(case.side_nbytes(side)) if mapped else _anonymous(case.side_nbytes(side))
        self.data: Bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.tensors: Bytes = self.data.reshape(case.tensors, self.blocks, self.block_nbytes)
        if side == "src":
            self.fill()
        else:
            self.wipe()

    def fill(self) -> None:
        every = np.arange(self.blocks, dtype=np.int64)
        step = max(1, (4 << 20) // self.block_nbytes)  # a few MiB at a time: stays in cache
        for t in range(self.case.tensors):
            words = self.tensors[t].view(np.uint64)
            for first in range(0, self.blocks, step):
                words[first : first + step] = self._pattern(t, every[first : first + step])

    def wipe(self) -> None:
        self.data.fill(0)

    def address(self, tensor: int = 0) -> int:
        return int(self.data.ctypes.data) + tensor * self.blocks * self.block_nbytes

    def wrong_blocks(self, src_ids: Ids, dst_ids: Ids) -> int:
        """Return how many blocks of the destination don't hold what they must, moved or not."""
        untouched = np.ones(self.blocks, dtype=bool)
        untouched[dst_ids] = False
        return sum(
            self._wrong_moved(t, src_ids, dst_ids) + int(self.tensors[t][untouched].any(axis=1).sum())
            for t in range(self.case.tensors)
        )

    def _wrong_moved(self, tensor: int, src_ids: Ids, dst_ids: Ids) -> int:
        wrong = 0
        step = max(1, (4 << 20) // self.case.block_nbytes)
        words = self.tensors[tensor].view(np.uint64)
        for first in range(0, len(dst_ids), step):
            part = slice(first, first + step)
            want = self._want(tensor, src_ids[part])
            wrong += int((words[dst_ids[part]] != want).any(axis=1).sum())
        return wrong

    def _want(self, tensor: int, src_ids: Ids) -> Words:
        whole = self._pattern(tensor, src_ids)
        if not self.case.sliced:
            return whole
        rows = self.case.block_nbytes // self.case.row_nbytes
        by_row = whole.reshape(len(src_ids), rows, -1)
        half = by_row.shape[2] // 2
        if self.case.compact_dst:
            return by_row[:, :, :half].reshape(len(src_ids), -1)
        by_row[:, :, half:] = 0
        return whole

    def _pattern(self, tensor: int, ids: Ids) -> Words:
        """Return the words of blocks `ids` of a source tensor, [len(ids), words of a block]."""
        index = (np.uint64(tensor * self.case.blocks) + ids.astype(np.uint64)) * np.uint64(2) + np.uint64(1)
        base = index * _BLOCK_STEP  # odd times odd: odd
        steps = np.arange(self.case.block_nbytes // 8, dtype=np.uint64) * _WORD_STEP
        words: Words = base[:, None] + steps[None, :]
        return words
