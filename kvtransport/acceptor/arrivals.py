"""What waits for a user of the endpoint: peers that have come, and lines for the log that must not be a
flood.

Here: the queue behind `Endpoint.accept`, and a limit on log lines. Not here: who is put there (`acceptor`).

Invariant: each Connection is taken once; `close` ends every wait.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from kvtransport.errors import ConnectionClosed, WaitTimeout
from kvtransport.seconds import for_locks, to_wait

if TYPE_CHECKING:
    from kvtransport.connection import Connection

LINES: Final = 10
PERIOD_S: Final = 10.0
KEPT: Final = 64


class Arrivals:
    """Connections that peers have made, for `accept`. Thread-safe."""

    def __init__(self) -> None:
        self._queue: deque[Connection] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, connection: Connection) -> None:
        """Add the newest."""
        with self._changed:
            if len(self._queue) >= KEPT:  # nobody takes them, perhaps: those that are lost must not pile up
                self._queue = deque(one for one in self._queue if one.state != "lost")
            self._queue.append(connection)
            self._changed.notify()

    def take(self, timeout: float | None) -> Connection:
        """Return the oldest; waits for one. WaitTimeout; ConnectionClosed after `close`."""
        limit = for_locks(to_wait(timeout))
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closed, limit):
                raise WaitTimeout(f"no peer has connected within {timeout:g} s")
            if self._closed:
                raise ConnectionClosed("the endpoint is closed")
            return self._queue.popleft()

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()


class Throttle:
    """A logger's lines about strangers: at most 10 in 10 s, then one that says how many there were."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._since = 0.0
        self._lines = 0

    def warning(self, message: str, *values: object) -> None:
        """Log it, if not too many were."""
        now = time.monotonic()
        if now - self._since > PERIOD_S:
            if self._lines > LINES:
                self._log.warning("%d more lines like these were left out", self._lines - LINES)
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines <= LINES:
            self._log.warning(message, *values)
