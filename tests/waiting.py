"""Waiting for what tests can't be told of by a call that blocks."""

import threading
import time
from collections.abc import Callable

from kvtransport.acceptor.loop import Loop


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for what no event tells; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't come about"
        time.sleep(0.001)


class Turns:
    """Of all acceptor threads of this process: what they change, they change in a turn."""

    def __init__(self) -> None:
        self._turned = threading.Condition()
        self._turn = Loop._turn

    def tell(self, loop: Loop) -> None:
        """Do a turn of the loop, in the place of `Loop._turn`; tell who waits that it is over."""
        try:
            self._turn(loop)
        finally:
            with self._turned:
                self._turned.notify_all()

    def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        """Wait for what a turn brings about; AssertionError after `seconds`."""
        with self._turned:
            assert self._turned.wait_for(condition, seconds), "no turn has brought it about"

    def reset(self) -> None:
        """In a forked child, whose parent's threads may have held the lock."""
        self._turned = threading.Condition()
