"""A receiver whose Python holds the GIL 50 ms of every 55, against the same load in a process of its own.

The load computes while it holds: on few cores it costs bandwidth either way. What must not cost anything is
the GIL.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from bench import measure, protocol
from bench.process import WorkerProcess
from bench.rows import Row
from bench.special import native_tools
from bench.special.context import Context

HOLD_S, FREE_S = 0.050, 0.005
TARGET = 0.90
RUNS_A_ROUND = 4

_stop: threading.Event | None = None
_thread: threading.Thread | None = None


def _load(stop: threading.Event) -> None:
    while not stop.is_set():
        native_tools.hold_gil(HOLD_S)
        time.sleep(FREE_S)


def worker_start(end: Any) -> None:
    """Worker: begin to hold the GIL in a thread."""
    global _stop, _thread
    _stop = threading.Event()
    _thread = threading.Thread(target=_load, args=(_stop,), daemon=True)
    _thread.start()


def worker_stop(end: Any) -> None:
    """Worker: let go of it."""
    global _thread
    if _stop is not None and _thread is not None:
        _stop.set()
        _thread.join(5)
        _thread = None


def measure_rows(context: Context) -> list[Row]:
    ratios = []
    load = WorkerProcess("load", sys.executable, "bench.special.gil")
    try:
        with context.pair("a") as pair:
            for turn in range(context.rounds):
                context.progress.step(f"GIL-holding receiver: round {turn + 1}/{context.rounds}")
                first = 1 + turn * 2 * RUNS_A_ROUND
                load.call("start")
                apart = [pair.transfer(first + i).rate for i in range(RUNS_A_ROUND)]
                load.call("stop")
                pair.dst.call("gil.start")
                inside = [pair.transfer(first + RUNS_A_ROUND + i).rate for i in range(RUNS_A_ROUND)]
                pair.dst.call("gil.stop")
                ratios.append(measure.median(inside) / measure.median(apart))
    finally:
        load.close()
    context.details["gil"] = ratios
    return [Row.at_least("receiver holds the GIL / same load elsewhere", measure.median(ratios), TARGET)]


if __name__ == "__main__":
    commands = {"start": lambda: worker_start(None), "stop": lambda: worker_stop(None)}
    protocol.serve(commands.__getitem__)
