"""The peers as participants: two workers in the peers' venv, one of them the initiator of every transfer.

Between their turns they are stopped (SIGSTOP): an idle NIXL agent spins on a whole core, which the others
need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.cases import LATENCY_BATCH, WARM_UP, Case
from bench.peers.setup import VENV_PYTHON
from bench.process import WorkerError, WorkerProcess
from bench.sample import Sample

UCX_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
MOONCAKE_QUEUES = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_LOG_LEVEL": "ERROR",
}
RUN_LIMIT_S = 150.0


@dataclass(frozen=True)
class Setup:
    """How a peer is run."""

    module: str
    operation: str
    env: Mapping[str, str] = field(default_factory=dict)
    open_arguments: Mapping[str, Any] = field(default_factory=dict)
    max_pieces: int = 1 << 30


SETUPS = {
    "nixl-read": Setup("bench.peers.nixl_worker", "READ"),
    "nixl-read-2t": Setup("bench.peers.nixl_worker", "READ", open_arguments={"num_threads": 2}),
    "nixl-tcp-write": Setup("bench.peers.nixl_worker", "WRITE", UCX_TCP),
    "nixl-tcp-read": Setup("bench.peers.nixl_worker", "READ", UCX_TCP),
    "mooncake-read": Setup("bench.peers.mooncake_worker", "READ", MOONCAKE_QUEUES, max_pieces=1_000_000),
    "mooncake-write": Setup("bench.peers.mooncake_worker", "WRITE", MOONCAKE_QUEUES, max_pieces=1_000_000),
}
DEFAULT = ("nixl-read", "nixl-tcp-write", "mooncake-read")


class Peer:
    """One peer in one set-up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._setup = SETUPS[name]
        self._workers: dict[str, WorkerProcess] = {}

    def supports(self, case: Case) -> bool:
        pieces = case.tensors * case.ids
        if case.sliced:
            pieces *= case.block_nbytes // case.row_nbytes
        return pieces <= self._setup.max_pieces

    def open(self, case: Case) -> None:
        try:
            for side in ("src", "dst"):
                worker = WorkerProcess(
                    f"{self.name} {side}", str(VENV_PYTHON), self._setup.module, env=self._setup.env
                )
                self._workers[side] = worker
                worker.start("allocate", case=case.name, side=side)
            for worker in self._workers.values():
                worker.read_reply()
            met = {
                side: worker.call("open", **self._setup.open_arguments)
                for side, worker in self._workers.items()
            }
            other = met["dst" if self._initiator is self._workers["src"] else "src"]
            self._initiator.call("connect", metadata=other["metadata"], address=other["address"])
        except BaseException:
            self.close()
            raise

    @property
    def _initiator(self) -> WorkerProcess:
        return self._workers["src" if self._setup.operation == "WRITE" else "dst"]

    @property
    def _target(self) -> WorkerProcess:
        return self._workers["dst" if self._setup.operation == "WRITE" else "src"]

    def run(self, case: Case, seed: int) -> Sample:
        count = LATENCY_BATCH if case.latency else 0
        destination = self._workers["dst"]
        if not count:  # as the raw limit and kvtransport: the same work once before it is measured
            self._initiator.call("run", RUN_LIMIT_S, operation=self._setup.operation, seed=seed + WARM_UP)
        destination.call("wipe")
        before = self._target.call("usage")["cpu_s"]
        do = "run_batch" if count else "run"
        reply = self._initiator.call(do, RUN_LIMIT_S, operation=self._setup.operation, seed=seed)
        used = self._target.call("usage")["cpu_s"] - before
        if wrong := destination.call("check", seed=seed, count=count)["wrong"]:
            raise WorkerError(f"{self.name}: {wrong} blocks of the destination hold wrong bytes")
        if count:
            return Sample.of_latencies(case.nbytes, reply["samples_us"])
        return Sample(case.nbytes, reply["seconds"], reply["cpu_s"] + used, True, reply["runs"])

    def pause(self) -> None:
        for worker in self._workers.values():
            worker.pause()

    def resume(self) -> None:
        for worker in self._workers.values():
            worker.resume()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers = {}
