"""DLPack capsules, read and re-typed in place: where an array of any library lies, and bfloat16 out of numpy.

Here: the C structures of DLPack and the two things that are done with them. Not here: which arrays are
accepted (`region`), memory of our own (`allocation`).

Invariant: a capsule stays unconsumed (its name is left alone), so its own destructor frees what it holds
    when the
last reference to it goes. No Python function is ever given to others as a deleter: it could be called
without the GIL, or after the interpreter has ended.

Source of the structures: https://dmlc.github.io/dlpack/latest/c_api.html (version 1.1; they are fixed by it).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

from kvtransport.memory.layout import DTYPES

CPU: Final = 1
HOST_DEVICES: Final = (CPU, 3, 11)
"""kDLCPU, kDLCUDAHost, kDLROCMHost: ordinary memory, the latter two page-locked."""

_READ_ONLY: Final = 1
_NAMES: Final = {(code, nbytes * 8): name for name, (nbytes, code) in DTYPES.items()} | {(6, 8): "bool"}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# A handle of our own: the functions of ctypes.pythonapi are shared by all, argument types included.
_python = ctypes.PyDLL(None)
_capsule_is_valid = _python.PyCapsule_IsValid
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is_valid.restype = ctypes.c_int
_capsule_pointer = _python.PyCapsule_GetPointer
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer.restype = ctypes.c_void_p


@dataclass(frozen=True)
class DLPackArray:
    """What a capsule says. `address`: of element 0; `strides`, `itemsize`: in bytes.

    `capsule` keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    writable: bool
    device_type: int
    capsule: object


def export(array: Any) -> Any:
    """Return a capsule of anything with `__dlpack__`, in form 1.x (it knows read-only) where offered."""
    try:
        return array.__dlpack__(max_version=(1, 0))
    except TypeError:
        return array.__dlpack__()


def read(array: Any) -> DLPackArray:
    """Return where an object with `__dlpack__` lies. ValueError where its elements aren't whole bytes."""
    capsule = export(array)
    tensor, flags = _tensor(capsule)
    bits = tensor.dtype.bits * tensor.dtype.lanes
    if bits % 8:
        raise ValueError(f"elements of {bits} bits are not whole bytes; view them as uint8")
    itemsize = bits // 8
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = tuple(stride * itemsize for stride in tensor.strides[: tensor.ndim])
    else:
        strides = dense_strides(shape, itemsize)
    code = (tensor.dtype.code, tensor.dtype.bits) if tensor.dtype.lanes == 1 else (3, bits)
    return DLPackArray(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        strides=strides,
        itemsize=itemsize,
        dtype=_NAMES.get(code, f"type {code[0]} of {code[1]} bits"),
        writable=not flags & _READ_ONLY,
        device_type=tensor.device.device_type,
        capsule=capsule,
    )


def retype(capsule: Any, dtype: str) -> Any:
    """Make a new capsule say that its elements are of `dtype`, of the same size; return the capsule."""
    tensor, _ = _tensor(capsule)
    nbytes, code = DTYPES[dtype]
    if nbytes * 8 != tensor.dtype.bits:
        raise ValueError(f"{dtype} has {nbytes * 8} bits, the array's elements {tensor.dtype.bits}")
    tensor.dtype.code = code
    return capsule


def dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-contiguous array."""
    strides: list[int] = []
    step = itemsize
    for count in reversed(shape):
        strides.append(step)
        step *= count
    return tuple(reversed(strides))


def _tensor(capsule: Any) -> tuple[_Tensor, int]:
    """Return the capsule's tensor, in place, and its flags. TypeError where it is no unused capsule."""
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise TypeError(f"DLPack version {managed.major}.{managed.minor} is not known; 1.x is")
        return managed.tensor, managed.flags
    if _capsule_is_valid(capsule, b"dltensor"):
        return _Managed.from_address(_capsule_pointer(capsule, b"dltensor")).tensor, 0
    raise TypeError(f"__dlpack__ gave {capsule!r}, which is no DLPack capsule")
