"""Memory of our own: views by numpy and torch with the true dtype, lifetimes, layouts of allocated layers."""

import errno
import fcntl
import gc
import mmap
import os
import subprocess
import sys
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kvtransport.errors import ResourceLimit
from kvtransport.memory import allocation
from kvtransport.memory.allocation import HostMemory, PoolArray, layer_arrays, shared_with
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


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_others_can_map_it_to_read_and_nothing_else() -> None:
    before = open_fds()
    memory = HostMemory(5000)
    fd = memory.fd
    assert fd is not None
    assert os.fstat(fd).st_size == 5000
    assert os.fstat(fd).st_blocks * 512 >= 5000
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 5000)
    for change in (0, 10_000):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, change)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with mmap.mmap(fd, 5000, prot=mmap.PROT_READ) as reader:
        memory[4999] = 3
        assert reader[4999] == 3
    memory.close()
    assert memory.fd is None
    del memory
    assert open_fds() == before


@pytest.mark.parametrize("nbytes", [5000, 32 << 20, (50 << 20) + 1])
def test_a_peer_finds_each_byte_in_the_memfd(nbytes: int) -> None:
    memory = HostMemory(nbytes)
    assert memory.fd is not None
    size = os.fstat(memory.fd).st_size
    assert size == memory.fd_offset + nbytes
    assert os.fstat(memory.fd).st_blocks * 512 >= size
    with mmap.mmap(memory.fd, size, prot=mmap.PROT_READ) as reader:
        for at in (0, 4096, nbytes // 2, nbytes - 1):
            if at < nbytes:
                memory[at] = 77
                assert reader[memory.fd_offset + at] == 77


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_MADV_COLLAPSE", 999)  # as a kernel that doesn't know it
    memory = HostMemory(32 << 20)
    assert memory.fd is not None
    assert os.fstat(memory.fd).st_blocks * 512 >= 32 << 20


def test_a_forked_child_shares_it() -> None:
    memory = HostMemory(4096)
    child = os.fork()
    if child == 0:
        memory[7] = 9
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory[7] == 9


def test_which_memory_holds_an_address() -> None:
    first, second = HostMemory(4096), HostMemory(8192)
    for memory in (first, second):
        low, high = memory.address, memory.address + memory.nbytes
        assert memory.fd is not None
        whole = [(memory.fd, low - memory.fd_offset, memory.nbytes + memory.fd_offset)]
        assert shared_with([(low, high)]) == whole
        assert shared_with([(0, 1), (high - 1, high)]) == whole
        assert shared_with([(low, high + 1)]) == []
    freed = first.address
    first.close()
    assert shared_with([(freed, freed + 1)]) == []


@pytest.mark.parametrize("limit", ["RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_NOFILE"])
def test_a_limit_of_the_process_is_said(limit: str) -> None:
    """And no SIGBUS or SIGXFSZ. In a process of its own, which keeps the limit."""
    code = f"""
import os, resource, kvtransport, numpy
from kvtransport.memory.allocation import HostMemory
HostMemory(1 << 20)
most = {{"RLIMIT_FSIZE": 1 << 20, "RLIMIT_AS": 1 << 30, "RLIMIT_NOFILE": os.dup(0)}}["{limit}"]
resource.setrlimit(resource.{limit}, (most, most))
try:
    HostMemory(1 << 30)
except kvtransport.ResourceLimit as e:
    print(e)
assert {limit == "RLIMIT_NOFILE"} or HostMemory(1 << 20).fd
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "no room for 1073741824 bytes" in done.stdout
    assert "ulimit" in done.stdout


def test_more_than_is_available_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "available", lambda: 1 << 20)
    before = open_fds()
    with pytest.raises(ResourceLimit, match=r"no room for 1048577 bytes .*1048576 bytes are available"):
        HostMemory((1 << 20) + 1)
    assert open_fds() == before
    assert HostMemory(1 << 20).fd is not None


@pytest.mark.parametrize("why", [errno.ENOSYS, errno.EPERM])
def test_private_where_there_is_no_memfd(why: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "memfd_create", refuse)
    memory = HostMemory(8 << 20)
    assert memory.fd is None
    memory[-1] = 3
    assert np.frombuffer(memory, np.uint8)[-1] == 3
    with pytest.raises(ResourceLimit, match="no room"):
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
