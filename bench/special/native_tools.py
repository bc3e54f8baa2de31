"""Builds and loads native_tools.cpp: what the special rows need and Python can't do."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARY = SOURCE.parent.parent / "build" / "libkvt_bench_tools.so"


def build() -> Path:
    """Build the library if it isn't there or is older than its source; return its path."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= SOURCE.stat().st_mtime:
        return LIBRARY
    LIBRARY.parent.mkdir(exist_ok=True)
    made = LIBRARY.with_suffix(f".{os.getpid()}.tmp")  # two workers may come here at once
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made), "-ldl"], check=True, timeout=120)
    made.replace(LIBRARY)
    return LIBRARY


@functools.cache
def keeping_gil() -> ctypes.PyDLL:
    """Return the library for calls that keep the GIL."""
    library = ctypes.PyDLL(str(build()))
    library.hold_busy.argtypes = [ctypes.c_int64]
    library.take_released_ns.restype = ctypes.c_int64
    library.watch_gil.argtypes = [ctypes.c_char_p]
    return library


@functools.cache
def releasing_gil() -> ctypes.CDLL:
    """Return the library for calls that release the GIL."""
    library = ctypes.CDLL(str(build()))
    library.producer_start.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return library


def hold_gil(seconds: float) -> None:
    """Compute for so long without letting go of the GIL."""
    keeping_gil().hold_busy(int(seconds * 1e9))


def watch_gil(library: str) -> bool:
    """Note from now on how long calls into a loaded extension run without the GIL; False: it can't be."""
    return bool(keeping_gil().watch_gil(library.encode()) >= 2)


def take_released_s() -> float:
    """Return how long this thread has run without the GIL in watched calls, since last asked."""
    return float(keeping_gil().take_released_ns()) / 1e9
