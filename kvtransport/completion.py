"""Completion queues and event loops: many handles behind one descriptor.

Here: CompletionQueue, and the bridge from the engine's threads to an asyncio loop. Not here: the handles
themselves (`kvtransport.transfer`), or anything that waits for one handle.

Invariant: each handle comes out of a queue once. A loop's callback only moves tags to futures; it never runs
a user's code and never blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

from kvtransport.errors import ForkedProcessError

if TYPE_CHECKING:
    import asyncio

    from kvtransport import _native
    from kvtransport.transfer import Handle


class Subscribable(Protocol):
    """The extension's handle, as far as queues need it."""

    def done(self) -> bool:
        """Whether it has ended."""

    def subscribe(self, queue: Any, handle_id: int) -> bool:
        """Have the tag queued at the end; False if it has ended already."""


class CompletionQueue:
    """Finished handles, for a loop that polls: `send_blocks(..., queue=cq, tag=request)`.

    Made by `Endpoint.completion_queue()`. Any number of handles of any connections of the endpoint; poll from one
    thread or several.
    """

    def __init__(self, native: _native.Queue) -> None:
        """For Endpoint."""
        self.native = native
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._handles: dict[int, Handle[Any]] = {}
        self._early: set[int] = set()

    def fileno(self) -> int:
        """Return a descriptor for select, poll or epoll: readable while finished handles wait."""
        return self.native.fileno()

    def poll(self) -> list[Handle[Any]]:
        """Return the handles that have finished since the last call, in the order in which they did. Never blocks."""
        finished = []
        self.native.fileno()  # raises in a forked child, where the lock may be held for ever
        with self._lock:
            for tag in self.native.poll():
                handle = self._handles.pop(tag, None)
                if handle is None:
                    self._early.add(tag)  # finished before its post returned; `entered` puts it back
                else:
                    finished.append(handle)
        return finished

    def __len__(self) -> int:
        """Return how many handles have not come out yet."""
        return len(self._handles)

    def next_id(self) -> int:
        """For Connection: a tag for the next post."""
        return next(self._ids)

    def entered(self, tag: int, handle: Handle[Any]) -> None:
        """For Connection: the handle that the tag stands for."""
        with self._lock:
            self._handles[tag] = handle
            if tag in self._early:
                self._early.discard(tag)
                self.native.push(tag)


class LoopBridge:
    """One event loop's queue: handles' ends become futures' results."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: _native.Queue) -> None:
        """For LoopBridges."""
        self._loop = loop
        self._queue = queue
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        loop.add_reader(queue.fileno(), self._drain)

    def ended(self, native: Subscribable) -> asyncio.Future[None]:
        """Return a future that is done when the handle is."""
        future: asyncio.Future[None] = self._loop.create_future()
        tag = next(self._ids)
        self._waiting[tag] = future
        if not native.subscribe(self._queue, tag):
            del self._waiting[tag]
            future.set_result(None)
        return future

    def close(self) -> None:
        """Stop watching. Only while the loop isn't closed."""
        self._loop.remove_reader(self._queue.fileno())

    def _drain(self) -> None:
        for tag in self._queue.poll():
            future = self._waiting.pop(tag, None)
            if future is not None and not future.done():
                future.set_result(None)


class LoopBridges:
    """The bridges of one endpoint: one eventfd per event loop that ever awaited a handle of it."""

    def __init__(self, make_queue: Any) -> None:
        """`make_queue()` returns a fresh native queue."""
        self._make_queue = make_queue
        self._pid = os.getpid()
        self._lock = threading.RLock()  # the garbage collector may close them within `here`
        self._bridges: dict[asyncio.AbstractEventLoop, LoopBridge] = {}

    def here(self) -> LoopBridge:
        """Return the bridge of the running loop."""
        import asyncio  # whoever has a loop has it already; import kvtransport alone needn't pay for it

        if os.getpid() != self._pid:  # where the lock may be held for ever
            raise ForkedProcessError("this handle is the parent's; make another Endpoint after fork()")
        loop = asyncio.get_running_loop()
        with self._lock:
            bridge = self._bridges.get(loop)
            if bridge is None:
                for ended in [one for one in self._bridges if one.is_closed()]:
                    del self._bridges[ended]  # and with it the eventfd: a loop's end is told to nobody
                bridge = self._bridges[loop] = LoopBridge(loop, self._make_queue())
        return bridge

    def close(self) -> None:
        """Let go of all loops: for the endpoint's end, when every handle has ended."""
        with self._lock:
            for loop, bridge in list(self._bridges.items()):
                if loop.is_closed():
                    continue
                if not loop.is_running():
                    bridge._drain()
                    bridge.close()
                    continue
                with contextlib.suppress(RuntimeError):  # it was closed meanwhile
                    loop.call_soon_threadsafe(bridge._drain)
                    loop.call_soon_threadsafe(bridge.close)
            self._bridges.clear()
