"""A paged KV cache for transformers: one tensor of blocks per layer, and a table of which blocks hold what.

This is the memory that inference engines hold and that kvtransport moves. The model never sees a block: each
layer writes its new keys and values into blocks, and hands attention what transformers' own DynamicCache
would have handed it, bit for bit, padded on the left. So a run over received blocks can be compared with a
stock run. Nothing here knows of kvtransport.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class KVShape:
    """Of a layer: [num_blocks, heads, tokens_per_block, 2 * head_dim], a token's K and V side by side."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tokens_per_block: int = 16

    def allocate(self, num_blocks: int, fill: float) -> list[torch.Tensor]:
        """One tensor per layer, every element set to `fill`."""
        shape = (num_blocks, self.num_kv_heads, self.tokens_per_block, 2 * self.head_dim)
        return [torch.full(shape, fill, dtype=self.dtype) for _ in range(self.num_layers)]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)


class BlockTable:
    """The blocks of each request of a batch, and where in them a column of the left-padded batch lives."""

    def __init__(self, ids: Sequence[Sequence[int]], lengths: Sequence[int], tokens_per_block: int) -> None:
        widest = max(map(len, ids))
        self._ids = torch.tensor([[*row, *[0] * (widest - len(row))] for row in ids])
        self._padding = torch.tensor([max(lengths) - length for length in lengths])
        self._tokens_per_block = tokens_per_block

    def slots(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of columns begin to end: (block id, token in block, is it a token), each [requests, columns]."""
        token = torch.arange(begin, end)[None, :] - self._padding[:, None]
        real = token >= 0
        token = token.clamp(min=0)
        return self._ids.gather(1, token // self._tokens_per_block), token % self._tokens_per_block, real


class PagedMemory:
    """One side's blocks for some requests: the tensors, the table over them, the ids that hold each prompt.

    The two sides differ in all but the shape: `room` is how many tokens this side keeps free behind each
    prompt, `spare` blocks belong to nobody, and `seed` shuffles, as an hour of traffic does to a free list.
    """

    def __init__(
        self, shape: KVShape, lengths: Mapping[str, int], *, room: int, spare: int, seed: int, fill: float
    ) -> None:
        self.lengths = dict(lengths)
        counts = [shape.blocks_for(length + room) for length in lengths.values()]
        free = list(range(sum(counts) + spare))
        random.Random(seed).shuffle(free)
        taken = [[free.pop() for _ in range(count)] for count in counts]
        self.tensors = shape.allocate(sum(counts) + spare, fill)
        self.table = BlockTable(taken, list(lengths.values()), shape.tokens_per_block)
        self.prompt_ids = {
            key: ids[: shape.blocks_for(length)]
            for (key, length), ids in zip(lengths.items(), taken, strict=True)
        }


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache. `on_stored` is called whenever new keys and values are in their blocks."""

    def __init__(
        self, blocks: torch.Tensor, table: BlockTable, length: int, on_stored: Callable[[], None]
    ) -> None:
        super().__init__()
        self._blocks = blocks
        self._table = table
        self._length = length  # columns of the padded batch that are in the blocks
        self._on_stored = on_stored
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the blocks are there before the first token."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin, self._length = self._length, self._length + key_states.shape[-2]
        self._store(begin, torch.cat([key_states, value_states], dim=-1))
        self._on_stored()
        if begin == 0:  # a whole prompt attends to itself, padding included, as it does with a DynamicCache
            return key_states, value_states
        return self._load()

    def _store(self, begin: int, packed: torch.Tensor) -> None:
        block, token, real = self._table.slots(begin, self._length)
        # Only what is real: padding has no slot of its own, and the one it points at is somebody's.
        self._blocks[block[real], :, token[real]] = packed.transpose(1, 2)[real]

    def _load(self) -> tuple[torch.Tensor, torch.Tensor]:
        block, token, real = self._table.slots(0, self._length)
        packed = self._blocks[block, :, token]  # [requests, columns, heads, 2 * head_dim]
        # Attention weighs padding with 0, but 0 * NaN is NaN, and the slot padding points at may hold one.
        packed = packed.masked_fill(~real[:, :, None, None], 0).transpose(1, 2)
        keys, values = packed.chunk(2, dim=-1)
        return keys.contiguous(), values.contiguous()

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "none": the table says how far it goes


class PagedCache(Cache):  # type: ignore[misc]
    """`past_key_values` for a model: a PagedLayer for each layer, over one table.

    `length` is 0 for prompts that are yet to be computed, and the longest prompt's length for prompts whose
    blocks were received. `on_layer_stored(layer)` is what a layer gate's `mark_ready` wants to hear.
    """

    def __init__(
        self,
        memory: PagedMemory,
        length: int = 0,
        on_layer_stored: Callable[[int], None] = lambda layer: None,
    ) -> None:
        layers = [
            PagedLayer(blocks, memory.table, length, partial(on_layer_stored, layer))
            for layer, blocks in enumerate(memory.tensors)
        ]
        super().__init__(layers=layers)
