"""The process of the test of F25: two endpoints' processes, and every wait with a limit, while the wall clock jumps.

Run with the shim `clock` preloaded. Prints JSON: what each wait took beside what it should have taken, by the monotonic
clock; how a transfer ended that was there all the time; by how much the wall clock was seen to run ahead of the other.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import kvtransport as kvt
from kvtransport.testing.blocks import Blocks, digests
from kvtransport.testing.side import ProcessSide

BLOCKS = Blocks(4, 65536, layers=2)
EMPTY = Blocks(4, 65536, layers=2, seed=2)
IDS = range(BLOCKS.count)
DEAD_AFTER_S = 1.0
HANDSHAKE_S = 0.6
LIMITS_S = (0.45, 0.7, 0.85)
"""One round each."""
WAITS = (
    *("match_timeout_s", "timeout_s", "result", "wait_layer", "wait", "awaited"),
    *("recv_messages", "accept", "connect", "pool_close"),
)


class Waits:
    """Waits of all kinds, each with a limit. A method of `WAITS` returns at its limit."""

    def __init__(self, endpoint: kvt.Endpoint, connection: kvt.Connection, address: str) -> None:
        self.endpoint, self.connection, self.address = endpoint, connection, address
        self.pool = endpoint.register(BLOCKS.views(BLOCKS.memory()))
        self.busy = endpoint.register(BLOCKS.views(BLOCKS.memory()))
        self.never = connection.recv_blocks(self.busy, IDS, key="never")
        self.silent = socket.create_server(("127.0.0.1", 0))

    def match_timeout_s(self, limit: float) -> None:
        self.fails(kvt.TransferTimeout, self.recv(0, match_timeout_s=limit).result, 20)

    def timeout_s(self, limit: float) -> None:
        self.fails(kvt.TransferTimeout, self.recv(1, timeout_s=limit).result, 20)

    def result(self, limit: float) -> None:
        self.fails(kvt.WaitTimeout, self.never.result, limit)

    def wait_layer(self, limit: float) -> None:
        self.fails(kvt.WaitTimeout, lambda: self.never.wait_layer(0, timeout=limit))

    def wait(self, limit: float) -> None:
        kvt.wait([self.never], timeout=limit)
        assert not self.never.done()

    def awaited(self, limit: float) -> None:
        async def wait() -> None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.recv(2), limit)
                raise AssertionError("it has ended")

        asyncio.run(wait())

    def recv_messages(self, limit: float) -> None:
        assert self.endpoint.recv_messages(timeout=limit) == []

    def accept(self, limit: float) -> None:
        self.fails(kvt.WaitTimeout, self.endpoint.accept, limit)

    def connect(self, limit: float) -> None:
        port = self.silent.getsockname()[1]
        self.fails(kvt.ConnectTimeout, self.endpoint.connect, f"127.0.0.1:{port}", limit)

    def pool_close(self, limit: float) -> None:
        self.fails(kvt.WaitTimeout, self.busy.close, limit)

    def recv(self, block: int, **options: float) -> kvt.Transfer:
        """Post what nobody sends."""
        return self.connection.recv_blocks(self.pool, [block], key=f"{block}", **options)

    @staticmethod
    def fails(kind: type[Exception], call: Callable, *arguments: object) -> None:
        try:
            call(*arguments)
        except kind:
            return
        raise AssertionError(f"{call} has succeeded")

    def __enter__(self) -> "Waits":
        return self

    def __exit__(self, *exc: object) -> None:
        self.never.cancel()
        self.silent.close()


def handshake(address: str) -> float:
    """Say nothing to a listener; return how long it lets us."""
    host, _, port = address.rpartition(":")
    start = time.monotonic()
    with socket.create_connection((host, int(port))) as stranger:
        stranger.settimeout(20)
        assert stranger.recv(1) == b""
    return time.monotonic() - start


def measured(waits: Waits) -> list[tuple[str, float, float]]:
    """Have all waits at once, round for round; return (name, limit, what it took)."""

    def took(name: str, limit: float) -> tuple[str, float, float]:
        start = time.monotonic()
        getattr(waits, name)(limit)
        return name, limit, time.monotonic() - start

    found = []
    with ThreadPoolExecutor(len(WAITS) + 1) as pool:
        for limit in LIMITS_S:
            stranger = pool.submit(handshake, waits.address)
            found += pool.map(took, WAITS, [limit] * len(WAITS))
            found.append(("handshake", HANDSHAKE_S, stranger.result()))
    return found


def ahead() -> float:
    """Return by how much the wall clock is before the monotonic one."""
    return time.time() - time.monotonic()


def run(ours: kvt.Endpoint, peer: ProcessSide) -> dict[str, object]:
    """Have a transfer that begins before all waits, and ends after them."""
    address = ours.listen("127.0.0.1:0")
    connection = ours.connect(peer.call("listen", address="127.0.0.1:0"))
    peer.call("accept")
    peer.pool("of", BLOCKS)
    peer.gate("g", BLOCKS.layers)
    memory = EMPTY.memory()
    transfer = connection.recv_blocks(ours.register(EMPTY.views(memory)), IDS, key="t")
    peer.send("t", "of", IDS, gate="g")
    peer.mark("g", 0)
    with Waits(ours, connection, address) as waits:
        found = measured(waits)
    states = [connection.state, peer.call("connection_state"), transfer.state]
    peer.mark("g", 1)
    transfer.result(20)
    peer.result("t")
    right = digests(memory) == digests(EMPTY.after(BLOCKS, IDS, IDS))
    return {"took": found, "states": states, "right": right}


def main() -> None:
    """Print what was seen."""
    config = {"backends": ["tcp"], "dead_after_s": DEAD_AFTER_S, "handshake_timeout_s": HANDSHAKE_S}
    before = ahead()
    with kvt.Endpoint(kvt.Config.from_dict(config)) as ours:
        peer = ProcessSide("peer")
        try:
            peer.call("start", config=config)
            found = run(ours, peer)
        finally:
            peer.end()
    print(json.dumps(found | {"jumped_s": ahead() - before}))


if __name__ == "__main__":
    main()
