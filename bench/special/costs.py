"""What using the package costs besides the transfers: set-up, import, memory over the pools."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import kvtransport as kvt
from bench import measure
from bench.cases import ids_of
from bench.process import ROOT
from bench.rows import Row
from bench.special.context import Context

SETUP_MS, IMPORT_MS, MEMORY_MIB = 10.0, 100.0, 32.0
TRIES = 10
WAIT_S = 60.0

IMPORTS = {"nothing": "pass", "ours": "import kvtransport", "with numpy": "import kvtransport, numpy"}


def worker_setup(end: Any, address: str, config: dict[str, Any], turn: int) -> dict[str, Any]:
    """Worker, destination: from nothing (Endpoint, 32 layers, connect) to the first 4 KiB."""
    layers = [np.zeros((512, 4096), dtype=np.uint8) for _ in range(32)]
    began = time.perf_counter()
    endpoint = kvt.Endpoint(kvt.Config.from_dict(config))
    pool = endpoint.register(layers)
    conn = endpoint.connect(address, timeout=10)
    conn.recv_blocks(pool, [7], key=f"first-{turn}", layers=[0]).result(timeout=WAIT_S)
    seconds = time.perf_counter() - began
    right = bool((layers[0][7] == 0xA7).all())
    endpoint.close()
    return {"seconds": seconds, "right": right}


def worker_offer(end: Any, turn: int) -> Iterator[dict[str, Any]]:
    """Worker, the other side of set-up: it has long been there, and sends to whoever comes."""
    layers = [np.full((512, 4096), 0xA7, dtype=np.uint8) for _ in range(32)]
    pool = end.endpoint.register(layers)
    yield {}
    conn = end.endpoint.accept(timeout=20)
    conn.send_blocks(pool, [3], key=f"first-{turn}", layers=[0]).result(timeout=WAIT_S)
    pool.close(timeout=5)
    yield {}


def measure_setup(context: Context) -> list[Row]:
    took = []
    with context.pair("c", open_now=False) as pair:
        pair.dst.call("open", config=pair.config)
        address = pair.listen()
        for turn in range(TRIES):
            context.progress.step(f"set-up: {turn + 1}/{TRIES}")
            pair.dst.call("costs.offer", turn=turn)
            reply = pair.src.call("costs.setup", address=address, config=pair.config, turn=turn)
            pair.dst.read_reply()
            if not reply["right"]:
                return [Row.failed("set-up", "the first 4 KiB are wrong")]
            took.append(reply["seconds"] * 1e3)
    context.details["setup_ms"] = took
    return [Row.at_most("set-up to the first 4 KiB, median", measure.median(took), SETUP_MS, "ms")]


def measure_import(context: Context) -> list[Row]:
    """Whole runs of fresh interpreters, in turn: what a run with the import takes over one with nothing.

    Modules are compiled already, as an installed package's are, whatever this shell says about bytecode.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    took: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(TRIES + 1):
        context.progress.step(f"import: {turn}/{TRIES}")
        for name, code in IMPORTS.items():
            began = time.perf_counter()
            # Pipes: without them a wait with a timeout looks again after up to 50 ms only.
            subprocess.run(
                [sys.executable, "-c", code],
                check=True, timeout=60, cwd=ROOT, env=env, capture_output=True,
            )  # fmt: skip
            if turn:  # the first compiles, and brings the files into the page cache
                took[name].append((time.perf_counter() - began) * 1e3)
    bare = measure.median(took["nothing"])
    own, whole = (measure.median(took[name]) - bare for name in ("ours", "with numpy"))
    context.details["import_ms"] = {"interpreter": bare, "ours": own, "with_numpy": whole}
    name = "import kvtransport, over `python -c pass`, median"
    shown = f"{own:.0f} ms; numpy, which the first pool imports, {whole - own:.0f} more"
    return [Row(name, shown, f"<= {IMPORT_MS:g} ms", own <= IMPORT_MS)]


class _Peak:
    """Reads this process's private memory in a thread, from when bytes move to when they don't."""

    def __init__(self, transfer: Any) -> None:
        self._transfer = transfer
        self.uss = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._transfer.done():
            if self._transfer.progress()[0] > 0 or self._transfer.state == "moving":
                self.uss = max(self.uss, measure.uss_nbytes())
            time.sleep(0.001)

    def join(self) -> int:
        self._thread.join(WAIT_S)
        return self.uss


def worker_before(end: Any) -> dict[str, Any]:
    """Worker: the memory of a process that has its pools and the package, but no Endpoint yet."""
    measure.uss_nbytes()  # the first reading imports and allocates what reading needs
    return {"uss": measure.uss_nbytes()}


def worker_move(end: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Worker, either side: one run of (a), with the memory read in its middle."""
    transfer = end.post(ids_of(end.case, seed, end.side), f"memory-{seed}")
    yield {}
    peak = _Peak(transfer)
    transfer.result(timeout=WAIT_S)
    yield {"uss": peak.join()}


def measure_memory(context: Context) -> list[Row]:
    workers = ("src", "dst")
    with context.pair("a", open_now=False) as pair:
        context.progress.step("memory over the pools")
        before = {side: getattr(pair, side).call("costs.before")["uss"] for side in workers}
        pair.open()
        peak = dict.fromkeys(workers, 0)
        for seed in range(1, 6):
            for side in ("dst", "src"):
                getattr(pair, side).call("costs.move", seed=seed)
            for side in workers:
                peak[side] = max(peak[side], getattr(pair, side).read_reply()["uss"])
    over = {side: (peak[side] - before[side]) / (1 << 20) for side in workers if peak[side]}
    context.details["memory_mib"] = over
    if len(over) < 2:
        return [
            Row("memory over the pools", "no reading fell into a transfer", f"<= {MEMORY_MIB:g} MiB", None)
        ]
    shown = f"source {over['src']:.1f}, destination {over['dst']:.1f} MiB"
    return [Row("memory over the pools", shown, f"<= {MEMORY_MIB:g} MiB", max(over.values()) <= MEMORY_MIB)]
