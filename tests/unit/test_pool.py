"""BlockPool itself: what it tells, the check before a post, and how it ends. The native side is a stand-in
that records; the real one is tested with an Endpoint."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from kvtransport.errors import LocalProtocolError, WaitTimeout
from kvtransport.memory.allocation import HostMemory
from kvtransport.memory.layout import LayerGroup
from kvtransport.memory.plan import describe
from kvtransport.memory.pool import BlockPool, allocate


class RecordingPool:
    """Closes after as many calls as it is told."""

    def __init__(self, busy_for: int = 0) -> None:
        self.busy_for, self.timeouts = busy_for, []  # type: tuple[int, list[float]]

    def close(self, timeout_s: float) -> bool:
        self.timeouts.append(timeout_s)
        return len(self.timeouts) > self.busy_for

    def in_use(self) -> int:
        return 3


def pool_of(tensors: Any, native: Any = None, on_close: Any = None, **options: Any) -> BlockPool:
    plan = describe(tensors, **options)
    return BlockPool(plan, native or RecordingPool(), name="kv", arrays={}, on_close=on_close)


def arrays() -> dict[str, Any]:
    return {"a": np.zeros((5, 6), np.uint8), "b": np.zeros((5, 8), np.uint8)}


def test_what_it_tells() -> None:
    pool = pool_of(arrays())
    assert pool.layer_names == ("a", "b")
    assert (pool.num_layers, pool.num_blocks, pool.writable) == (2, 5, True)
    assert pool.piece_nbytes("b") == pool.piece_nbytes(1) == 8
    assert pool.layer_index("b") == 1
    assert pool.layer_indices(["b"]) == [1]
    assert pool.head_slice(None) is None
    assert repr(pool) == "<BlockPool 'kv': 2 layers, 5 blocks>"


def test_groups_have_their_own_numbers_of_blocks() -> None:
    pool = pool_of(
        {"a": np.zeros((5, 6)), "b": np.zeros((7, 6))},
        groups=[LayerGroup(["a"]), LayerGroup(["b"], name="x")],
    )
    assert [(group.name, group.num_blocks) for group in pool.groups] == [("group0", 5), ("x", 7)]
    with pytest.raises(ValueError, match="2 groups"):
        _ = pool.num_blocks


def test_check_names_the_layer_that_was_resized() -> None:
    tensors = arrays()
    pool = pool_of(tensors)
    pool.check()
    tensors["b"].resize((500, 8), refcheck=False)
    with pytest.raises(LocalProtocolError, match=r"layer 'b' of <BlockPool 'kv'.*register the array again"):
        pool.check()


def test_close_waits_and_is_idempotent() -> None:
    native = RecordingPool()
    closed: list[BlockPool] = []
    pool = pool_of(arrays(), native, closed.append)
    assert not pool.closed
    pool.close(timeout=0.5)
    pool.close()
    assert pool.closed
    assert native.timeouts == [0.5]
    assert closed == [pool]
    with pytest.raises(LocalProtocolError, match="is closed"):
        pool.check()
    assert pool.layer_names == ("a", "b")


def test_close_without_limit() -> None:
    native = RecordingPool()
    pool_of(arrays(), native).close(timeout=None)
    assert native.timeouts == [float("inf")]


def test_close_while_in_use_raises_and_keeps_the_memory() -> None:
    tensors = arrays()
    alive = weakref.ref(tensors["a"])
    native = RecordingPool(busy_for=1)
    pool = pool_of(tensors, native)
    del tensors
    with pytest.raises(WaitTimeout, match=r"still used by 3 transfers after 0\.1 s") as caught:
        pool.close(timeout=0.1)
    assert caught.value.quiesced is False
    assert not pool.closed
    gc.collect()
    assert alive() is not None
    pool.close()
    gc.collect()
    assert alive() is None


def test_context_manager() -> None:
    with pool_of(arrays()) as pool:
        pool.check()
    assert pool.closed


def test_allocate_bare_bytes() -> None:
    engine: Any = None
    memory = allocate(engine, nbytes=4096)
    assert isinstance(memory, HostMemory)
    assert memory.nbytes == 4096


def test_allocate_refusals() -> None:
    engine: Any = None
    for options in ({}, {"num_layers": 2, "num_blocks": 3}, {"nbytes": 1, "num_blocks": 3}):
        with pytest.raises(TypeError, match="allocate"):
            allocate(engine, **options)
