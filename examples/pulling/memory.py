"""A worker's KV memory, and beside it what it must hold: every word of it can be checked at any time."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvtransport as kvt

Ids = dict[str, list[int]]  # of each group of layers

GROUPS, LAYERS, BLOCKS = ("full", "window"), 4, 320  # each group has so many layers
HEADS, TOKENS, DIM = 8, 16, 32  # of a block of one layer, all ranks; DIM: K and V of a token, side by side
BLOCK_NBYTES = LAYERS * HEADS * TOKENS * DIM * 8


class Memory:
    """Layer n of either group lies in storage n: a block id is a block of whichever group has it."""

    def __init__(self, endpoint: kvt.Endpoint, heads: range) -> None:
        self.heads = heads  # of the model's, those that this rank has
        nbytes = BLOCKS * BLOCK_NBYTES * len(heads) // HEADS
        own: Any = endpoint.allocate(nbytes=nbytes)  # peers of this host can map it
        shape = (LAYERS, BLOCKS, len(heads), TOKENS, DIM)
        self.words = np.frombuffer(own, np.int64).reshape(shape)
        self.expected = self.words.copy()
        layout = kvt.BlockLayout(
            tokens_per_block=TOKENS, num_kv_heads=len(heads), head_dim=DIM // 2, dtype="int64"
        )
        names = {group: [f"{group}.{n}" for n in range(LAYERS)] for group in GROUPS}
        self.pool = endpoint.register(
            {name: self.words[n] for group in GROUPS for n, name in enumerate(names[group])},
            groups=[kvt.LayerGroup(names[group], layout, group) for group in GROUPS],
            name="kv",
        )

    def compute(self, prompt: int, ids: Ids, positions: Ids) -> None:
        """What the model's forward pass would do. positions: the place of each block in its request."""
        self.pool.reuse(ids)  # a peer that still reads what was here gets StaleGrant, and none of what comes
        self.expect(prompt, ids, positions)
        for group in GROUPS:
            self.words[:, ids[group]] = self.expected[:, ids[group]]

    def landed(
        self,
        prompt: int,
        ids: Ids,
        positions: Ids,
        heads: slice,
        error: kvt.KVTransportError | None,
        cut: bool,
    ) -> None:
        """A read is over. Sealed blocks hold its words; poisoned ones are as they were, unless it was cut short."""
        if error is None:
            return self.expect(prompt, ids, positions, heads)
        for group in GROUPS:
            for block, position in zip(ids[group], positions[group], strict=True):
                if error.blocks[group][block] == "sealed":
                    self.expect(prompt, {group: [block]}, {group: [position]}, heads)
                elif cut:
                    self.expected[:, block, heads] = self.words[:, block, heads]  # anything
        return None

    def expect(self, prompt: int, ids: Ids, positions: Ids, heads: slice = slice(None)) -> None:
        """From now on these blocks hold the words of this prompt; no two words of all prompts are equal."""
        places: list[Any] = [self.heads[heads], range(TOKENS), range(DIM)]
        for group, blocks in ids.items():
            if not blocks:
                continue
            for n in range(LAYERS):
                word = (prompt * len(GROUPS) + GROUPS.index(group)) * LAYERS + n
                for axis in np.ix_(positions[group], *places):
                    word = word * BLOCKS + axis  # no axis is longer than that
                self.expected[n, blocks, heads] = word

    def wrong(self) -> int:
        """How many words aren't what they must be."""
        return int((self.words != self.expected).sum())
