"""Memory of our own: HostMemory, plain bytes, and PoolArray, a part of it with shape and true dtype.

Here: allocation, and the ways out to numpy, torch and others. Not here: which pool the memory is for
    (`pool`).

Invariant: memory stays mapped while anything made of it lives, whatever library holds it: all of them
hold a numpy array, which holds the mapping. A dtype that numpy hasn't (bfloat16, fp8) leaves only through
DLPack with its true name, or as unsigned bits when asked for by `bits`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

from kvtransport.errors import ResourceLimit
from kvtransport.memory import dlpack
from kvtransport.memory.layout import DTYPES, NO_NUMPY_DTYPE, BlockLayout
from kvtransport.memory.room import available

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_F_SEAL_FUTURE_WRITE = 0x0010
"""Since Linux 5.1; `fcntl` hasn't the name. Nobody maps it writable any more; who has keeps that."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

_MADV_COLLAPSE = 25
"""Since Linux 6.1; the `mmap` module hasn't the name."""

_AT_ONCE = 16 << 20
"""Bytes that one call populates: a signal undoes no more than that, and nobody waits for the GIL for long."""

_HUGE_PAGE = 2 << 20
_HUGE_PAGES_FROM = 32 << 20
"""Huge pages from here on. Measured on copies of random blocks between two memories of 512 MiB (2 cores, Linux
6.18): 64 KiB at 20.4 GB/s instead of 19.6, 4 KiB at 13.4 instead of 12.3, 1 KiB at 8.9 instead of 7.4; private
memory with huge pages, which this was before: 19.8, 11.9 and 8.3. And 512 MiB are populated in 30 ms instead of
117. Hence MADV_COLLAPSE, which gives them whatever the system's rule for shared memory (`shmem_enabled`, "never"
as a rule)."""

_NO_ROOM = (errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.ENFILE)
_NO_ROOM_REMEDY = "the limit (ulimit -v, -f or -n; the container's memory)"

_everything: weakref.WeakSet[HostMemory] = weakref.WeakSet()


class HostMemory(mmap.mmap):
    """`nbytes` zeroed, page-aligned bytes of this process, with the buffer protocol and DLPack (as uint8).

    `numpy.frombuffer(memory, dtype)`, `torch.frombuffer(memory, dtype=...)`, `torch.from_dlpack(memory)` and
    `Endpoint.register` view it. It is freed when the last view has gone; nobody can resize it before.

    It lies in a memfd that is populated and sealed, so that peers on this host can map it to read; where the
    system has none of that, it is private. A forked child shares it: what either writes, both see.
    """

    _fd: int | None
    _fd_offset: int
    _close_fd: weakref.finalize[[int], HostMemory] | None

    def __new__(cls, nbytes: int) -> HostMemory:
        """Allocate. ValueError for no positive number of bytes; ResourceLimit where there is no room."""
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise ValueError(f"nbytes is {nbytes!r}, not a positive integer")
        try:
            fd = _memfd()
            memory = cls._private(nbytes) if fd is None else cls._shared(nbytes, fd)
        except (OSError, OverflowError) as e:
            if isinstance(e, OSError) and e.errno not in _NO_ROOM:
                raise
            raise ResourceLimit(
                f"there is no room for {nbytes} bytes ({e}); allocate less, or raise {_NO_ROOM_REMEDY}"
            ) from e
        _everything.add(memory)
        return memory

    @classmethod
    def _shared(cls, nbytes: int, fd: int) -> HostMemory:
        """Map the memfd, which is closed when the memory is freed, or here where that fails."""
        try:
            memory = cls._mapped(nbytes, fd)
            whole = memory.fd_offset + nbytes
            if (room := available()) is not None and whole > room:
                raise OSError(errno.ENOMEM, f"{room} bytes are available")
            memory._collapse(fd)
            for at in range(0, whole, _AT_ONCE):
                os.posix_fallocate(fd, at, min(_AT_ONCE, whole - at))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(fd)
            raise
        memory._fd = fd
        memory._close_fd = weakref.finalize(memory, os.close, fd)
        return memory

    @classmethod
    def _private(cls, nbytes: int) -> HostMemory:
        memory = super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if nbytes >= _HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory._fd = None
        memory._fd_offset = 0
        memory._close_fd = None
        return memory

    @classmethod
    def _mapped(cls, nbytes: int, fd: int) -> HostMemory:
        """Map it so that a huge page of the file is one of the address space.

        Linux doesn't say where it will map before it does, so the file's start is moved; a second map of the
        same length comes to the same place, if no other thread maps anything meanwhile.
        """
        os.ftruncate(fd, nbytes)
        memory = super().__new__(cls, fd, nbytes)
        memory._fd_offset = 0
        if nbytes >= _HUGE_PAGES_FROM:
            offset = memory.address % _HUGE_PAGE
            mmap.mmap.close(memory)
            os.ftruncate(fd, offset + nbytes)
            memory = super().__new__(cls, fd, nbytes, offset=offset)
            memory._fd_offset = offset
        return memory

    def _collapse(self, fd: int) -> None:
        """Populate it by huge pages, as far as there are any; each takes the place of one small page."""
        first = -self.address % _HUGE_PAGE
        last = first + (len(self) - first) // _HUGE_PAGE * _HUGE_PAGE
        if len(self) < _HUGE_PAGES_FROM or (self.fd_offset + first) % _HUGE_PAGE:
            return
        with contextlib.suppress(OSError):  # an older kernel, or no huge page is left: then small ones do
            for at in range(first, last, _AT_ONCE):
                end = min(at + _AT_ONCE, last)
                for page in range(at, end, _HUGE_PAGE):
                    os.posix_fallocate(fd, self.fd_offset + page, 1)
                self.madvise(_MADV_COLLAPSE, at, end - at)

    def close(self) -> None:
        """Free it now. BufferError while anything views it."""
        super().close()
        if self._close_fd is not None:
            self._close_fd()
            self._fd = None

    @property
    def fd(self) -> int | None:
        """The sealed memfd that it lies in, from `fd_offset` to its end; None where it is private."""
        return self._fd

    @property
    def fd_offset(self) -> int:
        """Where in the memfd the first byte lies."""
        return self._fd_offset

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


def shared_with(extents: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (fd, address of the file's start, its bytes) of the memfds that some of [begin, end) lie in."""
    found = []
    for memory in list(_everything):
        if memory.closed or memory.fd is None:
            continue
        begin = memory.address
        end = begin + memory.nbytes
        if any(begin <= first and last <= end for first, last in extents):
            found.append((memory.fd, begin - memory.fd_offset, end - begin + memory.fd_offset))
    return found


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


def _memfd() -> int | None:
    """Return a memfd that can be sealed; None where the system has none (seccomp, another kernel)."""
    try:
        return os.memfd_create("kvtransport", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except AttributeError:
        return None
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise
        return None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _pages(nbytes: int) -> int:
    """Return the bytes of whole pages that hold `nbytes`."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
