"""Side: what a check tells one end of a connection to do, in this process or in another one.

Here: the calls, and how they get there. Not here: what they do (`actor`).

Invariant: a call returns, or raises, what the same call of the public API does, wherever the side lives.
"""

from __future__ import annotations

import abc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from kvtransport.testing.actor import LIMIT_S, Actor, error_from_json
from kvtransport.testing.blocks import Blocks, Bytes, digests


class Side(abc.ABC):
    """One end. Pools, gates and handles go by names; a transfer's key is its handle's name unless `key=` is given."""

    name = "side"
    allocates = False
    """Whether its pools lie in memory of `Endpoint.allocate`, which others may map; else in arrays of numpy's."""
    names_readers = False
    """Whether its grants are for the peer alone where the check doesn't say whom for."""

    @abc.abstractmethod
    def call(self, command: str, **arguments: Any) -> Any:
        """Run a command of `Actor`."""

    def pool(self, name: str, blocks: Blocks, **options: Any) -> None:
        """Make memory and register it. form: a layout's fields; groups: {name: places of its layers}."""
        self.call("pool", name=name, blocks=blocks.to_json(), allocated=self.allocates, **options)

    def fill(self, name: str, blocks: Blocks, value: int) -> None:
        """Rewrite every block of a pool."""
        self.call("fill", name=name, blocks=blocks.to_json(), value=value)

    def send(
        self,
        handle: str,
        pool: str,
        ids: Iterable[int],
        *,
        gate: str | None = None,
        meta: bytes = b"",
        **options: Any,
    ) -> None:
        """Connection.send_blocks."""
        options.setdefault("key", handle)
        self.call("send", handle=handle, pool=pool, ids=list(ids), gate=gate, meta=meta.hex(), **options)

    def recv(self, handle: str, pool: str, ids: Iterable[int], *, meta: bytes = b"", **options: Any) -> None:
        """Connection.recv_blocks."""
        options.setdefault("key", handle)
        self.call("recv", handle=handle, pool=pool, ids=list(ids), meta=meta.hex(), **options)

    def grant(self, handle: str, pool: str, ids: Any, **options: Any) -> str:
        """BlockPool.grant; return its token. to: "peer", or an incarnation in hexadecimal digits."""
        if self.names_readers:
            options.setdefault("to", "peer")
        return str(self.call("grant", handle=handle, pool=pool, ids=plain(ids), **options))

    def read(self, handle: str, token: str, pool: str, ids: Any, **options: Any) -> None:
        """Connection.read_blocks. heads, src_heads: [first, last + 1]."""
        self.call("read", handle=handle, token=token, pool=pool, ids=plain(ids), **options)

    def write(
        self,
        handle: str,
        token: str,
        pool: str,
        ids: Any,
        *,
        gate: str | None = None,
        meta: bytes = b"",
        **options: Any,
    ) -> None:
        """Connection.write_blocks. heads, dst_heads: [first, last + 1]."""
        named = {"handle": handle, "token": token, "pool": pool, "gate": gate, "meta": meta.hex()}
        self.call("write", ids=plain(ids), **named, **options)

    def hold(self, handle: str, token: str, **options: Any) -> None:
        """Connection.hold."""
        self.call("hold", handle=handle, token=token, **options)

    def held(self, handle: str) -> None:
        """Wait until the owner has said that the lease is held."""
        deadline = time.monotonic() + LIMIT_S
        while not self.call("held", handle=handle):
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {handle} isn't held after {LIMIT_S} s")

    def release(self, handle: str) -> None:
        """Lease.release()."""
        self.call("release", handle=handle)

    def revoke(self, handle: str, **options: Any) -> None:
        """Grant.revoke."""
        self.call("revoke", handle=handle, **options)

    def reuse(self, pool: str, ids: Any) -> None:
        """BlockPool.reuse."""
        self.call("reuse", pool=pool, ids=plain(ids))

    def result(self, handle: str) -> dict[str, Any]:
        """Return the result's fields, or raise the handle's error."""
        return dict(self.call("result", handle=handle))

    def results(self, handles: Iterable[str]) -> None:
        """Raise the first error of several."""
        self.call("results", handles=list(handles))

    def error(self, handle: str, timeout: float = LIMIT_S) -> Any:
        """Wait until it is over; return the error that it ended with, None where it succeeded."""
        plain = self.call("error", handle=handle, timeout=timeout)
        return None if plain is None else error_from_json(plain)

    def state(self, handle: str) -> str:
        """Transfer.state, Grant.state."""
        return str(self.call("state", handle=handle))

    def matched(self, handle: str) -> None:
        """Wait until it has a partner: until then, its end is nothing to the other side."""
        deadline = time.monotonic() + LIMIT_S
        while self.state(handle) == "posted":
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {handle} has no partner after {LIMIT_S} s")

    def done(self, handle: str) -> bool:
        """Handle.done()."""
        return bool(self.call("done", handle=handle))

    def progress(self, handle: str) -> tuple[int, int]:
        """Transfer.progress()."""
        moved, total = self.call("progress", handle=handle)
        return moved, total

    def cancel(self, handle: str) -> None:
        """Transfer.cancel()."""
        self.call("cancel", handle=handle)

    def wait_layer(self, handle: str, layer: int) -> None:
        """Transfer.wait_layer."""
        self.call("wait_layer", handle=handle, layer=layer)

    def gate(self, name: str, layers: int) -> None:
        """Endpoint.layer_gate."""
        self.call("gate", name=name, layers=layers)

    def mark(self, name: str, layer: int) -> None:
        """LayerGate.mark_ready."""
        self.call("mark", name=name, layer=layer)

    def message(self, handle: str, data: bytes, after: str | None = None) -> None:
        """Connection.send_message."""
        self.call("message", handle=handle, data=data.hex(), after=after)

    def messages(self, count: int) -> list[bytes]:
        """Return the next messages that have come, in order; waits for `count`."""
        return [bytes.fromhex(data) for data in self.call("messages", count=count)]

    def holds(self, pool: str, expected: list[Bytes]) -> None:
        """Assert that a pool's memory is this, byte for byte, the bytes around its blocks included."""
        found = self.call("digests", name=pool)
        wrong = [
            at for at, (is_, must) in enumerate(zip(found, digests(expected), strict=True)) if is_ != must
        ]
        if wrong:
            raise AssertionError(
                f"{self.name}, pool {pool!r}: layers {wrong} hold other bytes than were sent"
            )

    @abc.abstractmethod
    def end(self) -> None:
        """Let go of what the side itself needs. The last call."""


class LocalSide(Side):
    """A side in this process: `actor` has its objects."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.actor = Actor()

    def call(self, command: str, **arguments: Any) -> Any:
        """Run it here."""
        return self.actor.do(command, arguments)

    def end(self) -> None:
        """Nothing: what it has are the actor's objects."""


class ProcessSide(Side):
    """A side in a process of its own.

    program: what Python runs there: `kvtransport.testing.worker`, or what calls its `main` with more commands.
    """

    program: tuple[str, ...] = ("-m", "kvtransport.testing.worker")

    def __init__(self, name: str) -> None:
        self.name = name
        self._children: list[int] = []
        self._killed = False
        self._process = subprocess.Popen(
            [sys.executable, *self.program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return not self._killed and self._process.poll() is None

    def call(self, command: str, **arguments: Any) -> Any:
        """Write the command; wait for the answer."""
        self.ask(command, **arguments)
        return self.answer(command)

    def ask(self, command: str, **arguments: Any) -> None:
        """Write the command; `answer` has to follow, unless the process is killed."""
        pipe = self._process.stdin
        assert pipe is not None  # for the type checker
        line = memoryview(json.dumps({"command": command, "arguments": arguments}).encode() + b"\n")
        while line:
            line = line[pipe.write(line) or 0 :]

    def answered(self) -> bool:
        """Whether something of the answer has come."""
        pipe = self._process.stdout
        assert pipe is not None  # for the type checker
        return bool(select.select([pipe], [], [], 0)[0])

    def answer(self, command: str) -> Any:
        """Return the value that came, or raise the error."""
        pipe = self._process.stdout
        assert pipe is not None  # for the type checker
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], 3 * LIMIT_S)[0]:
                raise AssertionError(f"{self.name}: no answer to {command} in {3 * LIMIT_S} s")
            came = os.read(pipe.fileno(), 1 << 16)
            if not came:
                raise AssertionError(f"{self.name}: its process ended with {self._process.wait(LIMIT_S)}")
            self._rest += came
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise error_from_json(answer["error"])
        return answer["value"]

    def fork(self) -> None:
        """Have it fork a child that lives until `end`."""
        self._children.append(self.call("fork"))

    def kill(self) -> None:
        """SIGKILL to the process, not to its children."""
        self._killed = True
        self._process.kill()

    def end(self) -> None:
        """End the process and its children."""
        self.kill()
        self._process.wait(LIMIT_S)
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def plain(ids: Any) -> Any:
    """Return block ids as JSON has them."""
    if ids is None or isinstance(ids, dict):
        return ids
    return list(ids)
