"""Memory of our own: views by numpy and torch with the true dtype, lifetimes, layouts of allocated layers."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kvtransport.errors import ResourceLimit
from kvtransport.memory.allocation import HostMemory, PoolArray, layer_arrays
from kvtransport.memory.layout import DTYPES, NO_NUMPY_DTYPE, BlockLayout
from kvtransport.memory.plan import describe
from kvtransport.memory.region import Region
from tests.unit.memory_reader import piece


def layout(**changes: Any) -> BlockLayout:
    fields: dict[str, Any] = {"tokens_per_block": 4, "num_kv_heads": 2, "head_dim": 3, "dtype": "bfloat16"}
    return BlockLayout(**(fields | changes))


def test_host_memory_views() -> None:
    memory = HostMemory(1 << 16)
    views = [
        np.frombuffer(memory, np.uint8),
        np.asarray(memory),
        np.from_dlpack(memory),
        torch.frombuffer(memory, dtype=torch.uint8).numpy(),
        torch.from_dlpack(memory).numpy(),
    ]
    assert memory.address % 4096 == 0
    for i, view in enumerate(views):
        assert not view.any() or i
        view[i] = i + 1
    assert [bytes(view[:5]) for view in views] == [bytes((1, 2, 3, 4, 5))] * 5
    assert all(view.ctypes.data == memory.address for view in views)
    assert torch.frombuffer(memory, dtype=torch.bfloat16).shape == (1 << 15,)
    assert repr(memory) == "HostMemory(nbytes=65536)"


def test_host_memory_registers() -> None:
    memory = HostMemory(4096)
    region = Region.of(memory)
    assert (region.address, region.shape, region.writable) == (memory.address, (4096,), True)
    with pytest.raises(BufferError):
        memory.close()
    with pytest.raises(BufferError):
        memory.resize(1)


def test_host_memory_is_freed_with_its_last_view() -> None:
    memory = HostMemory(8 << 20)
    tensor = torch.from_dlpack(memory)
    alive = weakref.ref(memory)
    del memory
    gc.collect()
    tensor[-1] = 3
    assert alive() is not None
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, True, "1"])
def test_host_memory_refusals(nbytes: Any) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        HostMemory(nbytes)


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ResourceLimit, match=f"no room for {1 << 60} bytes"):
        HostMemory(1 << 60)


@pytest.mark.parametrize("name", DTYPES)
def test_true_dtype(name: str) -> None:
    array = layer_arrays(layout(dtype=name), ["a"], 5)["a"]
    assert isinstance(array, PoolArray)
    tensor = torch.from_dlpack(array)
    assert tensor.dtype == getattr(torch, name)
    assert tensor.shape == array.shape == (5, 2, 4, 6)
    tensor.view(torch.uint8)[3] = 7
    assert (array.bits[3].view(np.uint8) == 7).all()
    assert tensor.nbytes == array.nbytes
    assert len(array) == 5
    assert repr(array) == f"PoolArray(shape=(5, 2, 4, 6), dtype={name!r})"
    region = Region.of(array)
    assert (region.dtype, region.address, region.writable) == (name, tensor.data_ptr(), True)


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_where_it_has_the_dtype(name: str) -> None:
    array = layer_arrays(layout(dtype=name), ["a"], 5)["a"]
    assert isinstance(array, PoolArray)
    if name in NO_NUMPY_DTYPE:
        with pytest.raises(TypeError, match=rf"numpy has no {name}: use torch.from_dlpack"):
            np.asarray(array)
        with pytest.raises(TypeError, match="raw bits"):
            array.__buffer__(0)
        assert array.bits.dtype == np.dtype(f"uint{8 * DTYPES[name][0]}")
        return
    assert np.frombuffer(array.__buffer__(0), np.uint8).ctypes.data == array.bits.ctypes.data
    view = np.asarray(array)
    assert view.dtype == np.dtype(name)
    assert view.ctypes.data == array.bits.ctypes.data
    copy = np.array(array, copy=True)
    assert copy.ctypes.data != view.ctypes.data
    assert array.__array__("complex128").dtype == np.complex128
    with pytest.raises(ValueError, match="without a copy"):
        array.__array__("complex128", copy=False)
    assert np.from_dlpack(array).ctypes.data == view.ctypes.data


def test_memory_outlives_the_arrays() -> None:
    arrays = layer_arrays(layout(), ["a", "b"], 500)
    tensor = torch.from_dlpack(arrays["b"])
    tensor[:] = 2.5
    del arrays
    gc.collect()
    layer_arrays(layout(), ["a", "b"], 500)
    assert (tensor == 2.5).all()


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({}, [(5, 2, 4, 6)]),
        ({"order": "NHD", "v_head_dim": 1}, [(5, 4, 2, 4)]),
        ({"kv": "split", "v_head_dim": 2}, [(5, 2, 4, 3), (5, 2, 4, 2)]),
        ({"kv": "split", "kv_axis": 0}, [(2, 5, 2, 4, 3)]),
        ({"kv": "split", "kv_axis": 1}, [(5, 2, 2, 4, 3)]),
        ({"kv": "single", "num_kv_heads": 1}, [(5, 1, 4, 3)]),
    ],
)
def test_layer_arrays_fit_their_layout(fields: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    of = layout(**fields)
    arrays = layer_arrays(of, ["a", "b", "c"], 5)
    spans: list[tuple[int, int]] = []
    for array in arrays.values():
        parts = array if isinstance(array, tuple) else (array,)
        assert [part.shape for part in parts] == shapes
        spans += [Region.of(part).span() for part in parts]
    assert all(low % 4096 == 0 for low, _ in spans)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    plan = describe(arrays, of)
    for i, array in enumerate(arrays.values()):
        for part in array if isinstance(array, tuple) else (array,):
            part.bits.view(np.uint8)[:] = i + 1
        assert piece(plan, i, 4) == bytes([i + 1]) * of.block_nbytes
