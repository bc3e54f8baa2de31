"""NIXL's worker: prepared descriptor lists, as vLLM's connector makes them, then a request by index for
each run.

The wheel may crash when the interpreter ends, so the worker leaves by os._exit.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from typing import Any

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config

from bench import measure, protocol
from bench.cases import LATENCY_BATCH
from bench.peers.end import Descriptors, Indices, PeerEnd

LIMIT_S = 120.0


class NixlEnd(PeerEnd):
    """One agent."""

    def __init__(self) -> None:
        super().__init__()
        self._agent: Any = None
        self._registered: Any = None
        self._local: Any = None
        self._remote: Any = None
        self._lists: tuple[Descriptors, Descriptors] | None = None

    def do_open(self, num_threads: int = 0) -> dict[str, Any]:
        config = nixl_agent_config(num_threads=num_threads, backends=["UCX"])
        self._agent = nixl_agent(f"bench-{os.getpid()}", config)
        region = [(self.arena.address(), self.arena.data.nbytes, 0, "")]
        self._registered = self._agent.register_memory(region, "DRAM")
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"metadata": metadata, "address": self.arena.address()}

    def do_connect(self, metadata: str, address: int) -> None:
        """Initiator: learn of the other agent, and prepare a list of every piece on each side."""
        peer = self._agent.add_remote_agent(base64.b64decode(metadata))
        if isinstance(peer, bytes):
            peer = peer.decode()
        ours = self.descriptors(self.side, self.arena.address())
        theirs = self.descriptors(self.other_side, address)
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _table(ours), "DRAM")
        self._remote = self._agent.prep_xfer_dlist(peer, _table(theirs), "DRAM")
        self._lists = (ours, theirs)

    def do_run(self, operation: str, seed: int) -> dict[str, Any]:
        """Initiator: move one run. The time is what a caller sees, from making the request to DONE."""
        local, remote = self._indices(self.run_ids(seed, self.side), self.run_ids(seed, self.other_side))
        cpu = measure.cpu_s()
        began = time.perf_counter()
        self._transfer(operation, local, remote)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "cpu_s": measure.cpu_s() - cpu, "runs": len(local)}

    def do_run_batch(self, operation: str, seed: int, count: int = LATENCY_BATCH) -> dict[str, Any]:
        rows = zip(
            self.run_batch_ids(seed, self.side, count),
            self.run_batch_ids(seed, self.other_side, count),
            strict=True,
        )
        samples = []
        for ours, theirs in rows:
            local, remote = self._indices(ours, theirs)
            began = time.perf_counter()
            self._transfer(operation, local, remote)
            samples.append((time.perf_counter() - began) * 1e6)
        return {"samples_us": samples}

    def _indices(self, ours: Indices, theirs: Indices) -> tuple[Any, Any]:
        assert self._lists is not None
        local, remote = self._lists[0].of(ours), self._lists[1].of(theirs)
        return local.astype(np.int32), remote.astype(np.int32)

    def _transfer(self, operation: str, local: Any, remote: Any) -> None:
        handle = self._agent.make_prepped_xfer(operation, self._local, local, self._remote, remote)
        state = self._agent.transfer(handle)
        deadline = time.monotonic() + LIMIT_S
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
            if state == "PROC" and time.monotonic() > deadline:
                raise TimeoutError(f"NIXL: not done after {LIMIT_S:.0f} s")
        if state != "DONE":
            raise RuntimeError(f"NIXL: {state}")
        self._agent.release_xfer_handle(handle)


def _table(descriptors: Descriptors) -> Any:
    every = descriptors.every()
    table = np.zeros((len(every), 3), dtype=np.uint64)
    table[:, 0] = descriptors.addresses(every)
    table[:, 1] = descriptors.nbytes
    return table


def main() -> None:
    end = NixlEnd()
    protocol.serve(lambda name: getattr(end, f"do_{name}"))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
