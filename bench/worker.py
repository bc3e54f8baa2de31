"""A worker that moves the work with kvtransport: one end of a connection, or (`--inproc`) both ends in one
process.

Here: the plain runs. The programs for special rows are in bench/special/, one file a row, with the
harness's half and the worker's half side by side; they are found by name ("gil.hold" is `worker_hold` of
bench/special/gil.py).
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import kvtransport as kvt
from bench import measure, protocol
from bench.arena import Arena
from bench.cases import LATENCY_BATCH, Case, Side, batch_ids, case_of, ids_of

WAIT_S = 120.0


class End:
    """An Endpoint with the arena and the pool of one side of a case."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.endpoint: kvt.Endpoint | None = None
        self.conn: Any = None
        self.pool: Any = None
        self.arena: Any = None
        self.heads: slice | None = None
        self.side: Side = "src"

    def do_allocate(self, case: str, side: Side, mapped: bool = False) -> None:
        """Make the memory, such as a peer can map or plain; every page is touched before an Endpoint exists."""
        self.side = side
        self.case = case_of(case)
        self.arena = Arena(self.case, side, mapped)

    def do_open(self, config: dict[str, Any]) -> None:
        self.endpoint = kvt.Endpoint(kvt.Config.from_dict(config))
        self.pool = self.register(self.endpoint)

    def register(self, endpoint: kvt.Endpoint) -> Any:
        """Register the arena: opaque blocks, or (heads are sliced) a layout with K and V apart."""
        case = self.case
        assert case is not None
        if not case.sliced:
            return endpoint.register(list(self.arena.tensors))
        half = self.side == "dst" and case.compact_dst
        heads = 4 if half else 8
        self.heads = None if half else slice(0, 4)
        layout = kvt.BlockLayout(
            tokens_per_block=16, num_kv_heads=heads, head_dim=128, dtype="float16", order="NHD", kv="split"
        )
        shaped = self.arena.tensors.view(np.float16).reshape(case.tensors, -1, 16, heads, 128)
        return endpoint.register([(shaped[i], shaped[i + 1]) for i in range(0, case.tensors, 2)], layout)

    def do_listen(self, where: str) -> dict[str, Any]:
        assert self.endpoint is not None
        return {"address": self.endpoint.listen(where)}

    def do_connect(self, address: str) -> dict[str, Any]:
        assert self.endpoint is not None
        self.conn = self.endpoint.connect(address, timeout=20)
        return {"explain": str(self.conn.explain())}

    def do_accept(self) -> None:
        assert self.endpoint is not None
        self.conn = self.endpoint.accept(timeout=20)

    def do_pin(self, cpus: list[int], main_only: bool = False) -> None:
        measure.pin_process(cpus, main_only)

    def do_close(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()
            self.endpoint = None

    def do_wipe(self) -> None:
        self.arena.wipe()

    def post(self, ids: Any, key: str, **options: Any) -> Any:
        """Post one transfer of `ids`, in this end's direction."""
        call = self.conn.send_blocks if self.side == "src" else self.conn.recv_blocks
        if self.heads is not None:
            options["heads"] = self.heads
        return call(self.pool, ids, key=key, **options)

    def do_receive(self, seed: int) -> Iterator[dict[str, Any]]:
        """Post, say so, wait, check every byte."""
        assert self.case is not None
        ids = ids_of(self.case, seed, "dst")
        self.arena.wipe()
        cpu = measure.cpu_s()
        transfer = self.post(ids, f"run-{seed}")
        yield {}
        result = transfer.result(timeout=WAIT_S)
        used = measure.cpu_s() - cpu
        wrong = self.arena.wrong_blocks(ids_of(self.case, seed, "src"), ids)
        yield {
            "cpu_s": used,
            "wrong": wrong,
            "nbytes": result.nbytes,
            "runs": result.runs,
            "backend": result.backend,
        }

    def do_send(self, seed: int) -> dict[str, Any]:
        """Post and wait for the destination's word; the clock stops when it is here."""
        assert self.case is not None
        ids = ids_of(self.case, seed, "src")
        cpu = measure.cpu_s()
        began = time.perf_counter()
        result = self.post(ids, f"run-{seed}").result(timeout=WAIT_S)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "cpu_s": measure.cpu_s() - cpu,
            "nbytes": result.nbytes,
            "runs": result.runs,
        }

    def do_receive_batch(self, seed: int, count: int = LATENCY_BATCH) -> Iterator[dict[str, Any]]:
        """Post `count` receives into different blocks, say so, wait for one after the other, check."""
        assert self.case is not None
        ids = batch_ids(self.case, seed, "dst", count)
        self.arena.wipe()
        transfers = [self.post(row, f"run-{seed}-{i}") for i, row in enumerate(ids)]
        yield {}
        ways = {transfer.result(timeout=WAIT_S).backend for transfer in transfers}
        source = batch_ids(self.case, seed, "src", count)
        wrong = self.arena.wrong_blocks(source.ravel(), ids.ravel())
        yield {"wrong": wrong, "backend": "+".join(sorted(ways))}

    def do_send_batch(self, seed: int, count: int = LATENCY_BATCH) -> dict[str, Any]:
        """Send one after the other; the time of each is from the post to the destination's word."""
        assert self.case is not None
        samples = []
        for i, row in enumerate(batch_ids(self.case, seed, "src", count)):
            began = time.perf_counter()
            self.post(row, f"run-{seed}-{i}").result(timeout=WAIT_S)
            samples.append((time.perf_counter() - began) * 1e6)
        return {"samples_us": samples, "nbytes": self.case.nbytes}

    def do_grant(self) -> dict[str, Any]:
        """Open the whole pool to readers, for good."""
        return {"token": self.pool.grant(None, readers=None, ttl_s=None).token}

    def read(self, token: str, source: Any, here: Any) -> Any:
        """Post one read of the peer's blocks `source`."""
        assert self.case is not None
        src_heads = slice(0, 4) if self.case.sliced else None
        return self.conn.read_blocks(
            token, self.pool, here, subset=source, heads=self.heads, src_heads=src_heads
        )

    def do_read(self, seed: int, token: str) -> dict[str, Any]:
        """Read and wait; check every byte."""
        assert self.case is not None
        source, here = (ids_of(self.case, seed, side) for side in ("src", "dst"))
        self.arena.wipe()
        cpu = measure.cpu_s()
        began = time.perf_counter()
        result = self.read(token, source, here).result(timeout=WAIT_S)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "cpu_s": measure.cpu_s() - cpu,
            "wrong": self.arena.wrong_blocks(source, here),
            "nbytes": result.nbytes,
            "runs": result.runs,
            "backend": result.backend,
        }

    def do_read_batch(self, seed: int, token: str, count: int = LATENCY_BATCH) -> dict[str, Any]:
        """Read one after the other; the time of each is from the post to its result."""
        assert self.case is not None
        source, here = (batch_ids(self.case, seed, side, count) for side in ("src", "dst"))
        self.arena.wipe()
        samples, ways, connection, pool = [], set(), self.conn, self.pool
        assert self.heads is None  # latency is of whole blocks: nothing stands between the clock and the API
        for theirs, ours in zip(source.tolist(), here.tolist(), strict=True):  # an engine's tables are lists
            began = time.perf_counter()
            result = connection.read_blocks(token, pool, ours, subset=theirs).result(WAIT_S)
            samples.append((time.perf_counter() - began) * 1e6)
            ways.add(result.backend)
        wrong = self.arena.wrong_blocks(source.ravel(), here.ravel())
        return {
            "samples_us": samples,
            "nbytes": self.case.nbytes,
            "wrong": wrong,
            "backend": "+".join(sorted(ways)),
        }

    def do_usage(self) -> dict[str, Any]:
        return {"cpu_s": measure.cpu_s(), "uss": measure.uss_nbytes(), "threads": len(measure.thread_ids())}


class BothEnds:
    """Source and destination in one process: the inproc backend."""

    def __init__(self) -> None:
        self.src = End()
        self.dst = End()

    def do_open(self, case: str, config: dict[str, Any]) -> dict[str, Any]:
        for end, side in ((self.src, "src"), (self.dst, "dst")):
            end.do_allocate(case, side)  # type: ignore[arg-type]
            end.do_open(config)
        assert self.dst.endpoint is not None
        explain = self.src.do_connect(self.dst.endpoint.descriptor())
        self.dst.do_accept()
        return explain

    def do_run(self, seed: int) -> dict[str, Any]:
        receiving = self.dst.do_receive(seed)
        next(receiving)
        sent = self.src.do_send(seed)
        received = next(receiving)
        return {**sent, "wrong": received["wrong"]}  # one process: the sender's CPU time is all of it

    def do_run_batch(self, seed: int, count: int = LATENCY_BATCH) -> dict[str, Any]:
        receiving = self.dst.do_receive_batch(seed, count)
        next(receiving)
        sent = self.src.do_send_batch(seed, count)
        return {**sent, "wrong": next(receiving)["wrong"]}

    def do_close(self) -> None:
        self.src.do_close()
        self.dst.do_close()


def handlers_of(end: object) -> Callable[[str], protocol.Handler]:
    """Return the look-up of commands: `end`'s `do_` methods, and the workers' halves in bench/special/."""

    def find(name: str) -> protocol.Handler:
        if "." not in name:
            handler: protocol.Handler = getattr(end, f"do_{name}")
            return handler
        module, function = name.split(".")
        special = getattr(importlib.import_module(f"bench.special.{module}"), f"worker_{function}")
        return lambda **arguments: special(end, **arguments)

    return find


def main() -> None:
    end = BothEnds() if "--inproc" in sys.argv else End()
    protocol.serve(handlers_of(end))
    end.do_close()


if __name__ == "__main__":
    main()
