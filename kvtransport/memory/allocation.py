"""Memory of our own: HostMemory, plain bytes, and PoolArray, a part of it with shape and true dtype.

Here: allocation, and the ways out to numpy, torch and others. Not here: which pool the memory is for
    (`pool`).

Invariant: memory stays mapped while anything made of it lives, whatever library holds it: all of them
hold a numpy array, which holds the mapping. A dtype that numpy hasn't (bfloat16, fp8) leaves only through
DLPack with its true name, or as unsigned bits when asked for by `bits`.
"""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING, Any, TypeAlias

from kvtransport.errors import ResourceLimit
from kvtransport.memory import dlpack
from kvtransport.memory.layout import DTYPES, NO_NUMPY_DTYPE, BlockLayout

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_HUGE_PAGES_FROM = 4 << 20
"""Huge pages from here on, as numpy's own allocator asks for them. Measured: copies of random 64 KiB blocks
between two pools of 512 MiB at 16.7 GB/s instead of 15.8 (2 cores, Linux 6.18)."""


class HostMemory(mmap.mmap):
    """`nbytes` zeroed, page-aligned bytes of this process, with the buffer protocol and DLPack (as uint8).

    `numpy.frombuffer(memory, dtype)`, `torch.frombuffer(memory, dtype=...)`, `torch.from_dlpack(memory)` and
    `Endpoint.register` view it. It is freed when the last view has gone; nobody can resize it before.

    A forked child gets its own copy of what it or the parent then writes.
    """

    def __new__(cls, nbytes: int) -> HostMemory:
        """Allocate. ValueError for no positive number of bytes; ResourceLimit where there is no room."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ValueError(f"nbytes is {nbytes!r}, not a positive integer")
        try:
            memory = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as e:
            if e.errno != errno.ENOMEM:
                raise
            raise ResourceLimit(
                f"there is no room for {nbytes} bytes; allocate less, or raise ulimit -v"
            ) from e
        if nbytes >= _HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return len(self)

    @property
    def address(self) -> int:
        """Where the first one lies."""
        return int(self._bytes().__array_interface__["data"][0])

    def __dlpack__(self, **options: Any) -> Any:
        return self._bytes().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0)

    def __repr__(self) -> str:
        return f"HostMemory(nbytes={len(self)})"

    def _bytes(self) -> npt.NDArray[np.uint8]:
        import numpy

        return numpy.frombuffer(self, dtype=numpy.uint8)


class PoolArray:
    """A layer's array in memory of ours: `torch.from_dlpack(array)`, `numpy.asarray(array)`.

    shape: as BlockLayout's table says. dtype: its canonical name. bits: a numpy array of the same memory, of
    unsigned integers where numpy hasn't the dtype: `numpy.asarray` and buffers refuse such with TypeError.
    """

    def __init__(self, memory: HostMemory, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        """Lay a C-contiguous array over `memory`, `offset` bytes from its start."""
        import numpy

        nbytes = DTYPES[dtype][0]
        carrier = f"uint{nbytes * 8}" if dtype in NO_NUMPY_DTYPE else dtype
        self.bits: npt.NDArray[Any] = numpy.ndarray(shape, carrier, buffer=memory, offset=offset)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Items by axis."""
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return self.bits.nbytes

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.bits.__dlpack__(**options)
        return dlpack.retype(capsule, self.dtype) if self.dtype in NO_NUMPY_DTYPE else capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        import numpy

        array = self._numpy()
        if copy or (dtype is not None and numpy.dtype(dtype) != array.dtype):
            if copy is False:
                raise ValueError(f"a {self.dtype} array can't be viewed as {dtype} without a copy")
            return array.astype(dtype or array.dtype)
        return array

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._numpy())  # type: ignore[arg-type]  # a Buffer only for 3.12's stubs

    def __len__(self) -> int:
        return len(self.bits)

    def __repr__(self) -> str:
        return f"PoolArray(shape={self.shape}, dtype={self.dtype!r})"

    def _numpy(self) -> npt.NDArray[Any]:
        """Return the numpy array, where numpy has the dtype."""
        if self.dtype in NO_NUMPY_DTYPE:
            raise TypeError(
                f"numpy has no {self.dtype}: use torch.from_dlpack(array), or array.bits for the raw bits"
            )
        return self.bits


LayerArray: TypeAlias = "PoolArray | tuple[PoolArray, PoolArray]"


def layer_arrays(layout: BlockLayout, names: list[str], num_blocks: int) -> dict[str, LayerArray]:
    """Allocate one piece of memory for all layers, and return each layer's array, or pair (K, V), over it.

    Every array starts on a page of its own, so that layers don't share one.
    """
    shapes: list[tuple[int, ...]] = [
        (num_blocks, *layout.block_shape(part)) for part in range(len(layout.part_dims))
    ]
    if layout.kv_axis is not None:
        axis = layout.kv_axis
        shapes = [(*shapes[0][:axis], 2, *shapes[0][axis:])]
    steps = [_pages(_count(shape) * layout.itemsize) for shape in shapes]
    memory = HostMemory(sum(steps) * len(names))
    arrays: dict[str, LayerArray] = {}
    offset = 0
    for name in names:
        parts = []
        for shape, step in zip(shapes, steps, strict=True):
            parts.append(PoolArray(memory, offset, shape, layout.dtype))
            offset += step
        arrays[name] = (parts[0], parts[1]) if len(parts) == 2 else parts[0]
    return arrays


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _pages(nbytes: int) -> int:
    """Return the bytes of whole pages that hold `nbytes`."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
