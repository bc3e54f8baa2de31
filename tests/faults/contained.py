"""Contained: a worker in pid, network and mount namespaces of its own, and the side that has one.

As in a container: it is number 1 there, /proc shows nobody else, and loopback is its own. Only root can make one.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from kvtransport.testing.worker import main
from tests.faults.sharing import Sharer, SharingActor

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x40000000, 0x20000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
LIMIT_S = 20
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call the C library; OSError."""
    if getattr(LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def enter() -> None:
    """Leave the namespaces of this process. The next child is the first process of its own."""
    call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)


def run_inside() -> None:
    """Fork the worker; end with it, and it with us."""
    enter()
    pid = os.fork()
    if pid != 0:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=LIMIT_S)
    main(SharingActor())


def why_impossible() -> str:
    """Say why namespaces can't be made here; empty: they can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--net", "ip", "link", "set", "lo", "up"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return tried.stderr.strip() and f"no namespaces: {tried.stderr.strip()}"


class Contained(Sharer):
    """Such a process."""

    program = (str(Path(__file__)),)

    def within(self, *command: str) -> None:
        """Run a command in its network namespace."""
        subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", *command], check=True, timeout=LIMIT_S)


def cable(a: Contained, b: Contained) -> tuple[str, str]:
    """Join two by a veth pair; return their addresses."""
    names = [f"kvt{os.getpid()}{end}" for end in "ab"]
    subprocess.run(
        ["ip", "link", "add", names[0], "netns", str(a.pid), "type", "veth", "peer", "name", names[1],
         "netns", str(b.pid)],
        check=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    addresses = ("10.93.0.1", "10.93.0.2")
    for side, name, address in zip((a, b), names, addresses, strict=True):
        side.within("ip", "address", "add", f"{address}/24", "dev", name)
        side.within("ip", "link", "set", name, "up")
    return addresses


if __name__ == "__main__":
    run_inside()
