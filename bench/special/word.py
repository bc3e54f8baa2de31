"""A producer that releases layers through the gate's progress word, from a thread that has no Python.

Measured: from the store that releases the last layer to the moment at which the receiver's result() has
returned, less what the same layer takes by itself when nothing has to be released.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

from bench import measure
from bench.cases import case_of, ids_of
from bench.rows import Row
from bench.special import native_tools
from bench.special.context import Context

LAYERS = case_of("a").tensors
# 2 MiB a layer every 5 ms: the wire is idle when the last one is released, so that what shows is how it is noticed.
BLOCKS = 32
INTERVAL_NS = 5_000_000
TARGET_MS = 1.0
WAIT_S = 60.0


def worker_receive(end: Any, seed: int, layers: list[int]) -> Iterator[dict[str, Any]]:
    """Worker, destination: post, say so, tell when the result was here (CLOCK_MONOTONIC is the host's)."""
    ids = ids_of(end.case, seed, "dst")[:BLOCKS]
    end.arena.wipe()
    transfer = end.post(ids, f"word-{seed}", layers=layers)
    yield {}
    transfer.result(timeout=WAIT_S)
    at_ns = time.monotonic_ns()
    wrong = 0
    if len(layers) == LAYERS:
        wrong = end.arena.wrong_blocks(ids_of(end.case, seed, "src")[:BLOCKS], ids)
    yield {"at_ns": at_ns, "wrong": wrong}


def worker_send(end: Any, seed: int, layers: list[int]) -> dict[str, Any]:
    """Worker, source: send with nothing to wait for."""
    ids = ids_of(end.case, seed, "src")[:BLOCKS]
    began_ns = time.monotonic_ns()
    end.post(ids, f"word-{seed}", layers=layers).result(timeout=WAIT_S)
    return {"at_ns": began_ns}


def worker_produce(end: Any, seed: int, layers: list[int]) -> dict[str, Any]:
    """Worker, source: send behind a gate that a C thread opens layer by layer."""
    gate = end.endpoint.layer_gate(LAYERS)
    ids = ids_of(end.case, seed, "src")[:BLOCKS]
    transfer = end.post(ids, f"word-{seed}", layers=layers, after=gate)
    stamps = (ctypes.c_int64 * LAYERS)()
    tools = native_tools.releasing_gil()
    tools.producer_start(gate.word.ctypes.data, LAYERS, INTERVAL_NS, ctypes.addressof(stamps))
    transfer.result(timeout=WAIT_S)
    tools.producer_join()
    return {"at_ns": stamps[LAYERS - 1]}


def measure_rows(context: Context) -> list[Row]:
    alone: list[float] = []
    gated: list[float] = []
    with context.pair("a") as pair:
        for turn in range(3 * context.rounds):
            context.progress.step(f"progress word: {turn + 1}/{3 * context.rounds}")
            for kind, layers, into in (
                ("send", [LAYERS - 1], alone),
                ("produce", list(range(LAYERS)), gated),
            ):
                seed = 1000 + 2 * turn + (kind == "send")
                pair.dst.call("word.receive", seed=seed, layers=layers)
                time.sleep(0.01)
                began = pair.src.call(f"word.{kind}", seed=seed, layers=layers)["at_ns"]
                reply = pair.dst.read_reply()
                if reply["wrong"]:
                    return [Row.failed("progress word", f"{reply['wrong']} blocks hold wrong bytes")]
                into.append((reply["at_ns"] - began) / 1e6)
    own = measure.median(alone)
    late = [value - own for value in gated]
    context.details["progress_word_ms"] = {"alone": alone, "gated": gated}
    shown = f"{measure.median(late):+.2f} ms (worst {max(late):+.2f}), own {own:.2f}"
    met = measure.median(late) <= TARGET_MS
    return [Row("progress word: last layer after its own wire time", shown, f"<= {TARGET_MS:g} ms", met)]
