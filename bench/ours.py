"""kvtransport as participants: two workers and a connection, or one worker with both ends (inproc)."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cases import WARM_UP, Case
from bench.process import WorkerError, WorkerProcess
from bench.sample import Sample
from bench.ways import PIN_ALL, PIN_MAIN, Way

SETTLE_S = 0.01  # what was posted has reached the other side


def two_cores() -> tuple[list[int], list[int]]:
    """Return the core of the source and the core of the destination; the same one where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[0]], [cores[-1] if len(cores) > 1 else cores[0]]


class Pair:
    """Two workers, `src` and `dst`, each with memory, Endpoint, pool and the connection between them."""

    def __init__(self, backend: str, case: Case, config: Mapping[str, Any], open_now: bool = True) -> None:
        self.backend = backend
        self.way = Way(backend)
        self.config = self.way.config(config, case)
        self._token = ""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.src = WorkerProcess(f"{backend} src", sys.executable, "bench.worker")
        try:
            self.dst = WorkerProcess(f"{backend} dst", sys.executable, "bench.worker")
        except BaseException:
            self.src.close()
            raise
        try:
            self.allocate(case)
            if open_now:
                self.open()
        except BaseException:
            self.close()
            raise

    def allocate(self, case: Case) -> None:
        for worker, side in ((self.src, "src"), (self.dst, "dst")):
            worker.start("allocate", case=case.name, side=side, mapped=self.way.mapped)
        for worker in (self.src, self.dst):
            worker.read_reply()

    def open(self) -> str:
        """Make Endpoints, pools, connection; return what the source's `explain` says."""
        for worker in (self.src, self.dst):
            worker.call("open", config=self.config)
        address = self.listen()
        explain: str = self.src.call("connect", address=address)["explain"]
        self.dst.call("accept")
        if self.way.reads:
            self._token = self.src.call("grant")["token"]
        return explain

    def listen(self) -> str:
        where = "127.0.0.1:0"
        if self.backend == "unix":
            self._folder = tempfile.TemporaryDirectory(prefix="kvt-bench-")
            where = f"unix:{Path(self._folder.name) / 'socket'}"
        address: str = self.dst.call("listen", where=where)["address"]
        return address

    def pin(self, main_only: bool) -> None:
        for worker, cpus in zip((self.src, self.dst), two_cores(), strict=True):
            worker.call("pin", cpus=cpus, main_only=main_only)

    def transfer(self, seed: int, timeout: float = 180.0) -> Sample:
        """Warm up as the raw limit does (other ids), then the same measured, bytes verified."""
        once = self._read_once if self.way.reads else self._once
        once(seed + WARM_UP, timeout)
        return once(seed, timeout)

    def _read_once(self, seed: int, timeout: float) -> Sample:
        """The destination reads; the source's Python has no part in it."""
        before = self.src.call("usage")["cpu_s"]
        read = self.dst.call("read", timeout, seed=seed, token=self._token)
        cpu = read["cpu_s"] + self.src.call("usage")["cpu_s"] - before
        self._check(read)
        return Sample(read["nbytes"], read["seconds"], cpu, True, read["runs"])

    def _once(self, seed: int, timeout: float) -> Sample:
        """The receive is posted first."""
        self.dst.start("receive", seed=seed)
        self.dst.read_reply(timeout)
        time.sleep(SETTLE_S)
        sent = self.src.call("send", timeout, seed=seed)
        received = self.dst.read_reply(timeout)
        self._check(received)
        cpu = sent["cpu_s"] + received["cpu_s"]
        return Sample(sent["nbytes"], sent["seconds"], cpu, True, received["runs"])

    def latencies(self, seed: int) -> Sample:
        """The same, LATENCY_BATCH times, one after the other, with the receives posted before the first send."""
        if self.way.reads:
            read = self.dst.call("read_batch", seed=seed, token=self._token)
            self._check(read)
            return Sample.of_latencies(read["nbytes"], read["samples_us"])
        self.dst.start("receive_batch", seed=seed)
        self.dst.read_reply()
        time.sleep(SETTLE_S)
        sent = self.src.call("send_batch", seed=seed)
        self._check(self.dst.read_reply())
        return Sample.of_latencies(sent["nbytes"], sent["samples_us"])

    def _check(self, reply: Mapping[str, Any]) -> None:
        _check(self.backend, reply)
        if self.way.shares and reply["backend"] != "shm":
            raise WorkerError(f"{self.backend}: the bytes went by {reply['backend']}, not through memory")

    def close(self) -> None:
        for worker in (self.src, self.dst):
            worker.close()
        if self._folder is not None:
            self._folder.cleanup()


class Ours:
    """One backend of kvtransport, between two processes."""

    def __init__(self, backend: str, config: Mapping[str, Any]) -> None:
        self.name = backend
        self._config = config
        self._pair: Pair | None = None

    def supports(self, case: Case) -> bool:
        return True

    def open(self, case: Case) -> None:
        self._pair = Pair(self.name, case, self._config)
        if case.name in PIN_ALL or case.name in PIN_MAIN:
            self._pair.pin(main_only=case.name in PIN_MAIN)

    def run(self, case: Case, seed: int) -> Sample:
        assert self._pair is not None
        return self._pair.latencies(seed) if case.latency else self._pair.transfer(seed)

    def pause(self) -> None:
        """Nothing: an idle connection sleeps, and stopping it would make the peer look dead."""

    def resume(self) -> None:
        """Nothing, see pause."""

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()
            self._pair = None


class OursInproc:
    """Both ends in one process."""

    name = "inproc"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._worker: WorkerProcess | None = None

    def supports(self, case: Case) -> bool:
        return True

    def open(self, case: Case) -> None:
        self._worker = WorkerProcess("inproc", sys.executable, "bench.worker", ["--inproc"])
        self._worker.call("open", case=case.name, config=Way("inproc").config(self._config))

    def run(self, case: Case, seed: int) -> Sample:
        assert self._worker is not None
        reply = self._worker.call("run_batch" if case.latency else "run", seed=seed)
        _check(self.name, reply)
        if case.latency:
            return Sample.of_latencies(reply["nbytes"], reply["samples_us"])
        return Sample(reply["nbytes"], reply["seconds"], reply["cpu_s"], True, reply["runs"])

    def pause(self) -> None:
        """Nothing: it sleeps."""

    def resume(self) -> None:
        """Nothing: it sleeps."""

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _check(name: str, reply: Mapping[str, Any]) -> None:
    if reply["wrong"]:
        raise WorkerError(f"{name}: {reply['wrong']} blocks of the destination hold wrong bytes")
