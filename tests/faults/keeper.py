"""A worker that can fork a child which keeps all its descriptors, and the side that has such a worker.

`os.fork` runs the handlers of pthread_atfork, and ours close the child's copies of the engine's sockets. A child
made by the system call alone runs none: its copies keep every connection of its parent open, when that is dead too.
"""

import ctypes
import os
import platform
import signal
from pathlib import Path

from kvtransport.testing.actor import Actor
from kvtransport.testing.side import ProcessSide
from kvtransport.testing.worker import main

SYS_CLONE, SYS_PPOLL = {"x86_64": (56, 271), "aarch64": (220, 73)}[platform.machine()]
LIVES_S = 60  # then it ends by itself, should nobody have lived to kill it
# Keeps the interpreter's lock during a call: in the child no other thread is there to give it back.
PYTHON = ctypes.PyDLL(None)


def clone() -> int:
    """Fork by the system call; the child does nothing and has all that we have."""
    words = [ctypes.c_long(0)] * 4
    pid = PYTHON.syscall(ctypes.c_long(SYS_CLONE), ctypes.c_long(signal.SIGCHLD), *words)
    if pid != 0:
        return pid
    try:
        limit = (ctypes.c_long * 2)(LIVES_S, 0)
        PYTHON.syscall(ctypes.c_long(SYS_PPOLL), None, ctypes.c_long(0), limit, None, ctypes.c_long(0))
    finally:
        os._exit(0)


class KeepingActor(Actor):
    """An Actor with one command more."""

    def do_clone(self) -> int:
        return clone()


class Keeper(ProcessSide):
    """A process that runs this module, so that it can `clone`."""

    program = (str(Path(__file__)),)

    def clone(self) -> int:
        """Have it make such a child, which lives until `end`; return its pid."""
        self._children.append(self.call("clone"))
        return self._children[-1]


def sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open, by their inodes."""
    folder = f"/proc/{pid}/fd"
    links = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    return {link for link in links if link.startswith("socket:")}


if __name__ == "__main__":
    main(KeepingActor())
