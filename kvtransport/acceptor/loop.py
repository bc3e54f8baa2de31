"""The thread: one selector, timers, and calls from other threads.

Here: waiting. Not here: what is waited for (`acceptor`).

Invariant: a callback's exception is logged and ends nothing but that call; the thread ends by `stop` only.
It never polls: with nothing to do it sleeps in the kernel.

`waited_s` is a clock for strangers: it advances by the time that the thread has waited, and by no more than
it meant to. A deadline on it counts the waiting for bytes, not the waiting for the GIL that may follow.
While such a deadline runs, its owner has timers that make the waits short, so that a long wait for the GIL
counts little.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, cast

_log = logging.getLogger("kvtransport.acceptor")

WAIT_MAX_S: Final = 3600.0
"""Of one sleep: the kernel counts milliseconds in an int, so that 25 days are too many for it."""


class Loop:
    """A thread that waits for sockets, times and calls. The methods of the first part are for any thread."""

    def __init__(self, name: str) -> None:
        self.waited_s = 0.0
        self._selector = selectors.EpollSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched: dict[socket.socket | int, tuple[int, Callable[[], None]]] = {}
        self._timers: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._posted: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._stopped = threading.Event()
        # Of _posted against _stopping. The garbage collector may end a forgotten endpoint, and with it this
        # thread, within any step that allocates: in the very thread that holds the lock.
        self._state = threading.RLock()
        self._last: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.watch(self._wake_fd, selectors.EVENT_READ, self._woken)

    # --- any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def post(self, call: Callable[[], None]) -> bool:
        """Have `call` made by the thread; False: it has stopped."""
        with self._state:
            if self._stopping:
                return False
            self._posted.append(call)
            if len(self._posted) == 1 and self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)
        return True

    def stop(self, last: Callable[[], None], timeout_s: float) -> bool:
        """End the thread after a call of `last` by it; say whether it has ended. Idempotent."""
        with self._state:
            if not self._stopping:
                self._last = last
                os.eventfd_write(self._wake_fd, 1)
                self._stopping = True  # from here on the thread may close the descriptor
        if threading.current_thread() is not self._thread:
            self._stopped.wait(timeout_s)
        return self._stopped.is_set()

    def abandon(self) -> None:
        """Close the descriptors in a forked child, where the thread doesn't exist. Takes no lock."""
        self._stopping = True
        self._close()

    # --- the thread itself -------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the clock of `call_at`, in seconds."""
        return time.monotonic()

    def call_at(self, when: float, call: Callable[[float], None]) -> None:
        """Call once at `when`, with the time; never, if that is infinite. Not cancelled: `call` looks."""
        if when != float("inf"):
            heapq.heappush(self._timers, (when, next(self._numbers), call))

    def watch(self, sock: socket.socket | int, mask: int, call: Callable[[], None]) -> None:
        """Call whenever `sock` is ready for what `mask` says; replaces what was said before."""
        change = self._selector.modify if sock in self._watched else self._selector.register
        self._watched[sock] = (change(sock, mask).fd, call)

    def unwatch(self, sock: socket.socket | int) -> None:
        """Stop. Nothing happens if it isn't watched."""
        known = self._watched.pop(sock, None)
        if known is not None:
            self._selector.unregister(known[0])

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:
                _log.exception("the acceptor thread goes on after an internal error")
        for call in self._posted:  # before `stop`, and no more can come: `last` ends what they begin
            self.guard(call)
        if self._last is not None:
            self.guard(self._last)
        self._close()
        self._stopped.set()

    def _close(self) -> None:
        """Close the descriptors, once: their numbers may be others' afterwards."""
        wake_fd, self._wake_fd = self._wake_fd, -1
        if wake_fd >= 0:
            self._selector.close()
            os.close(wake_fd)

    def _turn(self) -> None:
        timeout = min(self._timers[0][0] - self.now(), WAIT_MAX_S) if self._timers else None
        before = self.now()
        ready = self._selector.select(timeout)
        now = self.now()
        if timeout is not None:
            self.waited_s += max(0.0, min(now - before, timeout))
        for key, _ in ready:
            known = self._watched.get(cast("socket.socket | int", key.fileobj))
            if known is not None:  # an earlier call may have ended it
                self.guard(known[1])
        while self._timers and self._timers[0][0] <= now:
            _, _, call = heapq.heappop(self._timers)
            self.guard(partial(call, now))

    def _woken(self) -> None:
        with self._state:
            os.eventfd_read(self._wake_fd)
            calls = list(self._posted)
            self._posted.clear()
        for call in calls:
            self.guard(call)

    def guard(self, call: Callable[[], None]) -> None:
        """Call; log an exception instead of raising it."""
        try:
            call()
        except Exception:
            _log.exception("internal error in the acceptor thread")
