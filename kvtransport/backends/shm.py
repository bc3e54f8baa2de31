"""Memory that two processes of one host share: whether this machine allows it.

Here: trials of what a shared-memory backend rests on: sealed memfds that are passed over unix sockets and mapped
read-only, the death of a process by pidfd, and reading another process's memory; and where an endpoint takes the
channels that descriptors are passed by. Not here: moving bytes that way (native), who dials a channel
(`acceptor.sharing`).

Invariant: a trial leaves no descriptor, mapping or process behind, and never forks the user's process.
"""

from __future__ import annotations

import array
import errno
import fcntl
import functools
import mmap
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final

from kvtransport.backends.base import TRIAL_S, Target, Viability

F_SEAL_FUTURE_WRITE: Final = 0x10  # linux/fcntl.h; not in Python's fcntl before 3.13
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL

_ALLOCATE_INSTEAD = "memory from Endpoint.allocate doesn't need it"
_CAP_SYS_PTRACE: Final = 19
_NONCE_NBYTES: Final = 32


CHANNEL_BACKLOG: Final = 64


def channel_target(incarnation: bytes) -> Target:
    """Return where an endpoint of this network namespace takes channels: a socket without a file."""
    name = f"kvtransport-{incarnation.hex()}"
    return Target(socket.AF_UNIX, "\0" + name, f"the socket @{name}")


def listen_for_channels(incarnation: bytes) -> socket.socket:
    """Open the listening socket at `channel_target`. OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.bind(channel_target(incarnation).sockaddr)
        sock.listen(CHANNEL_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


@functools.cache
def usable_here() -> bool:
    """Say whether sealed memory works on this machine; asked once in a process."""
    return sealed_memory().usable


class ShmBackend:
    """The name, and whether it works here. Sessions come about by sockets (`tcp`); this is a way of theirs."""

    name = "shm"

    def viability(self) -> Viability:
        """Try memory that is made to be shared, and memory that isn't. Usable: the first kind."""
        made, death, foreign = sealed_memory(), death_by_pidfd(), process_memory()
        parts = (
            ("memory from Endpoint.allocate (sealed memfd)", made),
            ("death of a process (pidfd)", death),
            ("memory of your own (process_vm_readv)", foreign),
        )
        for part in (made, death):
            if not part.usable:
                return Viability(False, part.reason, part.remedy, parts)
        return Viability(True, parts=parts)


# --- memory that is made to be shared -----------------------------------------------------------------------


def sealed_memory() -> Viability:
    """Make a memfd, seal it, pass it over a unix socket, map it read-only, see that it can't be mapped to write."""
    with ExitStack() as held:
        trial = _SealedTrial(held)
        try:
            found = trial.run()
        except OSError as e:
            return _why_not_sealed(trial.step, e)
    return Viability(not found, found)


class _SealedTrial:
    """One page. `step`: what is being tried; `held` lets go of all of it."""

    def __init__(self, held: ExitStack) -> None:
        self.step = "memfd_create"
        self._held = held

    def run(self) -> str:
        """Return what is wrong, though no call failed; empty: nothing."""
        fd = self._descriptor(os.memfd_create("kvtransport-trial", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        self.step = "fallocate"
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        self.step = "mmap"
        ours = self._held.enter_context(mmap.mmap(fd, mmap.PAGESIZE))
        self.step = "sealing"
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        there = self._passed(fd)
        if fcntl.fcntl(there, fcntl.F_GET_SEALS) & SEALS != SEALS:
            return "the kernel took the seals of a memfd and doesn't show them"
        self.step = "mmap, read-only"
        theirs = self._held.enter_context(mmap.mmap(there, mmap.PAGESIZE, prot=mmap.PROT_READ))
        nonce = os.urandom(_NONCE_NBYTES)
        ours[:_NONCE_NBYTES] = nonce
        if theirs[:_NONCE_NBYTES] != nonce:
            return "what was written through one mapping of a memfd isn't seen through another one"
        return self._written_after_all(there)

    def _passed(self, fd: int) -> int:
        """Return the descriptor as it comes out of a unix socket."""
        self.step = "passing a descriptor (SCM_RIGHTS)"
        a, b = (self._held.enter_context(s) for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
        b.settimeout(TRIAL_S)
        socket.send_fds(a, [b"m"], [fd])
        _, fds, _, _ = socket.recv_fds(b, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 1:
            raise OSError(errno.EPROTO, "no descriptor came")
        return self._descriptor(fds[0])

    def _written_after_all(self, fd: int) -> str:
        try:
            mmap.mmap(fd, mmap.PAGESIZE).close()
        except OSError:
            return ""
        return "the kernel maps a sealed memfd to write: the seals are not kept"

    def _descriptor(self, fd: int) -> int:
        self._held.callback(os.close, fd)
        return fd


def _why_not_sealed(step: str, error: OSError) -> Viability:
    what = f"{step}: {error.strerror or error}"
    remedies = {
        errno.EMFILE: "raise the limit of descriptors (ulimit -n)",
        errno.ENOMEM: "there is too little memory, or the memory limit of the container is reached",
        errno.ENOSPC: "there is too little memory, or the memory limit of the container is reached",
        errno.EACCES: "set vm.memfd_noexec to 1 or 0 (sysctl): 2 refuses memfds that may be executed",
        errno.EPERM: "a seccomp filter or security module forbids it: let the container's profile allow memfd_create",
        errno.ENOSYS: "needs Linux 5.1 or later, and a sandbox that lets memfd_create through",
        errno.EINVAL: "needs Linux 5.1 or later: before, memfds can't be sealed against later writers",
    }
    return Viability(False, what, remedies.get(error.errno or 0, ""))


# --- other processes ------------------------------------------------------------------------------------------


def death_by_pidfd() -> Viability:
    """Open a pidfd of this process, and see that it says that the process lives."""
    if not hasattr(os, "pidfd_open"):
        return Viability(
            False, "this Python has no os.pidfd_open", "needs Python built for Linux 5.3 or later"
        )
    try:
        fd = os.pidfd_open(os.getpid())
    except OSError as e:
        remedy = "needs Linux 5.3 or later, and a sandbox that lets pidfd_open through"
        return Viability(False, f"pidfd_open: {e.strerror}", remedy)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return (
            Viability(True)
            if not poll.poll(0)
            else Viability(False, "a pidfd of this process says it is dead")
        )
    finally:
        os.close(fd)


_READER = """
import ctypes, sys
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
pid, address, nbytes = map(int, sys.argv[1:])
found = ctypes.create_string_buffer(nbytes)
here, there = Piece(ctypes.addressof(found), nbytes), Piece(address, nbytes)
read = ctypes.CDLL(None, use_errno=True).process_vm_readv
read.restype = ctypes.c_ssize_t
read.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
count = read(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(count, ctypes.get_errno(), found.raw.hex())
"""


def process_memory() -> Viability:
    """Let another process read some bytes of this one, as a peer would.

    It is a child that reads its parent, not the other way round: yama lets a parent read its children, which
    says nothing of two processes that aren't related.
    """
    if not sys.executable:
        return Viability(False, "not tried: there is no Python to start as another process")
    nonce = os.urandom(_NONCE_NBYTES)
    ours = array.array("B", nonce)
    place = (str(os.getpid()), str(ours.buffer_info()[0]), str(_NONCE_NBYTES))
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _READER, *place],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRIAL_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as e:
        return Viability(False, f"not tried: another process could not be run: {e}")
    fields = child.stdout.split()
    if len(fields) != 3:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return Viability(False, f"the process that tried it had no answer: {last}", _ALLOCATE_INSTEAD)
    count, code = int(fields[0]), int(fields[1])
    if count == _NONCE_NBYTES and fields[2] == nonce.hex():
        return Viability(True)
    if count >= 0:
        return Viability(False, "other bytes were read than this process has there", _ALLOCATE_INSTEAD)
    return why_unreadable(code, ptrace_scope(), process_status())


def why_unreadable(code: int, scope: int | None, status: Mapping[str, str]) -> Viability:
    """Say what forbids it. code: errno; scope: yama's; status: the fields of /proc/self/status."""
    reason = f"process_vm_readv: {os.strerror(code)}"
    if code == errno.ENOSYS:
        remedy = "a kernel with CONFIG_CROSS_MEMORY_ATTACH, outside of a sandbox that leaves it out"
        return Viability(False, f"{reason}: this kernel or sandbox hasn't got it", _or_allocate(remedy))
    capable = bool(int(status.get("CapEff", "0") or "0", 16) >> _CAP_SYS_PTRACE & 1)
    if scope and not capable:
        only = {1: "a process's ancestors", 2: "processes with CAP_SYS_PTRACE"}.get(scope, "nobody")
        words = f"kernel.yama.ptrace_scope is {scope}: {only} may read its memory"
        remedy = "restart with ptrace_scope 0" if scope > 2 else "sysctl kernel.yama.ptrace_scope=0"
        if scope <= 2:
            remedy += ", or CAP_SYS_PTRACE (containers: --cap-add SYS_PTRACE)"
        return Viability(False, f"{reason}: {words}", _or_allocate(remedy))
    if status.get("Seccomp", "0") != "0":
        remedy = "a seccomp profile that allows process_vm_readv (containers: --cap-add SYS_PTRACE)"
        return Viability(False, f"{reason}: a seccomp filter is in force here", _or_allocate(remedy))
    remedy = "no setuid program, and no profile of a security module (AppArmor, SELinux) that denies ptrace"
    words = "this process isn't dumpable, or a security module denies it"
    return Viability(False, f"{reason}: {words}", _or_allocate(remedy))


def ptrace_scope() -> int | None:
    """Return kernel.yama.ptrace_scope; None: this kernel hasn't got it, or it can't be read."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as f:
            return int(f.read())
    except (OSError, ValueError):
        return None


def process_status() -> dict[str, str]:
    """Return the fields of /proc/self/status (proc(5)); empty where there is none."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as f:
            pairs = (line.partition(":") for line in f)
            return {name: value.strip() for name, _, value in pairs}
    except OSError:
        return {}


def _or_allocate(remedy: str) -> str:
    return f"{remedy}; {_ALLOCATE_INSTEAD}"
