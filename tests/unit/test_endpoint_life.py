"""An endpoint's end in every form: closed, forgotten, forked, killed; and short of descriptors or the GIL."""

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import numpy as np
import pytest

from kvtransport.config import Config
from kvtransport.endpoint import Endpoint
from kvtransport.errors import ConnectionClosed, ForkedProcessError, PeerLost, ResourceLimit
from tests.waiting import until

TCP = Config(backends=("tcp",))
PRELUDE = """
import os, sys, time
from kvtransport.config import Config
from kvtransport.endpoint import Endpoint
ep = Endpoint(Config(backends=("tcp",)))
"""


def process(code, *arguments):
    """Start a Python process that has an endpoint `ep`, and then runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(child):
    """Return the child's next line, within 20 s."""
    assert select.select([child.stdout], [], [], 20)[0], "the child says nothing"
    return child.stdout.readline().strip()


def end(child):
    child.stdin.close()
    status = child.wait(20)
    child.stdout.close()
    return status


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_behind():
    def once():
        with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
            where = theirs.listen("127.0.0.1:0")
            ours.connect(where)
            theirs.accept()
            ours.connect("127.0.0.1:1", timeout=60, wait=False)

    once()
    gc.collect()
    before = descriptors(), threading.active_count()
    for _ in range(5):
        once()
    gc.collect()
    assert (descriptors(), threading.active_count()) == before


def test_close_ends_a_wait_for_messages():
    ours = Endpoint(TCP)
    raised = []

    def wait():
        try:
            ours.recv_messages(timeout=None)
        except ConnectionClosed as error:
            raised.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    ours.close()
    for thread in threads:
        thread.join(10)
    assert len(raised) == 3


def test_close_closes_every_descriptor_while_the_objects_live():
    threading.Event().wait(0)
    with Endpoint(TCP) as warm:  # what a process or a thread has once
        warm.recv_messages(timeout=0)
    before = set(os.listdir("/proc/self/fd"))
    ours, theirs = Endpoint(TCP), Endpoint(TCP)
    where = theirs.listen("127.0.0.1:0")
    connection, accepted = ours.connect(where), theirs.accept()
    pool = ours.register(np.zeros((4, 64), np.uint8))
    transfer = connection.send_blocks(pool, [0], key="k")
    for endpoint in (ours, theirs):
        endpoint.close()
        threads = [one.name for one in threading.enumerate() if one.is_alive()]
        assert endpoint._acceptor.loop._thread.name not in threads
    assert set(os.listdir("/proc/self/fd")) <= before
    for call in (
        ours.recv_messages, ours.accept, ours.descriptor, ours.stats, ours.connections,
        lambda: ours.listen("127.0.0.1:0"), lambda: ours.connect(where), lambda: ours.register(bytearray(8)),
        lambda: connection.send_message(b"late"), lambda: connection.recv_blocks(pool, [1], key="late"),
        lambda: connection.refuse("k", "late"), transfer.result,
    ):  # fmt: skip
        with pytest.raises(ConnectionClosed):
            call()
    transfer.cancel()
    pool.close(timeout=1)
    connection.close()
    assert (connection.state, accepted.state) == ("lost", "lost")


def test_the_native_engine_raises_once_it_is_closed():
    ours = Endpoint(TCP)
    ours.close()
    engine = ours.engine
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        for call in (lambda: engine.new_session(bytes(16)), lambda: engine.add_listener(sock.fileno())):
            with pytest.raises(ConnectionClosed):
                call()
    assert engine.recv_messages(0) == []
    assert engine.poll_events() == []
    engine.close()


def test_a_lost_connection_holds_no_descriptor(turns):
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        where = theirs.listen("127.0.0.1:0")
        ours.connect(where).close()
        theirs.accept()
        turns.until(lambda: not theirs.connections())
        before = descriptors()
        kept = []
        for _ in range(3):
            kept += [ours.connect(where), theirs.accept()]
            kept[-2].close()
            turns.until(lambda: not theirs.connections())
        until(lambda: descriptors() <= before)


def test_an_endpoint_that_is_forgotten_ends():
    endpoint = Endpoint(TCP)
    endpoint.listen("127.0.0.1:0")
    thread, gone = endpoint._acceptor.loop._thread, weakref.ref(endpoint)
    del endpoint
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("how", ["pass", "sys.exit(0)", "ep.close(); ep.close()", "del ep"])
def test_f21_the_interpreters_exit_does_not_hang(turns, how):
    with Endpoint(TCP) as ours:
        where = ours.listen("127.0.0.1:0")
        child = process(f"""
            conn = ep.connect(sys.argv[1])
            ep.connect("127.0.0.1:1", timeout=60, wait=False)
            import threading
            threading.Thread(target=lambda: ep.accept(timeout=None), daemon=True).start()
            print("here", flush=True)
            sys.stdin.read()
            {how}
        """, where)  # fmt: skip
        assert line_of(child) == "here"
        before = time.monotonic()
        assert end(child) == 0
        assert time.monotonic() - before < 2.5
        turns.until(lambda: not ours.connections())


def test_f21_a_forked_child_is_told():
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        where = theirs.listen("127.0.0.1:0")
        connection = ours.connect(where)
        accepted = theirs.accept()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for call in (ours.descriptor, ours.accept, lambda: ours.connect(where), ours.recv_messages):
                    with pytest.raises(ForkedProcessError):
                        call()
                ours.close()
                with Endpoint(TCP) as mine, Endpoint(TCP) as other:  # of its own they work
                    assert mine.connect(other.listen("127.0.0.1:0")).state == "open"
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert connection.state == accepted.state == "open"
        connection.send_message(b"still here").result(10)
        assert theirs.recv_messages(timeout=10) == [(accepted, b"still here")]


def test_f1_a_forked_child_does_not_keep_its_parents_connections(turns):
    with Endpoint(TCP) as ours:
        where = ours.listen("127.0.0.1:0")
        child = process(
            """
            ep.connect(sys.argv[1])
            ep.listen("127.0.0.1:0")
            pid = os.fork()
            if pid == 0:
                sys.stdin.read()
                os._exit(0)
            print(pid, flush=True)
            sys.stdin.read()
            """,
            where,
        )
        grandchild = int(line_of(child))
        accepted = ours.accept()
        try:
            os.kill(child.pid, signal.SIGKILL)
            turns.until(lambda: accepted._error is not None, 2)
            assert isinstance(accepted._error, PeerLost)
        finally:
            os.kill(grandchild, signal.SIGKILL)
            end(child)


def test_f17_a_peer_that_restarts_at_its_address(turns):
    code = "print(ep.listen(sys.argv[1]), flush=True); sys.stdin.read(); os._exit(0)"
    with Endpoint(TCP) as ours:
        first = process(code, "127.0.0.1:0")
        where = line_of(first)
        before = ours.connect(where)
        first.kill()
        end(first)
        second = process(code, where)
        assert line_of(second) == where
        after = ours.connect(where)
        assert after is not before
        assert after.peer.incarnation != before.peer.incarnation
        turns.until(lambda: before._error is not None)
        assert before.state == "lost"
        assert isinstance(before._error, PeerLost)
        assert before._error.cause == "restarted"
        end(second)


def test_f20_out_of_descriptors():
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        where = theirs.listen("127.0.0.1:0")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        taken = max(
            map(int, os.listdir("/proc/self/fd"))
        )  # endpoints of other tests hold some until collected
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, taken + 64), hard))
        try:
            while True:
                try:
                    held.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            with pytest.raises(ResourceLimit, match="ulimit"):
                ours.connect(where, timeout=0.3)
            with pytest.raises(ResourceLimit, match=r"files|descriptors"):
                Endpoint(TCP)
            for fd in held[:3]:  # enough to dial, not to accept
                os.close(fd)
            future = ours._acceptor.connect(where, 20)
            for fd in held[3:]:
                os.close(fd)
            assert future.result(20).state == "open"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert theirs.accept().state == "open"


def test_a_peer_whose_process_holds_the_gil():
    child = process(
        """
        import ctypes
        print(ep.listen("127.0.0.1:0"), flush=True)
        hog = ctypes.PyDLL(None).usleep  # PyDLL: with the GIL held
        for _ in range(60):
            hog(1_000_000)
            time.sleep(0.005)
        """
    )
    try:
        with Endpoint(TCP) as ours:
            assert ours.connect(line_of(child), timeout=20).state == "open"
    finally:
        child.kill()
        end(child)


def test_a_stranger_is_not_charged_for_our_wait_for_the_gil():
    ours = Endpoint(Config(backends=("tcp",), handshake_timeout_s=0.5))
    with ours, Endpoint(TCP) as theirs:
        where = ours.listen("127.0.0.1:0")
        future = theirs._acceptor.connect(where, 20)
        for _ in range(3):
            ctypes.PyDLL(None).usleep(700_000)
            time.sleep(0.005)
        assert future.result(20).state == "open"
        assert ours.stats()["handshakes_refused"] == 0


def test_close_from_many_threads():
    ours = Endpoint(TCP)
    threads = [threading.Thread(target=ours.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    with pytest.raises(ConnectionClosed):
        ours.listen("127.0.0.1:0")


def test_an_idle_endpoint_sleeps(turns):
    with Endpoint(TCP) as ours, Endpoint(TCP) as theirs:
        ours.connect(theirs.listen("127.0.0.1:0"))
        woken = []
        for one in (ours, theirs):
            known = one._acceptor.loop._turn
            one._acceptor.loop._turn = lambda known=known: (woken.append(1), known())
        turns.until(lambda: not theirs._acceptor._strangers)
        select.select([], [], [], 0.2)  # what was due comes to rest
        woken.clear()
        select.select([], [], [], 0.5)
        assert len(woken) <= 2


def test_listen_while_it_closes(tmp_path):
    with Endpoint(TCP) as ours:
        ours._acceptor.stop()
        with pytest.raises(ConnectionClosed):
            ours._acceptor.listen(f"unix:{tmp_path}/late", ())
    assert not list(tmp_path.iterdir())
