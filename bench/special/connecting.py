"""Connect to an owner whose main thread holds the GIL 1 s of every 1.005 s."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from typing import Any

import kvtransport as kvt
from bench.process import WorkerError
from bench.rows import Row
from bench.special import native_tools
from bench.special.context import Context

HOLD_S, FREE_S = 1.0, 0.005
TIMEOUT_S = 10.0
TRIES = 3
MAX_HOLDS = 60


def worker_hold_main(end: Any) -> Iterator[dict[str, Any]]:
    """Worker: hold the GIL in the main thread until the harness says the next thing."""
    yield {}
    holds = 0
    while holds < MAX_HOLDS and not select.select([sys.stdin.fileno()], [], [], 0)[0]:
        native_tools.hold_gil(HOLD_S)
        time.sleep(FREE_S)
        holds += 1
    yield {"holds": holds}


def worker_connect(end: Any, address: str, config: dict[str, Any]) -> dict[str, Any]:
    """Worker: a new Endpoint connects, which is how the owner sees a new peer."""
    with kvt.Endpoint(kvt.Config.from_dict(config)) as endpoint:
        began = time.perf_counter()
        endpoint.connect(address, timeout=TIMEOUT_S)
        return {"seconds": time.perf_counter() - began}


def measure_rows(context: Context) -> list[Row]:
    name = f"connect while the owner holds the GIL, {TRIES} tries"
    took = []
    with context.pair("c", open_now=False) as pair:
        pair.dst.call("open", config=pair.config)
        address = pair.listen()
        for turn in range(TRIES):
            context.progress.step(f"connect while the GIL is held: {turn + 1}/{TRIES}")
            pair.dst.call("connecting.hold_main")
            error = None
            try:
                took.append(
                    pair.src.call("connecting.connect", address=address, config=pair.config)["seconds"]
                )
            except WorkerError as failure:
                error = str(failure)
            pair.dst.start("usage")  # ends the hold
            pair.dst.read_reply(2 * TIMEOUT_S)
            pair.dst.read_reply()
            if error is not None:
                return [Row.failed(name, error)]
    context.details["connect_under_gil_s"] = took
    return [Row(name, f"{max(took):.2f} s at most", f"within {TIMEOUT_S:.0f} s", max(took) <= TIMEOUT_S)]
