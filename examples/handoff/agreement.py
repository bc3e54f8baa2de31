"""What the two processes agree on: the layout of the blocks, the messages beside them, and how they print."""

from __future__ import annotations

import json
import time
from typing import Any

import kvtransport as kvt
from handoff.paged_cache import KVShape


def layout_of(shape: KVShape) -> kvt.BlockLayout:
    """The same words on both sides. Number of blocks, block ids and strides are each side's own business."""
    return kvt.BlockLayout(
        tokens_per_block=shape.tokens_per_block,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=str(shape.dtype).removeprefix("torch."),
        order="HND",
        kv="packed",
    )


def encode(kind: str, **fields: Any) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode()


class Inbox:
    """Messages by kind, in order of arrival: what an engine's scheduler would poll between two steps."""

    def __init__(self, endpoint: kvt.Endpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._waiting: dict[str, list[dict[str, Any]]] = {}

    def take(self, kind: str, count: int) -> list[dict[str, Any]]:
        """Waits for `count` messages of this kind; TimeoutError if they don't come."""
        waiting = self._waiting.setdefault(kind, [])
        deadline = time.monotonic() + self._timeout
        while len(waiting) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"awaited {count} messages '{kind}', got {len(waiting)}")
            for _, data in self._endpoint.recv_messages(timeout=left):
                message = json.loads(data)
                self._waiting.setdefault(message["kind"], []).append(message)
        taken, waiting[:] = waiting[:count], waiting[count:]
        return taken


def say(line: str) -> None:
    print(line, flush=True)  # flushed: the other end is a pipe that somebody is watching


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
