"""Several Endpoints on each side and the connections between them, for the rows that need more than a pair.

Two Endpoints have one Connection between them. All Endpoints of a side live in one process and register the same
memory.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import kvtransport as kvt
from bench.process import WorkerError, WorkerProcess

Places = list[tuple[int, int]]
"""The Endpoints of each connection: source, destination."""

# All come from one address: the limit that a stranger meets would only slow us down.
CONFIG = {"max_pending_handshakes_per_address": 64}


class Node:
    """One more Endpoint of a worker, with the worker's arena registered."""

    def __init__(self, end: Any, config: dict[str, Any]) -> None:
        self.endpoint = kvt.Endpoint(kvt.Config.from_dict(config))
        self.pool = end.register(self.endpoint)


nodes: list[Node] = []
links: list[tuple[Node, Any]] = []
"""This worker's: its Endpoint and its Connection of each link, in the same order on both sides."""


def worker_open(end: Any, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Worker: one more Endpoint; the address where it listens if `where` says so."""
    nodes.append(Node(end, config))
    return {"address": nodes[-1].endpoint.listen(where) if where else ""}


def worker_connect(end: Any, index: int, address: str) -> dict[str, Any]:
    """Worker, source: a connection of its Endpoint `index`."""
    links.append((nodes[index], nodes[index].endpoint.connect(address, timeout=20)))
    return {}


def worker_accept(end: Any, index: int) -> dict[str, Any]:
    """Worker, destination: the next connection of its Endpoint `index`."""
    links.append((nodes[index], nodes[index].endpoint.accept(timeout=20)))
    return {}


def worker_ways(end: Any) -> dict[str, Any]:
    """Worker: by which backends its connections go."""
    return {"ways": sorted({conn.backend for _, conn in links})}


def worker_close(end: Any) -> dict[str, Any]:
    """Worker: close its Endpoints."""
    links.clear()
    while nodes:
        nodes.pop().endpoint.close()
    return {}


def star(count: int) -> Places:
    """Return the places where the destination has one Endpoint for all."""
    return [(i, 0) for i in range(count)]


def mesh(count: int) -> Places:
    """Return the places where each is connected with each, so that any first part is near a square."""
    side = math.isqrt(count - 1) + 1
    every = itertools.product(range(side), range(side))
    return sorted(every, key=lambda place: (max(place), place))[:count]


class Mesh:
    """The two workers of a pair with a growing number of connections."""

    def __init__(self, pair: Any, places: Places) -> None:
        self.src: WorkerProcess = pair.src
        self.dst: WorkerProcess = pair.dst
        self._places = places
        self._config = {**pair.config, **CONFIG}
        self._way = pair.way.kind
        self._addresses: list[str] = []
        self._sources = 0
        self.count = 0

    def grow(self, count: int) -> None:
        for source, destination in self._places[self.count : count]:
            while len(self._addresses) <= destination:
                made = self.dst.call("mesh.open", config=self._config, where="127.0.0.1:0")
                self._addresses.append(made["address"])
            while self._sources <= source:
                self.src.call("mesh.open", config=self._config, where="")
                self._sources += 1
            self.src.call("mesh.connect", index=source, address=self._addresses[destination])
            self.dst.call("mesh.accept", index=destination)
            self.count += 1
        for worker in (self.src, self.dst):
            if (ways := worker.call("mesh.ways")["ways"]) != [self._way]:
                raise WorkerError(f"connections go by {ways}, not all by {self._way}")

    def close(self) -> None:
        """Close all of them, the workers stay."""
        for worker in (self.src, self.dst):
            worker.call("mesh.close")
