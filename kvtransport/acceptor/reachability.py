"""Where this process runs, and what it shares with a peer by what the peer says.

Here: reading it from /proc. Not here: the wire's form of it (`protocol.messages`), proofs (`backends`).

Invariant: nothing here trusts a peer: a process id that it names is used only if that process exists and
began when it says.
"""

from __future__ import annotations

import os
import socket

from kvtransport.protocol.messages import Reachability


def here() -> Reachability:
    """Return where this process runs; what can't be read is 0 or empty."""
    return Reachability(
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        hostname="".join(c for c in socket.gethostname() if c.isprintable())[:128],
        uid=os.geteuid(),
        pid=os.getpid(),
        pid_started=process_started(os.getpid()),
        pid_ns=_namespace("pid"),
        net_ns=_namespace("net"),
        ipc_ns=_namespace("ipc"),
        user_ns=_namespace("user"),
    )


def same_network(a: Reachability, b: Reachability) -> bool:
    """Say whether 127.0.0.1 means the same to both."""
    return bool(a.boot_id) and a.boot_id == b.boot_id and a.net_ns == b.net_ns != 0


def same_process(a: Reachability, b: Reachability) -> bool:
    """Say whether it is one process: in another namespace the same id is another's. Asks nothing of the system."""
    return _same_processes(a, b) and (a.pid, a.pid_started) == (b.pid, b.pid_started)


def visible_pid(ours: Reachability, theirs: Reachability) -> int:
    """Return the peer's process id if that process is seen here, by boot, namespace and start; else 0."""
    if not _same_processes(ours, theirs):
        return 0
    if not theirs.pid or not theirs.pid_started or process_started(theirs.pid) != theirs.pid_started:
        return 0
    return theirs.pid


def has_ended(ours: Reachability, theirs: Reachability) -> bool:
    """Say whether the peer's process is known to be gone: it would be seen here, and isn't there."""
    if not _same_processes(ours, theirs):
        return False
    return bool(theirs.pid and theirs.pid_started) and process_started(theirs.pid) != theirs.pid_started


def process_started(pid: int) -> int:
    """Return when a process began, in clock ticks after boot (proc(5), stat); 0: no such process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0


def _same_processes(a: Reachability, b: Reachability) -> bool:
    return bool(a.boot_id) and a.boot_id == b.boot_id and a.pid_ns == b.pid_ns != 0


def _namespace(name: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{name}").st_ino
    except OSError:
        return 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read(4096).strip()
    except OSError:
        return ""
