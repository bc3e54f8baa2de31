"""What backends try on this machine: that trials notice what is forbidden, say why, and leave nothing behind."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvtransport.backends import shm, tcp
from kvtransport.backends.inproc import InprocBackend
from kvtransport.errors import AuthenticationError
from tests.unit.forbidden_calls import run_without

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

ASK = """
from kvtransport.backends import shm
found = shm.{trial}()
print(found.usable, found.reason, found.remedy, sep="|")
"""


def told(call, trial, refusal=errno.EPERM):
    done = run_without(call, ASK.format(trial=trial), refusal)
    assert done.returncode == 0, done.stderr
    usable, reason, remedy = done.stdout.strip().split("|")
    return usable == "True", reason, remedy


# --- what works ---


def test_sealed_memory_works_on_linux():
    assert shm.sealed_memory() == shm.Viability(True)


def test_the_death_of_a_process_can_be_seen():
    assert shm.death_by_pidfd() == shm.Viability(True)


def test_another_process_reads_this_one():
    found = shm.process_memory()
    if shm.ptrace_scope() or shm.process_status().get("Seccomp") != "0":
        assert found.usable or found.remedy
        pytest.skip("this machine may forbid it")
    assert found == shm.Viability(True)


def test_tcp_is_tried_over_both_kinds_of_sockets():
    found = tcp.TcpBackend().viability()
    assert found.usable
    assert [what for what, _ in found.parts] == ["loopback TCP", "unix sockets"]
    assert all(part.usable for _, part in found.parts)
    assert "SO_PEERCRED" in found.parts[1][1].reason


def test_inproc_works_everywhere():
    assert InprocBackend().viability().usable


# --- what doesn't, in a process where the kernel refuses a call ---


def test_memory_that_a_filter_keeps_from_others():
    usable, reason, remedy = told("process_vm_readv", "process_memory")
    assert not usable
    assert "seccomp" in reason
    assert "Endpoint.allocate" in remedy


def test_a_kernel_without_the_call():
    usable, reason, _ = told("process_vm_readv", "process_memory", errno.ENOSYS)
    assert not usable
    assert "hasn't got it" in reason


def test_no_memfd():
    usable, reason, remedy = told("memfd_create", "sealed_memory")
    assert not usable
    assert reason.startswith("memfd_create: ")
    assert "seccomp" in remedy


def test_memfds_that_must_not_be_executable():
    assert "vm.memfd_noexec" in told("memfd_create", "sealed_memory", errno.EACCES)[2]


def test_no_pidfd():
    usable, reason, remedy = told("pidfd_open", "death_by_pidfd", errno.ENOSYS)
    assert not usable
    assert reason.startswith("pidfd_open: ")
    assert "5.3" in remedy


def test_shm_without_memfds_is_not_usable_and_says_why():
    usable, reason, _ = told("memfd_create", "ShmBackend().viability")
    assert not usable
    assert reason.startswith("memfd_create: ")


def test_shm_needs_no_reading_of_other_processes():
    assert told("process_vm_readv", "ShmBackend().viability")[0]


# --- what doesn't, by what the kernel answers ---


def test_seals_that_do_not_hold(monkeypatch):
    """A kernel that takes the seals and maps the memory to write all the same."""
    monkeypatch.setattr(shm, "SEALS", shm.fcntl.F_SEAL_SHRINK | shm.fcntl.F_SEAL_GROW | shm.fcntl.F_SEAL_SEAL)
    found = shm.sealed_memory()
    assert not found.usable
    assert "not kept" in found.reason


@pytest.mark.parametrize(
    ("code", "scope", "status", "reason", "remedy"),
    [
        (
            errno.EPERM,
            1,
            {"CapEff": "0"},
            "ptrace_scope is 1: a process's ancestors",
            "ptrace_scope=0, or CAP",
        ),
        (
            errno.EPERM,
            2,
            {"CapEff": "0"},
            "ptrace_scope is 2: processes with CAP_SYS_PTRACE",
            "CAP_SYS_PTRACE",
        ),
        (errno.EPERM, 3, {"CapEff": "0"}, "ptrace_scope is 3: nobody", "restart with ptrace_scope 0"),
        (errno.EPERM, 1, {"CapEff": "0", "Seccomp": "2"}, "ptrace_scope is 1", "CAP_SYS_PTRACE"),
        (errno.EPERM, 1, {"CapEff": "80000", "Seccomp": "2"}, "seccomp filter", "profile"),
        (errno.EPERM, 0, {"CapEff": "0", "Seccomp": "2"}, "seccomp filter", "--cap-add SYS_PTRACE"),
        (
            errno.EPERM,
            None,
            {"CapEff": "0", "Seccomp": "0"},
            "isn't dumpable, or a security module",
            "AppArmor",
        ),
        (errno.EPERM, None, {}, "isn't dumpable", "AppArmor"),
        (errno.ENOSYS, 1, {}, "hasn't got it", "CONFIG_CROSS_MEMORY_ATTACH"),
    ],
)
def test_why_a_process_cannot_be_read(code, scope, status, reason, remedy):
    found = shm.why_unreadable(code, scope, status)
    assert not found.usable
    assert reason in found.reason
    assert remedy in found.remedy
    assert "Endpoint.allocate" in found.remedy


def test_a_reader_that_hangs_is_given_up(monkeypatch, tmp_path):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setattr(shm, "TRIAL_S", 0.2)
    began = time.monotonic()
    found = shm.process_memory()
    assert not found.usable
    assert "timed out" in found.reason
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("executable", ["", "/nonexistent/python"])
def test_no_python_to_start(monkeypatch, executable):
    """Python may be embedded in another program."""
    monkeypatch.setattr(sys, "executable", executable)
    found = shm.process_memory()
    assert not found.usable
    assert found.reason.startswith("not tried: ")


def test_tcp_where_nothing_proves_the_peer(monkeypatch):
    monkeypatch.setattr(tcp, "socket_row", lambda local, remote: None)
    found = tcp.TcpBackend().viability()
    assert found.usable  # unix sockets are left
    assert "socket table" in found.reason
    assert [part.usable for _, part in found.parts] == [False, True]


def test_tcp_where_the_peer_is_somebody_else(monkeypatch):
    def refuse(uid, where):
        raise AuthenticationError(f"{where} belongs to uid 65534; be one user")

    monkeypatch.setattr(tcp, "_demand_same_user", refuse)
    found = tcp.TcpBackend().viability()
    assert not found.usable
    assert found.reason.endswith("uid 65534")
    assert found.remedy == "be one user"


UNSHARED = """
import ctypes
flag = {flag}
if ctypes.CDLL(None, use_errno=True).unshare(flag):
    raise SystemExit(77)
from kvtransport.backends.tcp import TcpBackend
for what, part in TcpBackend().viability().parts:
    print(what, part.usable, part.reason, part.remedy, sep="|")
"""


def in_a_namespace(flag):
    code = UNSHARED.format(flag=flag)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this user may not make namespaces")
    assert done.returncode == 0, done.stderr
    return {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}


def test_a_net_namespace_whose_loopback_is_down():
    told = in_a_namespace(CLONE_NEWNET)
    assert told["loopback TCP"] == [
        "False",
        "Network is unreachable",
        "bring loopback up in this net namespace (ip link set lo up)",
    ]
    assert told["unix sockets"][0] == "True"


def test_a_user_namespace_in_which_all_users_look_alike():
    for usable, reason, remedy in in_a_namespace(CLONE_NEWUSER).values():
        assert usable == "False"
        assert "every user that this user namespace doesn't know" in reason
        assert remedy.startswith("map your uid into the namespace")


def test_unix_sockets_without_a_folder_for_them(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    found = tcp.TcpBackend().viability()
    assert found.usable
    assert "no temporary folder" in found.parts[1][1].reason
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 120)))
    (tmp_path / ("x" * 120)).mkdir()
    assert "107 bytes" in tcp.TcpBackend().viability().parts[1][1].reason


# --- what they leave ---


def children():
    """Processes of ours, also those that have ended and were not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while we looked
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(path.parent.name)
    return found


def held():
    return sorted(os.listdir("/proc/self/fd")), threading.active_count(), sorted(children())


@pytest.mark.parametrize("backend", [shm.ShmBackend(), tcp.TcpBackend()], ids=lambda b: b.name)
def test_nothing_stays(backend, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backend.viability()
    before = held()
    backend.viability()
    assert held() == before
    assert list(tmp_path.iterdir()) == []
