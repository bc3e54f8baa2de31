"""(g) One block of 2 MiB while 512 MiB transfers run on the same connection, two of them in flight at any
time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench import measure
from bench.cases import Case, Ids, Side
from bench.rows import Row
from bench.special.context import Context

MIB = 1 << 20
BULK = 256  # ids of one 512 MiB transfer; two of them in flight, each with a half of the lower 512 blocks
SHAPE = Case("g", "2 MiB under 512 MiB transfers", 32, 2 * BULK + 128, 64 << 10, 1, latency=True)
PROBES = 100
GAP_S = 0.004
IDLE_TIMES, P99_MS = 4.0, 8.0
LANES = 2
SIDES: tuple[Side, Side] = ("src", "dst")
WAIT_S = 60.0

_load: BulkLoad | None = None


def bulk_ids(half: int, side: Side) -> Ids:
    """Return the ids of a half's transfers: the same each time, so what lies there is known."""
    rng = np.random.default_rng([half, 0 if side == "src" else 1])
    return rng.permutation(BULK).astype(np.int64) + half * BULK


def probe_ids(seed: int, side: Side) -> Ids:
    rng = np.random.default_rng([seed, 2 if side == "src" else 3])
    return rng.permutation(128)[:PROBES].astype(np.int64) + 2 * BULK


class BulkLoad:
    """Posts bulk transfers of one side in a thread, two in flight, until it is stopped."""

    def __init__(self, end: Any, seed: int) -> None:
        self._end = end
        self._seed = seed
        self._stop = threading.Event()
        self._pending: list[Any] = []
        self.finished = 0
        self.error = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            posted = 0
            while not self._stop.is_set():
                while len(self._pending) < 2:
                    ids = bulk_ids(posted % 2, self._end.side)
                    self._pending.append(self._end.post(ids, f"bulk-{self._seed}-{posted}"))
                    posted += 1
                if self._wait(self._pending[0]):
                    self._pending.pop(0)
                    self.finished += 1
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _wait(self, transfer: Any) -> bool:
        """Wait in slices: the other side may have been stopped, and then this one never ends."""
        while not self._stop.is_set():
            try:
                transfer.result(timeout=0.2)
            except TimeoutError:
                continue
            return True
        return False

    def stop(self) -> list[Any]:
        """Stop posting; return what is still in flight, for the end that decides."""
        self._stop.set()
        self._thread.join(10)
        return self._pending


def worker_prepare(end: Any, mapped: bool = False) -> dict[str, Any]:
    """Worker: its case is not in the table of cases, so the arena is made here."""
    from bench.arena import Arena

    end.case = SHAPE
    end.arena = Arena(SHAPE, end.side, mapped)
    return {}


def worker_start(end: Any, seed: int) -> dict[str, Any]:
    """Worker: begin the bulk transfers."""
    global _load
    if end.side == "dst":
        end.arena.wipe()
    _load = BulkLoad(end, seed)
    return {}


def worker_stop(end: Any) -> dict[str, Any]:
    """Worker: end them; the source first, since the destination still receives and finishes its last."""
    assert _load is not None
    for transfer in _load.stop():
        if end.side == "src":
            transfer.result(timeout=WAIT_S)
        else:
            transfer.cancel()
            deadline = time.monotonic() + WAIT_S
            while not transfer.done() and time.monotonic() < deadline:
                time.sleep(0.001)
    return {"finished": _load.finished, "error": _load.error}


def worker_receive(end: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Worker, destination: post all probes, say so, wait for them in turn."""
    transfers = [
        end.post(ids, f"probe-{seed}-{i}") for i, ids in enumerate(probe_ids(seed, "dst").reshape(-1, 1))
    ]
    yield {}
    for transfer in transfers:
        transfer.result(timeout=WAIT_S)
    yield {}


def worker_send(end: Any, seed: int) -> dict[str, Any]:
    """Worker, source: send the probes one after the other."""
    samples = []
    for i, ids in enumerate(probe_ids(seed, "src").reshape(-1, 1)):
        began = time.perf_counter()
        end.post(ids, f"probe-{seed}-{i}").result(timeout=WAIT_S)
        samples.append((time.perf_counter() - began) * 1e6)
        time.sleep(GAP_S)
    return {"samples_us": samples}


def worker_check(end: Any, seed: int, with_bulk: bool) -> dict[str, Any]:
    """Worker, destination: every byte of the probes and of the bulk's last transfers."""
    parts: list[tuple[Ids, Ids]] = [(probe_ids(seed, "src"), probe_ids(seed, "dst"))]
    if with_bulk:
        parts += [(bulk_ids(half, "src"), bulk_ids(half, "dst")) for half in (0, 1)]
    source, here = (np.concatenate(column) for column in zip(*parts, strict=True))
    wrong = end.arena.wrong_blocks(source, here)
    end.arena.wipe()
    return {"wrong": wrong}


def worker_check_bulk(end: Any) -> dict[str, Any]:
    """Worker, destination: every byte, of the bulk's last transfers alone."""
    source, here = (np.concatenate([bulk_ids(half, side) for half in (0, 1)]) for side in SIDES)
    return {"wrong": end.arena.wrong_blocks(source, here)}


def _probe(pair: Any, seed: int) -> list[float]:
    pair.dst.call("under_load.receive", seed=seed)
    time.sleep(0.02)
    samples: list[float] = pair.src.call("under_load.send", seed=seed)["samples_us"]
    pair.dst.read_reply()
    return samples


def measure_rows(context: Context) -> list[Row]:
    idle: list[float] = []
    loaded: list[float] = []
    rates = []
    with context.pair("c", open_now=False) as pair:
        for worker in (pair.src, pair.dst):
            worker.call("under_load.prepare")
        pair.open()
        pair.pin(main_only=True)
        for turn in range(context.rounds):
            context.progress.step(f"(g): round {turn + 1}/{context.rounds}")
            idle += _probe(pair, 2 * turn)
            wrong = pair.dst.call("under_load.check", seed=2 * turn, with_bulk=False)["wrong"]
            pair.dst.call("under_load.start", seed=turn)
            pair.src.call("under_load.start", seed=turn)
            time.sleep(0.3)
            began = time.perf_counter()
            loaded += _probe(pair, 2 * turn + 1)
            stopped = [pair.src.call("under_load.stop"), pair.dst.call("under_load.stop")]
            seconds = time.perf_counter() - began + 0.3
            rates.append(stopped[0]["finished"] * 512 * MIB / seconds / 1e9)
            wrong += pair.dst.call("under_load.check", seed=2 * turn + 1, with_bulk=True)["wrong"]
            if wrong or any(reply["error"] for reply in stopped):
                return [
                    Row.failed("(g)", f"{wrong} blocks hold wrong bytes; {[r['error'] for r in stopped]}")
                ]
    return _rows(context, idle, loaded, measure.median(rates))


def _rows(context: Context, idle: list[float], loaded: list[float], rate: float) -> list[Row]:
    idle_p50, p50, p99 = (
        measure.percentile(idle, 0.5),
        measure.percentile(loaded, 0.5),
        measure.percentile(loaded, 0.99),
    )
    chunk_us = (
        MIB / (rate / LANES * 1e9) * 1e6
    )  # one chunk's time on a lane, at the rate that the bulk had here
    limit = IDLE_TIMES * idle_p50 + chunk_us
    context.details["under_load"] = {"idle_us": idle, "loaded_us": loaded, "bulk_gb_s": rate}
    shown = f"{p50:,.0f} us (idle {idle_p50:,.0f}, bulk {rate:.1f} GB/s)"
    return [
        Row("(g) 2 MiB under 512 MiB transfers, p50", shown, f"<= {limit:,.0f} us", p50 <= limit),
        Row.at_most("(g) p99", p99 / 1000, P99_MS, "ms"),
    ]
