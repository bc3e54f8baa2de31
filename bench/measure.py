"""What this process costs: CPU time, private memory, placement on cores. And the few statistics that the
bench uses.
"""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path


def cpu_s() -> float:
    """Return the user and system time of all threads of this process, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def uss_nbytes() -> int:
    """Return the memory that only this process has (USS): private pages, clean and dirty."""
    total = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


def thread_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def pin_process(cpus: Sequence[int], main_only: bool = False) -> None:
    """Put all threads of this process, or only its first, on `cpus`."""
    for tid in [os.getpid()] if main_only else thread_ids():
        try:
            os.sched_setaffinity(tid, cpus)
        except ProcessLookupError:
            continue  # a thread that ended in the meantime


def percentile(values: Sequence[float], q: float) -> float:
    """Return the value below which a share `q` of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Return the middle half's width over the median: 0.1 reads as +-5 %."""
    if len(values) < 2:
        return 0.0
    return (percentile(values, 0.75) - percentile(values, 0.25)) / median(values)


def jain(values: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 where all are equal, 1/n where one has everything (Jain, Chiu, Hawe 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))
