"""A stand-in for an inference engine: a scheduler process, a worker process for each rank, and pipes for JSON.

It allocates blocks, "computes" prompts, and calls the connector where an engine would. What it does besides is for
the checks: it can wait until a read has begun to move, or until prefill has heard what was posted.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import kvtransport as kvt
from pulling.memory import BLOCK_NBYTES, BLOCKS, HEADS, TOKENS, Ids, Memory

JSON = dict[str, Any]
LIMIT_S = 60.0
SHORT_S = 1.0
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # what a pipe says whose other end has closed


def tell(pipe: Pipe, said: object) -> None:
    pipe.send_bytes(json.dumps(said).encode())


def hear(pipe: Pipe) -> Any:
    return json.loads(pipe.recv_bytes())


class Scheduler:
    """Which blocks a request has, and what the workers do next. Its public methods are what the router may say."""

    def __init__(self, connector: Any, ranks: int) -> None:
        self._connector, self._ranks = connector, ranks
        self._free = list(range(BLOCKS))
        self._blocks: dict[str, Ids] = {}
        self._loading: dict[str, tuple[JSON, Ids]] = {}  # and the blocks' positions in their request
        self._prefixes: dict[int, list[int]] = {}  # by prompt: blocks of full attention that are here
        self._lost: set[str] = set()  # what prefill has granted them was lost while they queued
        self._reports: dict[tuple[str, str], list[JSON]] = {}
        self.steps: tuple[list[Any], list[Any]] = ([], [])  # of the workers: before and after the connector's

    # prefill

    def run(self, request: JSON, ttl_s: float = 30.0) -> None:
        ids, positions = self._allocate(request, 0)
        self.steps[0].append(("compute", request, ids, positions))
        self._connector.request_finished(request, ids, ttl_s)

    def run_short(self, request: JSON) -> None:
        self.run(request, SHORT_S)

    def fail(self, request: JSON) -> None:
        self._connector.request_failed(request, "out of memory")

    def revoke(self, request: JSON) -> None:
        self._connector.request_preempted(request)

    # decode

    def queue(self, request: JSON) -> None:
        self._connector.request_queued(request)

    def load(self, request: JSON) -> None:
        here = self._prefixes.get(request["prompt"], [])
        tokens = self._connector.get_num_new_matched_tokens(request, len(here) * TOKENS)
        ids, positions = self._allocate(request, request["full"] - tokens // TOKENS)
        if request["id"] in self._lost:
            self.steps[0].append(("compute", request, ids, positions))
        else:
            self._loading[request["id"]] = request, positions
            self._connector.update_state_after_alloc(request, ids, positions)

    def abort(self, request: JSON) -> str | None:
        """At any stage; of a request that is being decoded already the blocks are free at once."""
        if request["id"] in self._blocks and request["id"] not in self._loading:
            return self._release(request["id"], "freed")
        self._connector.request_aborted(request)
        return None

    def load_and_abort(self, request: JSON) -> None:
        self.load(request)
        self.steps[1].append(("abort_in_flight", request))

    def settle(self, request: JSON) -> None:
        self.steps[1].append(("settle", request))

    # both

    def finished(self, report: JSON) -> str | None:
        """A worker's report; what has come of it, once all workers have said theirs."""
        name, of = report["id"], report["of"]
        same = self._reports.setdefault((name, of), [])
        same.append(report)
        if len(same) < self._ranks:
            return None
        del self._reports[name, of]
        outcomes = [str(one["outcome"]) for one in same]
        good = ("loaded", "read")
        outcome = next((one for one in outcomes if one not in (*good, "too late")), outcomes[0])
        if of == "grant":
            return self._release(name, outcome)
        if of == "load":
            return self._loaded(name, outcome, same)
        return outcome

    def _loaded(self, name: str, outcome: str, reports: list[JSON]) -> str:
        request, positions = self._loading.pop(name, ({}, {}))
        if outcome in ("aborted", "too late"):
            return self._release(name, outcome)
        if not request:
            self._lost.add(name)
            return outcome
        ids = self._blocks[name]
        if outcome == "loaded":
            self._prefixes.setdefault(request["prompt"], ids["full"])
            nbytes, blocks = sum(one["nbytes"] for one in reports), sum(map(len, ids.values()))
            return outcome if nbytes == blocks * BLOCK_NBYTES else f"{nbytes} bytes for {blocks} blocks"
        # The blocks that any rank lacks are computed here.
        bad = {group: {block for one in reports for block in one["failed"][group]} for group in ids}
        pairs = {g: [p for p in zip(ids[g], positions[g], strict=True) if p[0] in bad[g]] for g in ids}
        again = [{group: [pair[n] for pair in pairs[group]] for group in ids} for n in (0, 1)]
        self.steps[0].append(("compute", request, *again))
        return outcome

    def _allocate(self, request: JSON, first: int) -> tuple[Ids, Ids]:
        """Blocks for all but the first of full attention, and their positions: those last freed come first."""
        positions = {"full": list(range(first, request["full"])), "window": list(range(request["window"]))}
        ids = {group: [self._free.pop() for _ in places] for group, places in positions.items()}
        self._blocks[request["id"]] = ids
        return ids, positions

    def _release(self, name: str, outcome: str) -> str:
        ids = self._blocks.pop(name, {})
        self._free += [block for blocks in ids.values() for block in blocks]
        self._prefixes = {p: here for p, here in self._prefixes.items() if here is not ids.get("full")}
        return outcome


def schedule(router: Pipe, workers: list[Pipe], make: Callable[[], Any]) -> None:
    """The scheduler's process, until the router is gone."""
    connector = make()
    scheduler = Scheduler(connector, len(workers))
    with contextlib.suppress(*GONE):
        tell(router, [hear(worker) for worker in workers])
        while True:
            ready = wait([router, *workers])
            for pipe in [one for one in (router, *workers) if one in ready]:
                said = hear(pipe)
                if pipe is router:
                    command, request = said
                    said, outcome = {"id": request["id"]}, getattr(scheduler, command)(request)
                else:
                    outcome = scheduler.finished(said)
                if outcome or pipe is not router:
                    tell(router, {**said, "outcome": outcome})
            steps = [scheduler.steps[0], connector.build_connector_meta(), scheduler.steps[1]]
            scheduler.steps = ([], [])
            for worker in workers if any(steps) else ():
                tell(worker, steps)


class Worker:
    """What a worker does besides: the model's forward pass, and what the scenarios want to be waited for."""

    def __init__(self, connector: Any, memory: Memory) -> None:
        self._connector, self._memory = connector, memory

    def compute(self, request: JSON, ids: Ids, positions: Ids) -> JSON:
        self._memory.compute(request["prompt"], ids, positions)
        return {"id": request["id"], "of": "compute", "outcome": "computed"}

    def settle(self, request: JSON) -> JSON:
        """Prefill's ranks have heard what was posted, and have answered."""
        for source in self._connector.sources(request):
            source.peer.send_message(b"settle").result(LIMIT_S)
        return {"id": request["id"], "of": "settle", "outcome": "settled"}

    def abort_in_flight(self, request: JSON) -> None:
        """While it is read: when the first layer has landed, and the others are on their way."""
        give_way()
        read = self._connector.sources(request)[0].read
        with contextlib.suppress(kvt.KVTransportError):
            read.wait_layer("full.0", timeout=LIMIT_S)
        self._connector.abort(request)


def give_way() -> None:
    """Have the threads that move bytes yield to this one: else, on few cores, all has landed when it gets its turn."""
    for thread in Path("/proc/self/task").iterdir():
        if "mover" in (thread / "comm").read_text():
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def work(
    pipe: Pipe, rank: int, ranks: int, make: Callable[..., Any], backends: tuple[str, ...] | None
) -> None:
    """A worker's process, until its scheduler is gone."""
    count = HEADS // ranks
    with contextlib.suppress(*GONE), kvt.Endpoint(kvt.Config(backends=backends)) as endpoint:
        endpoint.listen("127.0.0.1:0")
        memory = Memory(endpoint, range(rank * count, (rank + 1) * count))
        connector = make(endpoint, memory)
        worker = Worker(connector, memory)
        tell(pipe, endpoint.descriptor())
        while True:
            before, meta, after = hear(pipe) if pipe in wait([pipe, connector.fileno()]) else ([], [], [])
            reports = [getattr(worker, what)(*given) for what, *given in before]
            connector.start_load_kv(meta)
            reports += [getattr(worker, what)(*given) for what, *given in after]
            for report in [*filter(None, reports), *connector.get_finished()]:
                tell(pipe, {**report, "wrong": memory.wrong()})


class Engine:
    """One side, as the router sees it. ranks: of tensor parallelism."""

    def __init__(
        self,
        ranks: int,
        connector: tuple[Callable[[], Any], Callable[..., Any]],
        backends: tuple[str, ...] | None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        pipes = [context.Pipe() for _ in range(ranks)]
        scheduler, worker = connector
        start: list[tuple[Callable[..., None], tuple[Any, ...]]]
        start = [(schedule, (theirs, [ours for ours, _ in pipes], scheduler))]
        start += [(work, (pipe, n, ranks, worker, backends)) for n, (_, pipe) in enumerate(pipes)]
        self._processes = [context.Process(target=run, args=given, daemon=True) for run, given in start]
        for process in self._processes:
            process.start()
        for pipe in (theirs, *(end for pair in pipes for end in pair)):
            pipe.close()  # so that who is left alone reads the end of its pipe
        self.addresses: list[str] = self.hear()

    def tell(self, command: str, request: JSON) -> None:
        tell(self._pipe, (command, request))

    def hear(self) -> Any:
        if not self._pipe.poll(LIMIT_S):
            raise TimeoutError(f"the engine has said nothing for {LIMIT_S:.0f} s")
        return hear(self._pipe)

    def close(self) -> list[int | None]:
        """End the processes; their exit codes."""
        self._pipe.close()
        for process in self._processes:
            process.join(LIMIT_S)
        return [process.exitcode for process in self._processes]
