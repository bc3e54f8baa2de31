"""How fast this process copies memory: what no backend of one host can exceed.

Here: one measurement, short enough for `kvtransport doctor`. Not here: the limits that the bench compares with
(bench/limits).
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MIB: Final = 1 << 20
COPIED_NBYTES: Final = 64 * MIB
BUDGET_S: Final = 0.12
"""For the copies of one number of threads."""
MOST_COPIES: Final = 7


def copy_speed(nbytes: int = COPIED_NBYTES) -> dict[str, Any]:
    """Return the median rate of copying `nbytes` between two arrays, by 1 and (on several cores) 2 threads.

    {"nbytes": of a copy, "gb_per_s": {"1": ..., "2": ...}}; no rates where there is too little memory.
    """
    import numpy as np

    try:
        source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    except MemoryError:
        return {"nbytes": nbytes, "gb_per_s": {}}
    target.fill(1)  # zeros has no pages yet
    threads = (1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,)
    return {"nbytes": nbytes, "gb_per_s": {str(n): _rate(source, target, n) for n in threads}}


def _rate(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], threads: int) -> float:
    """Return GB/s. Each thread has its part of the bytes; numpy copies without the GIL."""
    import numpy as np

    step = -(-len(source) // threads)
    parts = [slice(first, first + step) for first in range(0, len(source), step)]
    seconds: list[float] = []
    stop_at = time.perf_counter() + BUDGET_S
    with ThreadPoolExecutor(threads) as pool:
        while len(seconds) < MOST_COPIES and (not seconds or time.perf_counter() < stop_at):
            began = time.perf_counter()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            seconds.append(time.perf_counter() - began)
    return len(source) / statistics.median(seconds) / 1e9
