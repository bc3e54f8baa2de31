"""The harness's end of the workers: start a process, call it, pause it, end it. Nothing here waits without
a limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TIMEOUT_S = 180.0


class WorkerError(RuntimeError):
    """A worker failed, ended, or did not answer in time."""


class LineProcess:
    """A child process that reads and writes lines of JSON. A context manager: leaves no process behind."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._buffer = b""
        self._child = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    def write_line(self, line: str) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None

    def read_reply(self, timeout: float = DEFAULT_TIMEOUT_S) -> dict[str, Any]:
        """Return the next line's object. WorkerError: it says so itself, has ended, or says nothing."""
        assert self._child.stdout is not None
        fd = self._child.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise self._failure(f"gave no answer within {timeout:.0f} s")
            data = os.read(fd, 1 << 20)
            if not data:
                raise self._failure("has ended")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        if not reply.get("ok"):
            raise WorkerError(f"{self.name}: {reply.get('error')}\n{reply.get('trace', '')}".rstrip())
        return reply

    def pause(self) -> None:
        """Stop it where it is: a participant that spins would eat the others' core."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it: kindly, then not. Idempotent."""
        self.resume()
        with contextlib.suppress(OSError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10)
        assert self._child.stdout is not None
        self._child.stdout.close()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._child.poll() is None:
            self._child.send_signal(number)

    def _failure(self, what: str) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(0.5)
        code = self._child.poll()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-12:]
        status = "" if code is None else f" (exit status {code})"
        return WorkerError("\n".join([f"{self.name}: {what}{status}", *tail]))

    def __enter__(self) -> LineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WorkerProcess(LineProcess):
    """A process that runs `bench.protocol.serve`."""

    def __init__(
        self,
        name: str,
        python: str,
        module: str,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, [python, "-m", module, *args], env)
        try:
            self.read_reply(60)
        except WorkerError:
            self.close()
            raise

    def start(self, do: str, **arguments: Any) -> None:
        """Send a command; its replies are fetched by `read_reply`."""
        self.write_line(json.dumps({"do": do, **arguments}))

    def call(self, do: str, timeout: float = DEFAULT_TIMEOUT_S, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its (first) reply."""
        self.start(do, **arguments)
        return self.read_reply(timeout)
