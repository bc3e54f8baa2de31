"""F20: no descriptors are left; sockets take a few bytes at a time; signals interrupt calls."""

import ctypes
import os
import platform
import resource
import signal
import threading

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
