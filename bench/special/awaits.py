"""200 awaits on one loop, 100 of them cancelled at random, their blocks rewritten at once.

Looked for: a byte of a cancelled transfer in a block that was rewritten after the await ended; a task that
is left over; a callback of the package that keeps the loop busy.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.cases import Ids, batch_ids
from bench.rows import Row
from bench.special.context import Context

COUNT, CANCELLED = 200, 100
CANARY = np.uint8(0xEE)
SETTLE_S = 0.3
CALLBACK_MS = 5.0


class CallbackTimes:
    """Times every callback of the running loop, in CPU time of this thread; `ours` are the package's own."""

    def __init__(self) -> None:
        self.ours_s = 0.0
        self.all_s = 0.0
        self._run = asyncio.events.Handle._run

    def __enter__(self) -> CallbackTimes:
        run = self._run

        def timed(handle: Any) -> None:
            callback = getattr(handle, "_callback", None)
            began = time.thread_time()
            run(handle)
            used = time.thread_time() - began
            self.all_s = max(self.all_s, used)
            function = getattr(callback, "__func__", getattr(callback, "func", callback))
            if str(getattr(function, "__module__", "")).startswith("kvtransport"):
                self.ours_s = max(self.ours_s, used)

        asyncio.events.Handle._run = timed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.events.Handle._run = self._run  # type: ignore[method-assign]


class Receiver:
    """The destination: one task for each transfer."""

    def __init__(self, end: Any, seed: int) -> None:
        self.end = end
        self.ids: Ids = batch_ids(end.case, seed, "dst", COUNT)
        self.source: Ids = batch_ids(end.case, seed, "src", COUNT)
        self.landed: list[int] = []
        self.rewritten: list[int] = []
        self.transfers = [end.post(self.ids[i], f"await-{seed}-{i}") for i in range(COUNT)]

    async def one(self, i: int) -> None:
        try:
            await self.transfers[i]
        except asyncio.CancelledError:
            # The await has ended, so the block is ours again: whoever writes there now is wrong.
            self.end.arena.tensors[:, self.ids[i]] = CANARY
            self.rewritten.append(i)
            raise
        self.landed.append(i)

    async def all(self, seed: int) -> int:
        chosen = random.Random(seed)
        tasks = [asyncio.create_task(self.one(i)) for i in range(COUNT)]
        for i in chosen.sample(range(COUNT), CANCELLED):
            await asyncio.sleep(chosen.choice((0.0, 0.0002, 0.001)))
            tasks[i].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        await asyncio.sleep(SETTLE_S)
        return len(asyncio.all_tasks()) - 1

    def foreign_blocks(self) -> int:
        tensors = self.end.arena.tensors
        changed = int((tensors[:, self.ids[self.rewritten].ravel()] != CANARY).any(axis=2).sum())
        # What was neither received nor rewritten would count as touched: there is none of it.
        tensors[:, self.ids[self.rewritten].ravel()] = 0
        landed = self.landed
        wrong: int = self.end.arena.wrong_blocks(self.source[landed].ravel(), self.ids[landed].ravel())
        return changed + wrong


def worker_receive(end: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Worker, destination: post all, say so, await and cancel."""
    end.arena.wipe()
    receiver = Receiver(end, seed)
    yield {}
    with CallbackTimes() as times:
        orphans = asyncio.run(receiver.all(seed))
    yield {
        "foreign": receiver.foreign_blocks(),
        "orphans": orphans,
        "landed": len(receiver.landed),
        "cancelled": len(receiver.rewritten),
        "ours_ms": times.ours_s * 1e3,
        "all_ms": times.all_s * 1e3,
    }


def worker_send(end: Any, seed: int) -> dict[str, Any]:
    """Worker, source: send all; some of the others will have been cancelled."""
    ids = batch_ids(end.case, seed, "src", COUNT)
    transfers = [end.post(ids[i], f"await-{seed}-{i}", match_timeout_s=5) for i in range(COUNT)]
    outcomes: dict[str, int] = {}
    for transfer in transfers:
        try:
            transfer.result(timeout=30)
            name = "done"
        except Exception as failure:
            name = type(failure).__name__
        outcomes[name] = outcomes.get(name, 0) + 1
    return {"outcomes": outcomes}


def measure_rows(context: Context) -> list[Row]:
    foreign = orphans = landed = cancelled = 0
    callback_ms = 0.0
    with context.pair("b") as pair:
        for turn in range(context.rounds):
            context.progress.step(f"200 awaits: round {turn + 1}/{context.rounds}")
            pair.dst.call("awaits.receive", seed=turn + 1)
            pair.src.start("awaits.send", seed=turn + 1)
            reply = pair.dst.read_reply()
            pair.src.read_reply()
            foreign, orphans = foreign + reply["foreign"], orphans + reply["orphans"]
            landed, cancelled = landed + reply["landed"], cancelled + reply["cancelled"]
            callback_ms = max(callback_ms, reply["ours_ms"])
            context.details.setdefault("awaits", []).append(reply)
    shown = f"{foreign} foreign blocks, {orphans} orphans ({landed} landed, {cancelled} cancelled)"
    name = "200 awaits on one loop, 100 cancelled"
    return [
        Row(name, shown, "0 and 0", foreign == 0 and orphans == 0, broken=foreign != 0),
        Row.at_most("the same: longest callback of ours", callback_ms, CALLBACK_MS, "ms"),
    ]
