"""F20: no descriptors, threads or memory are left; sockets take a few bytes at a time; signals interrupt calls.

ENOSPC can't happen: this version's backends write no file and make no shared memory.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from kvtransport import Config, ConnectTimeout, Endpoint
from tests.faults.peers import IDS, OF, TO

TGKILL = ctypes.CDLL(None, use_errno=True).syscall
SYS_TGKILL = {"x86_64": 234, "aarch64": 131}[platform.machine()]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_f20_the_accept_loop_survives_emfile(far):
    """Who comes then gets no session, who is there keeps his; with descriptors again all is well."""
    peer = far("peer")
    where = peer.call("listen", address="127.0.0.1:0")
    with Endpoint(Config(backends=("tcp",))) as first, Endpoint(Config(backends=("tcp",))) as second:
        connection = first.connect(where)
        peer.call("accept")
        pool = prepared(first, peer, "t")
        before = resource.prlimit(peer.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(peer.pid, resource.RLIMIT_NOFILE, (descriptors(peer.pid), before[1]))
        with pytest.raises(ConnectTimeout):
            second.connect(where, timeout=1)
        moves(pool, connection, peer, "t")
        resource.prlimit(peer.pid, resource.RLIMIT_NOFILE, before)
        later = second.connect(where, timeout=20)
        peer.call("accept")
        moves(prepared(second, peer, "u"), later, peer, "u")
        assert connection.state == later.state == "open"


NO_MEMORY = """
import json, os, resource, signal
import numpy as np
import kvtransport as kvt

MIB = 1 << 20
limits = resource.getrlimit(resource.RLIMIT_AS)
config = kvt.Config(backends=("tcp",))

def short(extra, call):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, limits[1]))
    try:
        call()
        return "ok"
    except Exception as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

def state():
    tasks, descriptors = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
    return len(tasks), len(descriptors), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

before = state()
made = [short(extra * MIB, lambda: kvt.Endpoint(config).close()) for extra in range(24)]
after = state()
with kvt.Endpoint(config) as ours, kvt.Endpoint(config) as theirs:
    there, here = ours.connect(theirs.listen("127.0.0.1:0")), theirs.accept()
    of = np.arange(MIB, dtype=np.uint64).reshape(128, -1)
    to = np.zeros_like(of)
    source, target = ours.register(of), theirs.register(to)
    allocated = short(64 * MIB, lambda: ours.allocate(nbytes=1 << 40))
    ids = np.arange(128)
    posts = [(here.recv_blocks, target), (there.send_blocks, source)]
    moved = short(0, lambda: kvt.wait([post(pool, ids, key="k") for post, pool in posts], timeout=20))
    right = bool((of == to).all())
print(json.dumps([before == after, made, allocated, moved, right]))
"""


def test_f20_no_descriptor_at_all_spins_nobody(caplog):
    """Not even the reserve is left: the listener rests, says so once, and lets the next one in later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Endpoint(Config(backends=("tcp",))) as ours:
        host, port = ours.listen("127.0.0.1:0").rsplit(":", 1)
        client = socket.create_connection(
            (host, int(port))
        )  # before the limit: as another process's would be
        late = socket.socket()
        ours.recv_messages(timeout=0)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            late.connect((host, int(port)))
            began = time.process_time()
            threading.Event().wait(1.0)
            used = time.process_time() - began
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert used < 0.3, f"{used:.2f} s of CPU time in a second of waiting"
        with Endpoint(Config(backends=("tcp",))) as theirs:
            assert theirs.connect(f"{host}:{port}", timeout=10).state == "open"
        client.close()
        late.close()
    assert sum("out of file descriptors" in line.message for line in caplog.records) == 1


def test_f20_no_memory():
    """An Endpoint that can't have its threads is none, and leaves nothing; running ones go on without a new page."""
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    clean, made, allocated, moved, right = json.loads(done.stdout)
    assert set(made) == {"ResourceLimit", "ok"}
    assert made == sorted(made)  # and from some limit on there is enough
    assert (clean, allocated, moved, right) == (True, "ResourceLimit", "ok", True)


@pytest.mark.parametrize("we_receive", [True, False])
def test_f20_tiny_socket_buffers(tcp, we_receive):
    """Every write is short, every other one would block: no byte is lost."""
    with tcp.rig(lanes=2, socket_buffer_nbytes=16384) as rig:
        source, destination = (rig.peer, rig.here) if we_receive else (rig.here, rig.peer)
        source.pool("of", OF)
        destination.pool("to", TO)
        for n in range(3):
            destination.recv(f"t{n}", "to", IDS)
            source.send(f"t{n}", "of", IDS[::-1])
            destination.result(f"t{n}")
            source.result(f"t{n}")
            destination.holds("to", TO.after(OF, IDS, IDS[::-1]))


def test_f20_interrupted_calls(tcp):
    """EINTR on whichever thread takes the signal, all the time that transfers run."""
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    over = threading.Event()

    def pester() -> None:
        own = threading.get_native_id()
        while not over.is_set():
            for task in os.listdir("/proc/self/task"):
                if int(task) != own and not over.is_set():
                    TGKILL(SYS_TGKILL, os.getpid(), int(task), int(signal.SIGUSR1))

    pesterer = threading.Thread(target=pester)
    try:
        with tcp.rig() as rig:
            rig.here.pool("of", OF)
            rig.peer.pool("to", TO)
            pesterer.start()
            for n in range(20):
                rig.peer.recv(f"t{n}", "to", IDS)
                rig.here.send(f"t{n}", "of", IDS)
                rig.here.result(f"t{n}")
                rig.peer.result(f"t{n}")
            over.set()
            pesterer.join(20)
            rig.peer.holds("to", TO.after(OF, IDS, IDS))
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, old)


def prepared(endpoint, side, key: str):
    """Register memory on both sides."""
    side.pool(key, TO)
    return endpoint.register(OF.views(OF.memory()))


def moves(pool, connection, side, key: str) -> None:
    """Send some blocks, and see them arrive."""
    side.recv(key, key, IDS)
    connection.send_blocks(pool, IDS, key=key).result(20)
    side.result(key)
    side.holds(key, TO.after(OF, IDS, IDS))
