"""Blocks: memory for checks, whose every byte is known beforehand.

Here: making it, and what it holds after a transfer. Not here: registering it or moving it (`actor`).

Invariant: what a Blocks makes depends on its fields alone, so that one process can say what another one's memory
must hold, the bytes around and between the blocks included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

GUARD: Final = 4096
"""Bytes before the first block and after the last one of each layer; nothing may change them."""


@dataclass(frozen=True)
class Blocks:
    """`layers` arrays of `count` opaque blocks of `nbytes`, with `gap` bytes after each, filled by `seed`."""

    count: int
    nbytes: int
    layers: int = 1
    gap: int = 0
    seed: int = 1

    def memory(self) -> list[Bytes]:
        """Return fresh memory, one array a layer, guards and gaps included."""
        size = 2 * GUARD + self.count * (self.nbytes + self.gap)
        made = []
        for layer in range(self.layers):
            random = np.random.default_rng([self.seed, layer])
            made.append(np.frombuffer(random.bytes(size), dtype=np.uint8).copy())
        return made

    def views(self, memory: Sequence[Bytes]) -> list[Bytes]:
        """Return what is registered: for each layer an array [block, byte]."""
        end = self.count * (self.nbytes + self.gap)
        shape = (self.count, self.nbytes + self.gap)
        return [layer[GUARD : GUARD + end].reshape(shape)[:, : self.nbytes] for layer in memory]

    def after(
        self,
        source: Blocks,
        here: Iterable[int],
        there: Iterable[int],
        layers: Iterable[int] | None = None,
        memory: list[Bytes] | None = None,
    ) -> list[Bytes]:
        """Return what the memory holds once the source's blocks `there` have arrived at `here`.

        memory: what it held before; None: as it was made. It is changed and returned.
        """
        memory = self.memory() if memory is None else memory
        to, of = self.views(memory), source.views(source.memory())
        at, from_ = list(here), list(there)
        for layer in range(self.layers) if layers is None else layers:
            to[layer][at] = of[layer][from_]
        return memory

    def to_json(self) -> dict[str, int]:
        """Return the fields."""
        return {
            "count": self.count,
            "nbytes": self.nbytes,
            "layers": self.layers,
            "gap": self.gap,
            "seed": self.seed,
        }


def digests(memory: Iterable[Any]) -> list[str]:
    """Return what tells two memories apart, a digest for each layer."""
    return [hashlib.blake2b(layer, digest_size=16).hexdigest() for layer in memory]
