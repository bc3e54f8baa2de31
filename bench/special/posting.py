"""Posting a transfer of 10,000 ids x 61 layers: how long the call takes, and how long of that it holds the
GIL.

The GIL is watched by replacing two entries of the extension's own call table (native_tools.cpp), so what is
measured is the extension as users run it. Ids are an int64 array, as engines keep them, and a list, which
has to be read under the GIL.
"""

from __future__ import annotations

import time
from typing import Any

from bench import measure
from bench.cases import Case, ids_of
from bench.rows import Row
from bench.special import native_tools
from bench.special.context import Context

SHAPE = Case("posting", "61 layers x 10,000 ids", 61, 20_000, 64, 10_000)
POSTS = 300
RETURN_US, HELD_US = 300.0, 100.0


def worker_prepare(end: Any) -> dict[str, Any]:
    """Worker: its case is not in the table of cases, so the arena is made here."""
    from bench.arena import Arena

    end.case = SHAPE
    end.arena = Arena(SHAPE, end.side)
    return {}


def worker_posts(end: Any, kind: str, count: int) -> dict[str, Any]:
    """Worker: post and cancel, `count` times; nothing of it moves, the other side never comes."""
    ids: Any = ids_of(SHAPE, 1, end.side)
    if kind == "list":
        ids = ids.tolist()
    watched = native_tools.watch_gil("_native")
    total, held = [], []
    for i in range(count):
        native_tools.take_released_s()
        began = time.perf_counter()
        transfer = end.post(ids, f"{kind}-{i}")
        seconds = time.perf_counter() - began
        total.append(seconds * 1e6)
        held.append((seconds - native_tools.take_released_s()) * 1e6)
        transfer.cancel()
        while not transfer.done():
            time.sleep(0.0001)
    return {"total_us": total, "held_us": held, "watched": watched}


def measure_rows(context: Context) -> list[Row]:
    worst_total, worst_held, watched = 0.0, 0.0, True
    with context.pair("c", open_now=False) as pair:
        for worker in (pair.src, pair.dst):
            worker.call("posting.prepare")
        pair.open()
        for side, worker in (("send", pair.src), ("recv", pair.dst)):
            for kind in ("array", "list"):
                context.progress.step(f"posting: {side}, {kind}")
                reply = worker.call("posting.posts", kind=kind, count=POSTS)
                total, held = (measure.percentile(reply[key], 0.99) for key in ("total_us", "held_us"))
                p50 = measure.percentile(reply["total_us"], 0.5)
                context.details[f"posting_{side}_{kind}"] = {"p50": p50, "p99": total, "held_p99": held}
                watched = watched and reply["watched"]
                if kind == "array":
                    worst_total, worst_held = max(worst_total, total), max(worst_held, held)
    rows = [Row.at_most("posting 10,000 ids x 61 layers, p99", worst_total, RETURN_US, "us")]
    held_value = worst_held if watched else None
    return [*rows, Row.at_most("the same: GIL held, p99", held_value, HELD_US, "us")]
