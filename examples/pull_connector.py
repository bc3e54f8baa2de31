"""kvtransport in an engine's pull-mode KV connector, shaped as vLLM's KVConnectorBase_V1. No engine is needed.

    python examples/pull_connector.py                    over shared memory, where this host allows it
    python examples/pull_connector.py --backends tcp

The router (this process) hands each request, as JSON with a token in it, to a prefill and to a decode engine, in
any order. An engine (a stand-in: pulling/engine.py) is a scheduler process and a worker process for each rank of
tensor parallelism. Here is the connector: what a scheduler and what a worker does about KV that is elsewhere.
Prefill's workers grant the blocks that they have computed; decode's read of them the heads that are theirs. Neither
side learns a block id or an address of the other's memory.

After each step a worker compares all of its KV memory with what it must hold (pulling/memory.py). The table says
what each scenario (pulling/scenarios.py) came to; the exit code is 0 only if all came out as they must.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pulling.engine import JSON, LIMIT_S
from pulling.memory import GROUPS, HEADS, Ids, Memory
from pulling.scenarios import run

import kvtransport as kvt


class SchedulerSide:
    """The connector in a scheduler: what its workers shall do. It has no KV memory and no Endpoint."""

    def __init__(self) -> None:
        self._meta: list[Any] = []

    def get_num_new_matched_tokens(self, request: JSON, num_computed_tokens: int) -> int:
        """Decode: how many tokens of full attention come from prefill, beyond the prefix that is here."""
        return int(request["tokens"]) - num_computed_tokens

    def request_queued(self, request: JSON) -> None:
        self._meta.append(("hold", request))

    def update_state_after_alloc(self, request: JSON, ids: Ids, positions: Ids) -> None:
        """Decode: blocks to load, and the place of each among those that prefill grants."""
        self._meta.append(("load", request, ids, positions))

    def request_aborted(self, request: JSON) -> None:
        self._meta.append(("abort", request))

    def request_finished(self, request: JSON, ids: Ids, ttl_s: float) -> bool:
        """Prefill has computed it. True: its blocks are free when the workers say so."""
        self._meta.append(("grant", request, ids, ttl_s))
        return True

    def request_preempted(self, request: JSON) -> None:
        self._meta.append(("revoke", request))

    def request_failed(self, request: JSON, reason: str) -> None:
        self._meta.append(("refuse", request, reason))

    def build_connector_meta(self) -> list[Any]:
        """JSON for the workers' `start_load_kv`."""
        meta, self._meta = self._meta, []
        return meta


@dataclass
class Source:
    """A prefill rank that has some heads of ours, and what was posted there for one request."""

    peer: kvt.Connection
    heads: slice  # ours
    src_heads: slice  # the same, as that rank counts them
    lease: kvt.Lease | None = None
    read: kvt.Transfer | None = None

    def let_go(self, token: str) -> None:
        """The owner need not keep it any longer for us. A read that succeeds has said so by itself."""
        if self.lease is None and (self.read is None or self.read.exception()):
            self.lease = self.peer.hold(token)
        if self.lease is not None:
            self.lease.release()


@dataclass
class Pull:
    """A request at decode."""

    request: JSON
    sources: list[Source]
    ids: Ids = field(default_factory=dict)
    positions: Ids = field(default_factory=dict)
    aborted: bool = False
    cut: bool = False  # aborted when bytes were moving

    def is_over(self) -> bool:
        if reads := [source.read for source in self.sources if source.read]:
            return all(read.done() for read in reads)
        return self.aborted or any(source.lease.done() for source in self.sources if source.lease)


class WorkerSide:
    """The connector in a worker. Nothing here waits: what is posted ends in the queue, tagged by its request."""

    def __init__(self, endpoint: kvt.Endpoint, memory: Memory) -> None:
        self._endpoint, self._memory = endpoint, memory
        self._queue = endpoint.completion_queue()
        self._grants: dict[str, kvt.Grant] = {}
        self._pulls: dict[str, Pull] = {}

    def fileno(self) -> int:
        """Readable when `get_finished` has something to tell: for an engine that has nothing to compute."""
        return self._queue.fileno()

    def start_load_kv(self, meta: list[Any]) -> None:
        for what, *given in meta:
            getattr(self, what)(*given)

    # prefill

    def grant(self, request: JSON, ids: Ids, ttl_s: float) -> None:
        """Open the blocks to the decode ranks that share heads with us. There is no more to do for them."""
        readers = max(1, len(request["decode"]) // len(request["prefill"]))
        options = {"readers": readers, "ttl_s": ttl_s, **self._named(request)}
        self._grants[request["id"]] = self._memory.pool.grant(ids, token=request["token"], **options)

    def revoke(self, request: JSON) -> None:
        """When it returns, the blocks may be rewritten. Decode may have let go, of another rank's word, already."""
        if grant := self._grants.get(request["id"]):
            grant.revoke()

    def refuse(self, request: JSON, reason: str) -> None:
        for where in request["decode"]:  # to a peer that is connected: the same connection
            self._endpoint.connect(where, wait=False).refuse(request["token"], reason)

    # decode

    def hold(self, request: JSON) -> None:
        """It queues: what prefill has granted it, or will grant, must not expire meanwhile."""
        for source in self._pull(request).sources:
            source.lease = source.peer.hold(request["token"], **self._awaited(request))

    def load(self, request: JSON, ids: Ids, positions: Ids) -> None:
        """Read into these blocks, perhaps before they are granted: of each prefill rank our heads that it has."""
        pull, pool, token = self._pull(request), self._memory.pool, request["token"]
        pull.ids, pull.positions = ids, positions
        for source in pull.sources:
            options = {"heads": source.heads, "src_heads": source.src_heads, **self._awaited(request)}
            source.read = source.peer.read_blocks(token, pool, ids, subset=positions, **options)

    def abort(self, request: JSON) -> None:
        """At any stage. Its blocks are free when `get_finished` tells its end, not before."""
        pull = self._pull(request)
        pull.aborted = True
        reads = [source.read for source in pull.sources if source.read]
        pull.cut = any(read.state != "posted" for read in reads)
        for read in reads:
            read.cancel()

    # both

    def get_finished(self) -> Iterator[JSON]:
        """Which grants and which loads have ended since the last call, and how."""
        touched = {handle.tag for handle in self._queue.poll()}
        touched |= {name for name, pull in self._pulls.items() if pull.aborted}
        for name in touched:
            if name in self._grants and self._grants[name].done():
                yield {"id": name, "of": "grant", "outcome": self._grants.pop(name).state}
            if name in self._pulls and self._pulls[name].is_over():
                yield {"id": name, "of": "load", **self._finish(self._pulls.pop(name))}

    def _finish(self, pull: Pull) -> JSON:
        """What became of each block: those that any rank lacks must be computed here."""
        errors, results, failed = [], [], {group: set[int]() for group in GROUPS}
        for source in pull.sources:
            source.let_go(pull.request["token"])
            handle = source.read or source.lease
            error: Any = handle.exception() if handle else None
            errors += [error] if error else []
            if source.read:
                where = pull.request["prompt"], pull.ids, pull.positions, source.heads
                self._memory.landed(*where, error, pull.cut)
                for group, states in error.blocks.items() if error else ():
                    failed[group] |= {block for block, state in states.items() if state != "sealed"}
                results += [] if error else [source.read.result()]
        outcome = type(errors[0]).__name__ if errors else "loaded"
        if pull.aborted:
            outcome = "too late" if results and not errors else "aborted"
        return {
            "outcome": outcome,
            "failed": {group: list(blocks) for group, blocks in failed.items()},
            "nbytes": sum(result.nbytes for result in results),
            "backends": [result.backend for result in results],
        }

    def _named(self, request: JSON) -> dict[str, Any]:
        """Where the handle goes when it has ended, and by what name."""
        return {"queue": self._queue, "tag": request["id"]}

    def _awaited(self, request: JSON) -> dict[str, Any]:
        """Whether the grant is still to come. Where it has come, and isn't there, it is no use to wait for it."""
        return {"wait_grant_s": 0 if request["prefilled"] else LIMIT_S, **self._named(request)}

    def _pull(self, request: JSON) -> Pull:
        if request["id"] not in self._pulls:
            self._pulls[request["id"]] = Pull(request, list(self._sources(request["prefill"])))
        return self._pulls[request["id"]]

    def _sources(self, ranks: list[str]) -> Iterator[Source]:
        """One rank of prefill, of whose heads ours are a part; or several, which fill one block together."""
        ours, count = self._memory.heads, HEADS // len(ranks)
        for start, where in zip(range(0, HEADS, count), ranks, strict=True):
            first, last = max(ours.start, start), min(ours.stop, start + count)
            if first < last:
                peer = self._endpoint.connect(where, wait=False)  # or the connection that there is
                heads = slice(first - ours.start, last - ours.start)
                yield Source(peer, heads, slice(first - start, last - start))

    # for the checks

    def sources(self, request: JSON) -> list[Source]:
        return self._pull(request).sources


def main() -> int:
    parser = argparse.ArgumentParser(description="a pull-mode KV connector, with prefill and decode engines")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="which may be used (default: the best)")
    return run((SchedulerSide, WorkerSide), parser.parse_args().backends)


if __name__ == "__main__":
    sys.exit(main())
