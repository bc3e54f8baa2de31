"""Reads a piece through the tuples that the native core is given, item by item: an oracle of its own."""

import ctypes
from itertools import product

from kvtransport.memory.plan import PoolPlan


def piece(plan: PoolPlan, layer: int, block: int, heads: tuple[int, int] | None = None) -> bytes:
    """The bytes of one block of one layer in stream order, from raw addresses."""
    _, _, parts = plan.layers[layer].native()
    out = b""
    for address, block_stride, axes, itemsize, head_axis in parts:
        ranges = [range(count) for count, _ in axes]
        if heads is not None:
            ranges[head_axis] = range(heads[0], heads[0] + heads[1])
        for index in product(*ranges):
            offset = sum(i * stride for i, (_, stride) in zip(index, axes, strict=True))
            out += ctypes.string_at(address + block * block_stride + offset, itemsize)
    return out
