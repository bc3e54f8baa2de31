"""Many connections to one endpoint: idle cost of 100, total bandwidth of 1 to 256, memory of a further one.

The destination has one Endpoint with all connections; the source has an Endpoint for each, since two
Endpoints have one Connection between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import kvtransport as kvt
from bench import measure
from bench.cases import CONN_COUNTS, ids_of
from bench.process import WorkerProcess
from bench.rows import Row
from bench.special.context import Context

IDLE_CONNECTIONS, IDLE_S, IDLE_SHARE = 100, 10.0, 0.01
MEMORY_KIB = 64.0
FLAT = 1.2
WAIT_S = 120.0
# All come from one address, one after the other: the limits that a stranger meets would only slow us down.
CONFIG = {
    "max_pending_handshakes_per_address": 64,
    "max_handshakes_per_s_per_address": 1000,
    "max_handshakes_per_s": 1000,
    "handshake_burst_per_address": 512,
}

_ends: list[Any] = []
_conns: list[Any] = []


class _Source:
    """One more Endpoint of the source, with the arena of the worker registered."""

    def __init__(self, end: Any, config: dict[str, Any], address: str) -> None:
        self.endpoint = kvt.Endpoint(kvt.Config.from_dict(config))
        self.pool = end.register(self.endpoint)
        self.conn = self.endpoint.connect(address, timeout=20)


def worker_connect(end: Any, config: dict[str, Any], address: str) -> dict[str, Any]:
    """Worker, source: one more Endpoint and its connection."""
    _ends.append(_Source(end, config, address))
    return {}


def worker_accept(end: Any) -> dict[str, Any]:
    """Worker, destination: the next connection."""
    _conns.append(end.endpoint.accept(timeout=20))
    return {}


def worker_receive(end: Any, seed: int, conns: int) -> Iterator[dict[str, Any]]:
    """Worker, destination: a part of the blocks over each of the first `conns` connections."""
    ids = ids_of(end.case, seed, "dst")
    end.arena.wipe()
    parts = [ids[i::conns] for i in range(conns)]
    transfers = [_conns[i].recv_blocks(end.pool, parts[i], key=f"many-{seed}") for i in range(conns)]
    yield {}
    for transfer in transfers:
        transfer.result(timeout=WAIT_S)
    yield {"wrong": end.arena.wrong_blocks(ids_of(end.case, seed, "src"), ids)}


def worker_send(end: Any, seed: int, conns: int) -> dict[str, Any]:
    """Worker, source: the same parts, all at once."""
    ids = ids_of(end.case, seed, "src")
    parts = [ids[i::conns] for i in range(conns)]
    began = time.perf_counter()
    transfers = [_ends[i].conn.send_blocks(_ends[i].pool, parts[i], key=f"many-{seed}") for i in range(conns)]
    for transfer in transfers:
        transfer.result(timeout=WAIT_S)
    return {"seconds": time.perf_counter() - began}


def worker_close(end: Any) -> dict[str, Any]:
    """Worker: close the further Endpoints."""
    while _ends:
        _ends.pop().endpoint.close()
    return {}


class _Group:
    """The two workers with a growing number of connections."""

    def __init__(self, pair: Any) -> None:
        self.src: WorkerProcess = pair.src
        self.dst: WorkerProcess = pair.dst
        self._config = {**pair.config, **CONFIG}
        self.dst.call("open", config=self._config)
        self._address = pair.listen()
        self.count = 0

    def grow(self, count: int) -> None:
        while self.count < count:
            self.src.call("many.connect", config=self._config, address=self._address)
            self.dst.call("many.accept")
            self.count += 1

    def rate(self, conns: int, seed: int, nbytes: int) -> float:
        """Move `nbytes` over the first `conns` connections; return GB/s."""
        self.dst.call("many.receive", seed=seed, conns=conns)
        time.sleep(0.05)
        seconds: float = self.src.call("many.send", seed=seed, conns=conns)["seconds"]
        if wrong := self.dst.read_reply()["wrong"]:
            raise RuntimeError(f"{wrong} blocks hold wrong bytes")
        return nbytes / seconds / 1e9


def measure_idle(context: Context) -> list[Row]:
    with context.pair("c", open_now=False) as pair:
        group = _Group(pair)
        group.grow(1)
        one = pair.dst.call("usage")["uss"]
        context.progress.step(f"{IDLE_CONNECTIONS} idle connections")
        group.grow(IDLE_CONNECTIONS)
        time.sleep(1.0)
        begin = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        time.sleep(IDLE_S)
        after = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        pair.src.call("many.close")
    share = {side: (after[side]["cpu_s"] - begin[side]["cpu_s"]) / IDLE_S for side in begin}
    each_kib = (begin["dst"]["uss"] - one) / (IDLE_CONNECTIONS - 1) / 1024
    context.details["idle"] = {"share": share, "kib_each": each_kib, "threads": begin["dst"]["threads"]}
    return [
        Row.at_most(
            f"{IDLE_CONNECTIONS} idle connections, of a core", share["dst"] * 100, IDLE_SHARE * 100, "%"
        ),
        Row.at_most("memory of a further connection", each_kib, MEMORY_KIB, "KiB"),
    ]


def measure_bandwidth(context: Context) -> list[Row]:
    rates: dict[int, list[float]] = {count: [] for count in CONN_COUNTS}
    with context.pair("a", open_now=False) as pair:
        group = _Group(pair)
        nbytes = 512 << 20
        context.progress.step(f"{CONN_COUNTS[-1]} connections")
        group.grow(CONN_COUNTS[-1])
        group.rate(CONN_COUNTS[-1], 0, nbytes)  # opens the windows
        for turn in range(context.rounds):
            context.progress.step(f"bandwidth of 1 to {CONN_COUNTS[-1]} connections: round {turn + 1}")
            for count in CONN_COUNTS:
                rates[count].append(group.rate(count, 1000 * (turn + 1) + count, nbytes))
        pair.src.call("many.close")
    context.details["connections_gb_s"] = rates
    shown = ", ".join(f"{count}: {measure.median(values):.1f}" for count, values in rates.items())
    # Over the same round's rate of one connection: the machine's own ups and downs are in both.
    relative = [
        measure.median([value / one for value, one in zip(values, rates[CONN_COUNTS[0]], strict=True)])
        for values in rates.values()
    ]
    flat = max(relative) / min(relative)
    name = f"total GB/s at {CONN_COUNTS[0]} to {CONN_COUNTS[-1]} connections: max / min"
    return [Row(name, f"{flat:.2f} ({shown})", f"<= {FLAT:g}", flat <= FLAT)]
