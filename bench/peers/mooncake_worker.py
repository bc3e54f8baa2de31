"""Mooncake's worker: its transfer engine over TCP with the peer-to-peer handshake, synchronous batches."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from mooncake.engine import TransferEngine

from bench import measure, protocol
from bench.cases import LATENCY_BATCH
from bench.peers.end import Indices, PeerEnd

HOST = "127.0.0.1"
# It returns -1, with no reason, for more than its queues hold (65,535 at most); a caller has to split.
PIECES_PER_CALL = 32_768


class MooncakeEnd(PeerEnd):
    """One transfer engine."""

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        self._peer = ""
        self._peer_base = 0

    def do_open(self) -> dict[str, Any]:
        self._engine = TransferEngine()
        _must(self._engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""), "initialize")
        _must(self._engine.register_memory(self.arena.address(), self.arena.data.nbytes), "register_memory")
        return {"metadata": f"{HOST}:{self._engine.get_rpc_port()}", "address": self.arena.address()}

    def do_connect(self, metadata: str, address: int) -> None:
        self._peer, self._peer_base = metadata, address

    def do_run(self, operation: str, seed: int) -> dict[str, Any]:
        lists = self._lists(self.run_ids(seed, self.side), self.run_ids(seed, self.other_side))
        cpu = measure.cpu_s()
        began = time.perf_counter()
        self._transfer(operation, *lists)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cpu_s": measure.cpu_s() - cpu, "runs": len(lists[0])}

    def do_run_batch(self, operation: str, seed: int, count: int = LATENCY_BATCH) -> dict[str, Any]:
        rows = zip(
            self.run_batch_ids(seed, self.side, count),
            self.run_batch_ids(seed, self.other_side, count),
            strict=True,
        )
        samples = []
        for ours, theirs in rows:
            lists = self._lists(ours, theirs)
            began = time.perf_counter()
            self._transfer(operation, *lists)
            samples.append((time.perf_counter() - began) * 1e6)
        return {"samples_us": samples}

    def _lists(self, ours: Indices, theirs: Indices) -> tuple[list[int], list[int], list[int]]:
        """Return local addresses, the peer's addresses, lengths."""
        here = self.descriptors(self.side, self.arena.address())
        there = self.descriptors(self.other_side, self._peer_base)
        local = here.addresses(here.of(ours)).tolist()
        return local, there.addresses(there.of(theirs)).tolist(), [here.nbytes] * len(local)

    def _transfer(self, operation: str, local: list[int], remote: list[int], lengths: list[int]) -> None:
        call = self._engine.batch_transfer_sync_read
        if operation == "WRITE":
            call = self._engine.batch_transfer_sync_write
        for first in range(0, len(local), PIECES_PER_CALL):
            part = slice(first, first + PIECES_PER_CALL)
            code = call(self._peer, local[part], remote[part], lengths[part])
            _must(code, f"{operation} of {len(local[part])} pieces")


def _must(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"Mooncake: {what} returned {code}")


def main() -> None:
    end = MooncakeEnd()
    protocol.serve(lambda name: getattr(end, f"do_{name}"))
    sys.stderr.flush()
    os._exit(0)  # its destructors wait for threads that wait for it


if __name__ == "__main__":
    main()
