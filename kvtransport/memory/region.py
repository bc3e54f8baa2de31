"""Region: where a user's array lies, in bytes, whatever library it is of; and whether it still lies there.

Here: one adapter each for torch, numpy, DLPack and the buffer protocol (none of the libraries is imported
for it), cutting a region by axes, and Watch, the cheap check before each post that no array was resized or
re-seated.
Not here: what the axes mean (`plan`), pools.

Invariant: a Region lies within memory that its source keeps alive, as far as the library tells the extent of
it (torch's storage, the numpy array that owns the data); every element is its own bytes if the region is
writable.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

from kvtransport.errors import BackendUnavailable
from kvtransport.memory import dlpack

_value = attrgetter("value")
_nbytes = attrgetter("nbytes")


@dataclass(frozen=True)
class Probe:
    """One question to the array's library, with the answer at registration. `key` names the same question."""

    key: tuple[str, int]
    ask: Callable[[], int]
    answer: int


@dataclass(frozen=True, eq=False)
class Source:
    """An array as the user gave it. `array` keeps its memory alive, `probes` tell whether it has moved."""

    array: object
    probes: tuple[Probe, ...] = ()

    def moved(self) -> bool:
        """Return whether the array was resized or re-seated since it was registered."""
        return any(probe.ask() != probe.answer for probe in self.probes)


@dataclass(frozen=True)
class Region:
    """A strided array in memory. `address`: of element 0; `strides`, `itemsize`: in bytes; `dtype`: a name.

    `source` is the user's array. Cutting a region gives regions of the same source.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    writable: bool
    source: Source

    @classmethod
    def of(cls, array: Any) -> Region:
        """Return the region of a torch tensor, a numpy array, or anything with DLPack or the buffer protocol.

        TypeError for other objects; ValueError for arrays whose bytes aren't simply their elements;
        BackendUnavailable for memory that isn't the host's.
        """
        if hasattr(array, "untyped_storage") and hasattr(array, "data_ptr"):
            region = _of_torch(array)
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(array, numpy.ndarray):
            region = _of_numpy(array)
        elif hasattr(array, "__cuda_array_interface__"):
            raise _not_host("memory of a GPU")
        elif hasattr(array, "__dlpack__"):
            region = _of_dlpack(array)
        else:
            region = _of_buffer(array)
        if 0 in region.shape or not region.address:
            raise ValueError(f"an array of shape {list(region.shape)} has no memory to register")
        if region.writable and region.overlaps_itself():
            raise ValueError(
                f"elements of an array of shape {list(region.shape)} share memory (its strides in bytes are "
                f"{list(region.strides)}); register the array that it is a view of"
            )
        return region

    def span(self) -> tuple[int, int]:
        """Return the addresses of the lowest byte and of one after the highest."""
        steps = [(count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(step for step in steps if step < 0)
        return low, self.address + sum(step for step in steps if step > 0) + self.itemsize

    def overlaps_itself(self) -> bool:
        """Return whether two elements may share bytes: no axis nests in the next wider one."""
        axes = sorted((abs(s), n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1)
        reach = self.itemsize
        for stride, count in axes:
            if stride < reach:
                return True
            reach += stride * (count - 1)
        return False

    def take(self, axis: int, index: int) -> Region:
        """Return the part at `index` of an axis, without that axis."""
        return replace(
            self,
            address=self.address + index * self.strides[axis],
            shape=self.shape[:axis] + self.shape[axis + 1 :],
            strides=self.strides[:axis] + self.strides[axis + 1 :],
        )

    def split(self, axis: int, inner: int) -> Region:
        """Return the region with an axis of n * inner made two, n and inner."""
        count, stride = self.shape[axis], self.strides[axis]
        return replace(
            self,
            shape=(*self.shape[:axis], count // inner, inner, *self.shape[axis + 1 :]),
            strides=(*self.strides[:axis], stride * inner, stride, *self.strides[axis + 1 :]),
        )

    def insert(self, axis: int) -> Region:
        """Return the region with a further axis of one, before `axis`."""
        stride = self.shape[axis] * self.strides[axis]
        return replace(
            self,
            shape=(*self.shape[:axis], 1, *self.shape[axis:]),
            strides=(*self.strides[:axis], stride, *self.strides[axis:]),
        )


class Watch:
    """Tells which of many sources has moved; to ask of 61 layers costs some microseconds."""

    def __init__(self, sources: Iterable[tuple[str, Source]]) -> None:
        """Take (name, source) pairs; a question that several sources share is asked once."""
        self._sources = list(sources)
        probes = {probe.key: probe for _, source in self._sources for probe in source.probes}
        self.questions = [(probe.ask, probe.answer) for probe in probes.values()]

    def moved(self) -> str | None:
        """Return the name of the first source that was resized or re-seated since registration, or None.

        It was if the answer to one of `questions`, each a call and what it returned then, is another now.
        """
        return next((name for name, source in self._sources if source.moved()), None)


def _not_host(where: str) -> BackendUnavailable:
    reason = f"{where} can't be registered: this version moves host memory only"
    remedy = "register a copy in host memory (tensor.cpu())"
    return BackendUnavailable(f"{reason}; {remedy}", reason=reason, remedy=remedy)


def _of_torch(tensor: Any) -> Region:
    """Adapt a torch tensor, by its methods alone. Of `torch.from_numpy` it doesn't tell the array behind it."""
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the meta device has no memory to register")
    if tensor.device.type != "cpu":
        raise _not_host(f"memory of {tensor.device}")
    if str(tensor.layout) != "torch.strided":
        raise ValueError(f"a tensor of layout {tensor.layout} has no strides; register a dense one")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("the tensor's bytes aren't its values (lazy conj or neg); register tensor.clone()")
    itemsize = tensor.element_size()
    storage = tensor.untyped_storage()
    address = tensor.data_ptr()
    probes = (
        Probe(("torch address", id(tensor)), tensor.data_ptr, address),
        Probe(("torch storage", id(storage)), storage.nbytes, storage.nbytes()),
    )
    region = Region(
        address=address,
        shape=tuple(tensor.shape),
        strides=tuple(stride * itemsize for stride in tensor.stride()),
        itemsize=itemsize,
        dtype=str(tensor.dtype).removeprefix("torch."),
        writable=True,
        source=Source((tensor, storage), probes),
    )
    _check_within(region, storage.data_ptr(), storage.nbytes())
    return region


def _of_numpy(array: Any, *, keep: object = None) -> Region:
    """Adapt a numpy array. `keep`: what else keeps its memory alive."""
    if array.dtype.hasobject:
        raise TypeError("an array of Python objects holds pointers, not values; register a numeric array")
    address = array.__array_interface__["data"][0]
    owner = _numpy_owner(array)
    probes = [_numpy_address(array)]
    if owner is not None:
        probes += [
            _numpy_address(owner),
            Probe(("numpy size", id(owner)), partial(_nbytes, owner), owner.nbytes),
        ]
    region = Region(
        address=address,
        shape=array.shape,
        strides=array.strides,
        itemsize=array.itemsize,
        dtype=_numpy_name(array.dtype),
        writable=array.flags.writeable,
        source=Source((array, owner, keep), tuple(probes)),
    )
    if owner is not None:
        _check_within(region, owner.__array_interface__["data"][0], owner.nbytes)
    return region


def _numpy_name(dtype: Any) -> str:
    """Return the name of an element's type. One whose bytes are in the other order is none that a layout has."""
    return str(dtype.name) if dtype.isnative else f"{dtype.name} in the other byte order ({dtype.str})"


def _numpy_owner(array: Any) -> Any:
    """Return the numpy array that owns the memory of `array`, or None. Its resize leaves all views dangling.

    The way goes through views, the holder that as_strided puts between (it has `base` too), and memoryviews.
    """
    ndarray: Any = sys.modules["numpy"].ndarray
    at: Any = array
    while at is not None:
        if isinstance(at, ndarray) and at.flags.owndata:
            return at
        at = at.obj if isinstance(at, memoryview) else getattr(at, "base", None)
    return None


def _numpy_address(array: Any) -> Probe:
    """Return the question for the array's address.

    Asked through its interface (0.9 us) it is too slow for 61 layers before each post. The pointer is the
    first field after the object's header,
    https://numpy.org/doc/stable/reference/c-api/types-and-structures.html; that is made sure of here, and
    the slow way taken if it isn't so.
    """
    answer: int = array.__array_interface__["data"][0]
    cell = ctypes.c_void_p.from_address(id(array) + object.__basicsize__)
    if cell.value == answer:
        return Probe(("numpy address", id(array)), partial(_value, cell), answer)
    return Probe(("numpy address", id(array)), lambda: int(array.__array_interface__["data"][0]), answer)


def _of_dlpack(array: Any) -> Region:
    """Adapt an object with `__dlpack__`.

    The capsule keeps the owner alive; it can't tell of an owner that resizes nonetheless, nor keep it from that.
    """
    device = array.__dlpack_device__()[0]
    if device not in dlpack.HOST_DEVICES:
        raise _not_host(f"memory of DLPack device type {int(device)}")
    found = dlpack.read(array)
    return Region(
        address=found.address,
        shape=found.shape,
        strides=found.strides,
        itemsize=found.itemsize,
        dtype=found.dtype,
        writable=found.writable,
        source=Source((array, found.capsule)),
    )


def _of_buffer(array: Any) -> Region:
    """Adapt an object with the buffer protocol; it can't be resized while the view is held."""
    try:
        view = memoryview(array)
    except TypeError:
        raise TypeError(
            f"{type(array).__name__} is no array: it has neither DLPack nor the buffer protocol; "
            "register a torch tensor or a numpy array"
        ) from None
    import numpy  # the only way to the address of a read-only buffer

    return _of_numpy(numpy.asarray(view), keep=view)


def _check_within(region: Region, address: int, nbytes: int) -> None:
    """Raise ValueError where the region reaches out of its storage (as_strided can make such)."""
    low, high = region.span()
    if region.shape and 0 not in region.shape and (low < address or high - address > nbytes):
        raise ValueError(
            f"an array of shape {list(region.shape)} and strides {list(region.strides)} bytes reaches "
            f"{max(address - low, high - address - nbytes)} bytes out of its storage of {nbytes}"
        )
