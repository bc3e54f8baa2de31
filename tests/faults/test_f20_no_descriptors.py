"""F20: calls that need a descriptor where none is left: ResourceLimit, and nothing half done stays."""

import contextlib
import os
import resource
import socket
import threading

import numpy as np
import pytest

from kvtransport import Config, Endpoint, wait
from kvtransport.errors import ConnectionClosed, ResourceLimit

TCP = Config(backends=("tcp",))


@contextlib.contextmanager
def descriptors(left: int):
    """Leave this process so many more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(0))
        for fd in held[:left]:
            os.close(fd)
        del held[:left]
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def error_in_a_thread(call):
    """Return what it raises in a thread that has never waited: the first wait of a thread takes a descriptor."""
    raised = []

    def run():
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert raised, "it raises nothing"
    return raised[0]


@pytest.mark.parametrize("how", ["result", "wait_layer", "wait"])
def test_f20_a_wait_without_a_descriptor(how):
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        connection = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        accepted = theirs.accept(timeout=20)
        pool, of = (one.register(np.ones((4, 4096), np.uint8)) for one in (ours, theirs))
        transfer = connection.recv_blocks(pool, [0], key="k")
        calls = {
            "result": lambda: transfer.result(1),
            "wait_layer": lambda: transfer.wait_layer(0, timeout=1),
            "wait": lambda: wait([transfer], timeout=1),
        }
        with descriptors(0):
            error = error_in_a_thread(calls[how])
        assert type(error) is ResourceLimit
        assert "ulimit -n" in str(error)
        accepted.send_blocks(of, [0], key="k").result(20)
        assert transfer.result(20).nbytes == 4096


def test_f20_a_queue_without_a_descriptor():
    with Endpoint(TCP) as ours:
        with descriptors(0), pytest.raises(ResourceLimit, match="ulimit -n"):
            ours.completion_queue()
        assert ours.completion_queue().poll() == []


@pytest.mark.parametrize("left", [0, 1])
def test_f20_listening_without_a_descriptor(left):
    """With one there is a socket, but none for the engine."""
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        with descriptors(left), pytest.raises(ResourceLimit, match="ulimit -n"):
            ours.listen("127.0.0.1:0")
        assert ours._acceptor.addresses() == ()
        assert ours._acceptor._listeners == {}
        assert theirs.connect(ours.listen("127.0.0.1:0"), timeout=20).state == "open"


def test_f20_a_session_that_is_not_opened_closes_its_socket():
    with Endpoint(TCP) as ours:
        engine = ours.engine
    near, far = socket.socketpair()
    with far:
        with pytest.raises(ConnectionClosed):
            engine.open_session(
                near.detach(),
                session_id=bytes(16),
                protection="plain",
                lanes=1,
                chunk_nbytes=0,
                peer_pid=0,
            )
        far.settimeout(10)
        assert far.recv(1) == b""
