"""Damage that the checks must notice: passed on a damaged cache, a check proves nothing about a whole one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handoff.paged_cache import PagedMemory


@dataclass(frozen=True)
class Control:
    name: str
    damage: Callable[[], None]
    rows: Sequence[int]  # requests whose logits must then differ, and no others


def controls(memory: PagedMemory) -> list[Control]:
    everyone = range(len(memory.prompt_ids))
    return [
        Control("one block swapped", lambda: swap_block(memory), (0, 1)),
        Control("one layer shifted", lambda: shift_layer(memory), everyone),
        Control("KV zeroed", lambda: zero(memory), everyone),
    ]


def swap_block(memory: PagedMemory) -> None:
    """The first blocks of two requests change places.

    Two blocks of one request would not do: each key carries its own position, and attention over the whole
    past doesn't mind in which order it finds it.
    """
    one, other, *_ = (ids[0] for ids in memory.prompt_ids.values())
    for blocks in memory.tensors:
        blocks[[one, other]] = blocks[[other, one]]


def shift_layer(memory: PagedMemory) -> None:
    """The last layer holds what belongs to the layer before it."""
    memory.tensors[-1].copy_(memory.tensors[-2])


def zero(memory: PagedMemory) -> None:
    for blocks in memory.tensors:
        blocks.zero_()
