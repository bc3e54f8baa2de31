"""Many connections: idle cost of 100, total bandwidth of 1 to 256, memory of a further one.

Two Endpoints have one Connection between them. So for the costs of idling the destination has one Endpoint
with all connections and the source one for each; for bandwidth both sides have up to 16 Endpoints, each
connected with each of the other side, as prefill and decode workers are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from bench import measure, raw_limits
from bench.cases import CONN_COUNTS, ids_of
from bench.rows import Row
from bench.special.context import Context, titled
from bench.special.mesh import Mesh, links, mesh, star
from bench.ways import LANES

IDLE_CONNECTIONS, IDLE_S, IDLE_SHARE = 100, 10.0, 0.01
MEMORY_KIB = 64.0
FLAT = 1.2
WAIT_S = 120.0


def _post(end: Any, seed: int, conns: int) -> list[Any]:
    """Post a part of the run's blocks on each of the first `conns` connections."""
    ids = ids_of(end.case, seed, end.side)
    call = "send_blocks" if end.side == "src" else "recv_blocks"
    return [
        getattr(conn, call)(made.pool, ids[i::conns], key=f"many-{seed}")
        for i, (made, conn) in enumerate(links[:conns])
    ]


def worker_receive(end: Any, seed: int, conns: int) -> Iterator[dict[str, Any]]:
    """Worker, destination: post, say so, wait, check."""
    end.arena.wipe()
    transfers = _post(end, seed, conns)
    yield {}
    for transfer in transfers:
        transfer.result(timeout=WAIT_S)
    yield {"wrong": end.arena.wrong_blocks(ids_of(end.case, seed, "src"), ids_of(end.case, seed, "dst"))}


def worker_send(end: Any, seed: int, conns: int) -> dict[str, Any]:
    """Worker, source: the same parts, all at once."""
    began = time.perf_counter()
    for transfer in _post(end, seed, conns):
        transfer.result(timeout=WAIT_S)
    return {"seconds": time.perf_counter() - began}


class _Group(Mesh):
    """A mesh that the whole work is moved over."""

    def rate(self, conns: int, seed: int, nbytes: int) -> float:
        """Move `nbytes` over the first `conns` connections; return GB/s."""
        self.dst.call("many.receive", seed=seed, conns=conns)
        time.sleep(0.05)
        seconds: float = self.src.call("many.send", seed=seed, conns=conns)["seconds"]
        if wrong := self.dst.read_reply()["wrong"]:
            raise RuntimeError(f"{wrong} blocks hold wrong bytes")
        return nbytes / seconds / 1e9


def measure_idle(context: Context, backend: str = "tcp") -> list[Row]:
    with context.pair("c", backend, open_now=False) as pair:
        group = _Group(pair, star(IDLE_CONNECTIONS))
        group.grow(1)
        one = pair.dst.call("usage")["uss"]
        context.progress.step(f"{IDLE_CONNECTIONS} idle connections")
        group.grow(IDLE_CONNECTIONS)
        time.sleep(1.0)
        begin = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        time.sleep(IDLE_S)
        after = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        group.close()
    share = {side: (after[side]["cpu_s"] - begin[side]["cpu_s"]) / IDLE_S for side in begin}
    each_kib = (begin["dst"]["uss"] - one) / (IDLE_CONNECTIONS - 1) / 1024
    context.details[titled("idle", backend)] = {
        "share": share,
        "kib_each": each_kib,
        "threads": begin["dst"]["threads"],
    }
    idle = titled(f"{IDLE_CONNECTIONS} idle connections, of a core", backend)
    further = titled("memory of a further connection", backend)
    rows = [Row.at_most(idle, share["dst"] * 100, IDLE_SHARE * 100, "%")]
    if backend == "tcp":
        return [*rows, Row.at_most(further, each_kib, MEMORY_KIB, "KiB")]
    return [*rows, Row(further, f"{each_kib:.1f} KiB", "reported", None)]


def measure_idle_shm(context: Context) -> list[Row]:
    return measure_idle(context, "shm")


def measure_bandwidth(context: Context) -> list[Row]:
    """Move the same bytes over 1 to 256 connections, ours and bare ones with as many sockets, in turn."""
    nbytes, most = 512 << 20, CONN_COUNTS[-1]
    ours: dict[int, list[float]] = {count: [] for count in CONN_COUNTS}
    bare: dict[int, list[float]] = {count: [] for count in CONN_COUNTS}
    program = raw_limits.LimitsProgram()
    try:
        with context.pair("a", open_now=False) as pair:
            group = _Group(pair, mesh(most))
            context.progress.step(f"{most} connections")
            group.grow(most)
            group.rate(most, 0, nbytes)  # opens the windows
            for turn in range(context.rounds):
                context.progress.step(f"bandwidth of 1 to {most} connections: round {turn + 1}")
                for count in CONN_COUNTS:
                    ours[count].append(group.rate(count, 1000 * (turn + 1) + count, nbytes))
                    reply = program.run(f"tcp a {LANES * count} default same cc=reno seed={turn + 1}")
                    bare[count].append(reply["nbytes"] / reply["seconds"] / 1e9)
            group.close()
    finally:
        program.close()
    context.details["connections_gb_s"] = {"ours": ours, "bare": bare}
    # Over the same round's rate of one connection: the machine's own ups and downs are in both.
    alone = {count: _over(ours[count], ours[CONN_COUNTS[0]]) for count in CONN_COUNTS}
    beside = {count: _over(ours[count], bare[count]) for count in CONN_COUNTS}
    shown = ", ".join(f"{count}: {measure.median(values):.1f}" for count, values in ours.items())
    ratios = ", ".join(f"{count}: {ratio:.2f}" for count, ratio in beside.items())
    return [
        _flat(f"total GB/s at {CONN_COUNTS[0]} to {most} connections: max / min", alone, shown),
        _flat("the same over bare TCP with as many sockets: max / min", beside, ratios),
    ]


def _over(values: list[float], base: list[float]) -> float:
    return measure.median([value / other for value, other in zip(values, base, strict=True)])


def _flat(name: str, ratios: dict[int, float], shown: str) -> Row:
    flat = max(ratios.values()) / min(ratios.values())
    return Row(name, f"{flat:.2f} ({shown})", f"<= {FLAT:g}", flat <= FLAT)
