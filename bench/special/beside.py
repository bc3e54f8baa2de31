"""Reads of 4 KiB while 512 MiB transfers run on the same connection through shared memory, two in flight at any time.

The reads are the destination's, by a standing grant on a pool of small blocks; the transfers are those of (g).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench import measure
from bench.arena import Arena
from bench.cases import PAGE, Case
from bench.rows import Row
from bench.special.context import Context

PROBES, WARM_UPS = 100, 16
GAP_S = 0.004
P50_MS, P99_MS = 1.0, 8.0
SMALL = Case("small", "4 KiB blocks", 1, 1024, PAGE, PROBES + WARM_UPS)
BACKEND = "shm"
WAIT_S = 60.0

_small: tuple[Any, Any] | None = None  # this side's arena of small blocks, and the pool of them


def worker_prepare(end: Any) -> dict[str, Any]:
    """Worker: the small pool; the source's is granted."""
    global _small
    arena = Arena(SMALL, end.side, mapped=True)
    _small = (arena, end.endpoint.register(list(arena.tensors)))
    if end.side == "dst":
        return {}
    return {"token": _small[1].grant(None, readers=None, ttl_s=None).token}


def worker_probe(end: Any, token: str, seed: int) -> dict[str, Any]:
    """Worker, destination: one read after the other, with gaps; every byte of them."""
    assert _small is not None
    arena, pool = _small
    arena.wipe()
    rng = np.random.default_rng([seed, 40])
    source, here = (rng.permutation(SMALL.blocks)[: SMALL.ids].astype(np.int64) for _ in range(2))
    samples = []
    for i in range(SMALL.ids):
        began = time.perf_counter()
        end.conn.read_blocks(token, pool, here[i : i + 1], subset=source[i : i + 1]).result(timeout=WAIT_S)
        samples.append((time.perf_counter() - began) * 1e6)
        time.sleep(GAP_S)
    return {"samples_us": samples[WARM_UPS:], "wrong": arena.wrong_blocks(source, here)}


def measure_rows(context: Context) -> list[Row]:
    idle: list[float] = []
    loaded: list[float] = []
    rates = []
    with context.pair("c", BACKEND, open_now=False) as pair:
        for worker in (pair.src, pair.dst):
            worker.call("under_load.prepare", mapped=pair.way.mapped)
        pair.open()
        token = [worker.call("beside.prepare") for worker in (pair.dst, pair.src)][1]["token"]
        for turn in range(context.rounds):
            context.progress.step(f"4 KiB beside 512 MiB: round {turn + 1}/{context.rounds}")
            alone = pair.dst.call("beside.probe", token=token, seed=2 * turn)
            for worker in (pair.dst, pair.src):
                worker.call("under_load.start", seed=turn)
            time.sleep(0.3)
            began = time.perf_counter()
            beside = pair.dst.call("beside.probe", token=token, seed=2 * turn + 1)
            stopped = [worker.call("under_load.stop") for worker in (pair.src, pair.dst)]
            seconds = time.perf_counter() - began + 0.3
            wrong = alone["wrong"] + beside["wrong"] + pair.dst.call("under_load.check_bulk")["wrong"]
            if wrong or any(reply["error"] for reply in stopped):
                what = f"{wrong} blocks hold wrong bytes; {[reply['error'] for reply in stopped]}"
                return [Row.failed("(c) while (a) runs", what)]
            idle += alone["samples_us"]
            loaded += beside["samples_us"]
            rates.append(stopped[0]["finished"] * (512 << 20) / seconds / 1e9)
    return _rows(context, idle, loaded, measure.median(rates))


def _rows(context: Context, idle: list[float], loaded: list[float], rate: float) -> list[Row]:
    context.details["beside"] = {"idle_us": idle, "loaded_us": loaded, "bulk_gb_s": rate}
    p50, p99 = (measure.percentile(loaded, q) / 1000 for q in (0.5, 0.99))
    shown = f"{p50:.3f} ms (idle {measure.percentile(idle, 0.5) / 1000:.3f}, bulk {rate:.1f} GB/s)"
    return [
        Row("(c) read of 4 KiB while (a) runs, p50", shown, f"<= {P50_MS:g} ms", p50 <= P50_MS),
        Row.at_most("(c) read of 4 KiB while (a) runs, p99", p99, P99_MS, "ms"),
    ]
