"""Two endpoints of one process, joined without sockets: the smallest complete backend.

Here: which endpoints this process has, addresses "inproc:<incarnation, 32 hex digits>". Not here: joining
two engines and moving bytes (native), who is connected (the acceptor).

Invariant: an endpoint is found from `enter` to `leave`, and in no other process: a forked child finds none.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Final

from kvtransport.backends.base import Viability

PREFIX: Final = "inproc:"

_doors: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
"""Without a lock: each use is one step of a dict. An endpoint that is forgotten leaves whenever the garbage
collector finds it, which may be within a step of another one, in the same thread.
"""

joining = threading.Lock()
"""Held while two endpoints are joined: two that do it at once make one session."""


class InprocBackend:
    """The direct backend for endpoints of this process. Has no state of its own."""

    name = "inproc"

    def viability(self) -> Viability:
        """Work everywhere."""
        return Viability(True)

    def serves(self, where: str) -> bool:
        """Say whether it begins with inproc:."""
        return where.startswith(PREFIX)

    def check(self, where: str) -> None:
        """Raise ValueError where it is malformed."""
        self.incarnation_at(where)

    def incarnation_at(self, where: str) -> bytes:
        """Return the incarnation that an address names."""
        try:
            incarnation = bytes.fromhex(where.removeprefix(PREFIX))
        except ValueError:
            incarnation = b""
        if len(incarnation) != 16:
            raise ValueError(f"{where!r}: an address in this process is written inproc:<32 hex digits>")
        return incarnation

    def find(self, incarnation: bytes) -> Any | None:
        """Return what the endpoint of that incarnation has entered; None: it isn't in this process."""
        door = _doors.get(incarnation)
        return door if door is not None and door.pid == os.getpid() else None

    def enter(self, incarnation: bytes, door: Any) -> None:
        """Let an endpoint be found. `door`: for who finds it; it has the attribute `pid`. Held weakly."""
        _doors[incarnation] = door

    def leave(self, incarnation: bytes) -> None:
        """End that."""
        _doors.pop(incarnation, None)


def address_of(incarnation: bytes) -> str:
    """Return the address of an endpoint."""
    return PREFIX + incarnation.hex()


def _renew_after_fork() -> None:
    """Let no lock stay held by a thread that a forked child doesn't have."""
    global joining
    joining = threading.Lock()


os.register_at_fork(after_in_child=_renew_after_fork)
