"""Many connections: idle cost of 100, total bandwidth of 1 to 256, memory of a further one.

Two Endpoints have one Connection between them. So for the costs of idling the destination has one Endpoint
with all connections and the source one for each; for bandwidth both sides have up to 16 Endpoints, each
connected with each of the other side, as prefill and decode workers are.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import kvtransport as kvt
from bench import measure, raw_limits
from bench.cases import CONN_COUNTS, ids_of
from bench.ours import LANES
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

_ends: list[_End] = []
_conns: list[tuple[_End, Any]] = []


class _End:
    """One more Endpoint of a worker, with the worker's arena registered."""

    def __init__(self, end: Any, config: dict[str, Any]) -> None:
        self.endpoint = kvt.Endpoint(kvt.Config.from_dict(config))
        self.pool = end.register(self.endpoint)


def worker_open(end: Any, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Worker: one more Endpoint; the address where it listens if `where` says so."""
    _ends.append(_End(end, config))
    return {"address": _ends[-1].endpoint.listen(where) if where else ""}


def worker_connect(end: Any, index: int, address: str) -> dict[str, Any]:
    """Worker, source: a connection of its Endpoint `index`."""
    _conns.append((_ends[index], _ends[index].endpoint.connect(address, timeout=20)))
    return {}


def worker_accept(end: Any, index: int) -> dict[str, Any]:
    """Worker, destination: the next connection of its Endpoint `index`."""
    _conns.append((_ends[index], _ends[index].endpoint.accept(timeout=20)))
    return {}


def _post(end: Any, seed: int, conns: int) -> list[Any]:
    """Post a part of the run's blocks on each of the first `conns` connections."""
    ids = ids_of(end.case, seed, end.side)
    call = "send_blocks" if end.side == "src" else "recv_blocks"
    return [
        getattr(conn, call)(made.pool, ids[i::conns], key=f"many-{seed}")
        for i, (made, conn) in enumerate(_conns[:conns])
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


def worker_close(end: Any) -> dict[str, Any]:
    """Worker: close its Endpoints."""
    while _ends:
        _ends.pop().endpoint.close()
    return {}


def _star(count: int) -> list[tuple[int, int]]:
    """Return the Endpoints of each connection, source and destination: the latter has one for all."""
    return [(i, 0) for i in range(count)]


def _mesh(count: int) -> list[tuple[int, int]]:
    """Return the same where each is connected with each, so that any first part is near a square."""
    side = math.isqrt(count - 1) + 1
    every = itertools.product(range(side), range(side))
    return sorted(every, key=lambda place: (max(place), place))[:count]


class _Group:
    """The two workers with a growing number of connections."""

    def __init__(self, pair: Any, places: list[tuple[int, int]]) -> None:
        self.src: WorkerProcess = pair.src
        self.dst: WorkerProcess = pair.dst
        self._places = places
        self._config = {**pair.config, **CONFIG}
        self._addresses: list[str] = []
        self._sources = 0
        self.count = 0

    def grow(self, count: int) -> None:
        for source, destination in self._places[self.count : count]:
            while len(self._addresses) <= destination:
                made = self.dst.call("many.open", config=self._config, where="127.0.0.1:0")
                self._addresses.append(made["address"])
            while self._sources <= source:
                self.src.call("many.open", config=self._config, where="")
                self._sources += 1
            self.src.call("many.connect", index=source, address=self._addresses[destination])
            self.dst.call("many.accept", index=destination)
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
        group = _Group(pair, _star(IDLE_CONNECTIONS))
        group.grow(1)
        one = pair.dst.call("usage")["uss"]
        context.progress.step(f"{IDLE_CONNECTIONS} idle connections")
        group.grow(IDLE_CONNECTIONS)
        time.sleep(1.0)
        begin = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        time.sleep(IDLE_S)
        after = {side: worker.call("usage") for side, worker in (("src", pair.src), ("dst", pair.dst))}
        for worker in (pair.src, pair.dst):
            worker.call("many.close")
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
    """Move the same bytes over 1 to 256 connections, ours and bare ones with as many sockets, in turn."""
    nbytes, most = 512 << 20, CONN_COUNTS[-1]
    ours: dict[int, list[float]] = {count: [] for count in CONN_COUNTS}
    bare: dict[int, list[float]] = {count: [] for count in CONN_COUNTS}
    program = raw_limits.LimitsProgram()
    try:
        with context.pair("a", open_now=False) as pair:
            group = _Group(pair, _mesh(most))
            context.progress.step(f"{most} connections")
            group.grow(most)
            group.rate(most, 0, nbytes)  # opens the windows
            for turn in range(context.rounds):
                context.progress.step(f"bandwidth of 1 to {most} connections: round {turn + 1}")
                for count in CONN_COUNTS:
                    ours[count].append(group.rate(count, 1000 * (turn + 1) + count, nbytes))
                    reply = program.run(f"tcp a {LANES * count} default same cc=reno seed={turn + 1}")
                    bare[count].append(reply["nbytes"] / reply["seconds"] / 1e9)
            for worker in (pair.src, pair.dst):
                worker.call("many.close")
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
