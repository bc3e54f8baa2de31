"""(h) Requests of 1 to 256 blocks at 70 % of R2, Poisson, from 4 senders to 4 receivers.

The four Endpoints of a side share a process and its memory, each is connected with each of the other side's: on a
machine of few cores eight processes would measure the scheduler. In each process one thread posts what is due and
takes what is done; it sleeps in between.

A round: R2, each class alone on the idle link, the crowd, and then every byte of the receivers' memory, which holds
what the last request brought there. So load and slowdown are ratios inside a round.
"""

from __future__ import annotations

import select
import time
from dataclasses import dataclass, field
from typing import Any

from bench import measure, raw_limits
from bench.arrivals import CLASSES, ENDS, LARGE, Request, Room, alone, crowd, slowdowns, source_ids
from bench.cases import Ids, case_of
from bench.process import WorkerError
from bench.rows import Row
from bench.special.context import Context, titled
from bench.special.mesh import Mesh, links, nodes

LOAD = 0.7
SAMPLES = 500
EACH = 50  # requests of each class in a round
ALONE, ALONE_WARM_UPS = 12, 2
LIMIT_RUNS = 3
START_S = 0.3  # from the command to the begin of its plan: both sides have made it by then
QUIET_S = 30.0

_room: Room | None = None


class _Player:
    """One side of a plan: posts requests when they are due, and takes what has finished."""

    def __init__(self, plan: list[Request], seed: int) -> None:
        self.plan = plan
        self.sources = [source_ids(seed, request) for request in plan]
        self.seed = seed
        self.queues = [node.endpoint.completion_queue() for node in nodes]

    def play(self, start_s: float) -> None:
        due = over = 0
        while over < len(self.plan):
            now = time.monotonic() - start_s
            while due < len(self.plan) and self.plan[due].at_s <= now:
                self.post(self.plan[due])
                due += 1
            left = max(0.0, self.plan[due].at_s - now) if due < len(self.plan) else QUIET_S
            ready = select.select(self.queues, [], [], left)[0]
            if not ready and left >= QUIET_S:
                raise TimeoutError(f"{len(self.plan) - over} requests are unfinished, and nothing comes")
            for queue in ready:
                for handle in queue.poll():
                    self.ended(handle, time.monotonic() - start_s)
                    over += 1

    def post(self, request: Request) -> None:
        """Post this side of a request that is due."""
        raise NotImplementedError

    def ended(self, handle: Any, now_s: float) -> None:
        """Take a handle that is done. Raises its error."""
        raise NotImplementedError

    def begin(self, request: Request, ids: Ids, side: str) -> None:
        node, conn = links[request.sender * ENDS + request.receiver]
        call = conn.send_blocks if side == "src" else conn.recv_blocks
        queue = self.queues[request.sender if side == "src" else request.receiver]
        call(node.pool, ids, key=f"h-{self.seed}-{request.index}", queue=queue, tag=(request, ids))


class _Sender(_Player):
    """Its latencies are the case's: from when a request was planned to the destination's word."""

    def __init__(self, plan: list[Request], seed: int) -> None:
        super().__init__(plan, seed)
        self.took_us = [0.0] * len(plan)

    def post(self, request: Request) -> None:
        self.begin(request, self.sources[request.index], "src")

    def ended(self, handle: Any, now_s: float) -> None:
        request = handle.tag[0]
        handle.result(0)
        self.took_us[request.index] = (now_s - request.at_s) * 1e6


class _Receiver(_Player):
    """Finds room for what comes."""

    def __init__(self, plan: list[Request], seed: int, room: Room) -> None:
        super().__init__(plan, seed)
        self._room = room
        self.waited = 0

    def post(self, request: Request) -> None:
        before = self._room.waiting()
        self._room.enter(request)
        self._admit()
        self.waited += self._room.waiting() - before

    def ended(self, handle: Any, now_s: float) -> None:
        request, ids = handle.tag
        handle.result(0)
        self._room.leave(ids, self.sources[request.index])
        self._admit()

    def _admit(self) -> None:
        while (admitted := self._room.admit()) is not None:
            self.begin(*admitted, "dst")


def _plan(seed: int, blocks: int, count: int, rate: float) -> list[Request]:
    """Return the plan of a command: `blocks` 0 is the crowd, with `count` of each class."""
    return alone(blocks, count, rate) if blocks else crowd(seed, count, rate)


def worker_send(
    end: Any, start_s: float, seed: int, blocks: int, count: int, nbytes_per_s: float
) -> dict[str, Any]:
    """Worker, source: play a plan; the time of each request."""
    sender = _Sender(_plan(seed, blocks, count, nbytes_per_s), seed)
    sender.play(start_s)
    return {"took_us": sender.took_us}


def worker_receive(
    end: Any, start_s: float, seed: int, blocks: int, count: int, nbytes_per_s: float
) -> dict[str, Any]:
    """Worker, destination: the same plan."""
    global _room
    _room = _room or Room(0)
    receiver = _Receiver(_plan(seed, blocks, count, nbytes_per_s), seed, _room)
    receiver.play(start_s)
    return {"waited": receiver.waited}


def worker_check(end: Any) -> dict[str, Any]:
    """Worker, destination: every byte of the memory that all receivers share."""
    assert _room is not None
    return {"wrong": end.arena.wrong_blocks(*_room.contents())}


@dataclass
class _Record:
    """What all rounds gave."""

    loaded_us: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in CLASSES})
    alone_us: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in CLASSES})
    limit_gb_s: list[float] = field(default_factory=list)
    took: list[list[float]] = field(default_factory=list)
    plans: list[list[Request]] = field(default_factory=list)
    bases: list[dict[int, float]] = field(default_factory=list)
    waited: int = 0

    def add(self, plan: list[Request], took_us: list[float], lone: dict[int, list[float]]) -> None:
        for us, request in zip(took_us, plan, strict=True):
            self.loaded_us[request.blocks].append(us)
        for blocks, values in lone.items():
            self.alone_us[blocks] += values
        self.plans.append(plan)
        self.took.append(took_us)
        self.bases.append({blocks: measure.median(values) for blocks, values in lone.items()})

    def enough(self) -> bool:
        return min(map(len, self.loaded_us.values())) >= SAMPLES

    def slowdowns(self) -> list[float]:
        """Of each sender, the mean over its requests."""
        return list(slowdowns(self.took, self.plans, self.bases).values())


def _played(pair: Any, seed: int, blocks: int, count: int, nbytes_per_s: float) -> tuple[list[float], int]:
    """Have both sides play a plan; return the time of each request, and how many had to wait for room."""
    plan = {"seed": seed, "blocks": blocks, "count": count, "nbytes_per_s": nbytes_per_s}
    start_s = time.monotonic() + START_S
    pair.dst.start("crowd.receive", start_s=start_s, **plan)
    took_us: list[float] = pair.src.call("crowd.send", start_s=start_s, **plan)["took_us"]
    return took_us, pair.dst.read_reply()["waited"]


def _round(pair: Any, limit: raw_limits.Limit, turn: int, record: _Record) -> None:
    rate = measure.median(
        [limit.run(case_of("a"), turn * LIMIT_RUNS + i + 1).rate for i in range(LIMIT_RUNS)]
    )
    record.limit_gb_s.append(rate)
    nbytes_per_s = rate * 1e9
    first = turn * (len(CLASSES) + 1)
    lone = {
        blocks: _played(pair, first + i, blocks, ALONE, nbytes_per_s)[0][ALONE_WARM_UPS:]
        for i, blocks in enumerate(CLASSES)
    }
    seed = first + len(CLASSES)
    took_us, waited = _played(pair, seed, 0, EACH, LOAD * nbytes_per_s)
    record.waited += waited
    record.add(crowd(seed, EACH, LOAD * nbytes_per_s), took_us, lone)
    if wrong := pair.dst.call("crowd.check")["wrong"]:
        raise WorkerError(f"{wrong} blocks hold wrong bytes")


def measure_rows(context: Context, backend: str = "tcp") -> list[Row]:
    record = _Record()
    program = raw_limits.LimitsProgram()
    try:
        with context.pair("h", backend, open_now=False) as pair:
            group = Mesh(pair, [(sender, receiver) for sender in range(ENDS) for receiver in range(ENDS)])
            group.grow(ENDS * ENDS)
            limit = raw_limits.Limit(raw_limits.R2, program)
            limit.open(case_of("a"))
            turn = 0
            while not record.enough():
                context.progress.step(f"(h): round {turn + 1}/{-(-SAMPLES // EACH)}")
                _round(pair, limit, turn, record)
                turn += 1
            group.close()
    finally:
        program.close()
    return _rows(context, record, backend)


def measure_shm(context: Context) -> list[Row]:
    return measure_rows(context, "shm")


def _rows(context: Context, record: _Record, backend: str) -> list[Row]:
    rate = measure.median(record.limit_gb_s)
    each = record.slowdowns()
    context.details[titled("crowd", backend)] = {
        "load": LOAD,
        "R2_gb_s": record.limit_gb_s,
        "loaded_us": record.loaded_us,
        "alone_us": record.alone_us,
        "slowdown_of_senders": each,
        "jain": measure.jain(each),
        "waited_for_room": record.waited,
    }
    rows = []
    case = titled("(h)", backend)
    for blocks in CLASSES:
        loaded, lone = record.loaded_us[blocks], record.alone_us[blocks]
        p50, p99 = (measure.percentile(loaded, q) / 1000 for q in (0.5, 0.99))
        shown = f"{p50:.2f} / {p99:.2f} ms (alone {measure.median(lone) / 1000:.2f})"
        name = f"{case} {blocks} block{'s' if blocks > 1 else ''} at {LOAD:.0%} of R2 ({rate:.1f} GB/s), p50 / p99"
        rows.append(Row(name, shown, "reported", None))
    senders = ", ".join(f"{value:.2f}" for value in each)
    name = f"{case} Jain's index of the senders' mean slowdown"
    rows.append(Row(name, f"{measure.jain(each):.3f} ({senders})", "reported", None))
    if record.waited:
        name = f"{case} requests of {LARGE} blocks and more that waited for free blocks"
        rows.append(Row(name, f"{record.waited} of {sum(map(len, record.took))}", "reported", None))
    return rows
