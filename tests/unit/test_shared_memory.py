"""Memory that a session shares: what a broken channel costs, and peers in namespaces of their own."""

import contextlib
import logging
import os
import platform
import re
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from kvtransport.acceptor import paths
from kvtransport.acceptor import sharing as acceptor_sharing
from kvtransport.backends.shm import channel_target
from tests.waiting import until

pytestmark = pytest.mark.timeout(60)

PEER = """
import sys
import numpy as np
import kvtransport as kvt

with kvt.Endpoint() as endpoint:
    blocks = np.zeros((16, 1 << 16), np.uint8)
    connection = endpoint.connect(sys.argv[1], timeout=20)
    got = connection.recv_blocks(endpoint.register(blocks), [3, 5], key="k").result(timeout=20)
    assert (blocks[[3, 5]] == [[1], [2]]).all()
    print(got.backend, connection.explain(), sep="\\n", flush=True)
    endpoint.recv_messages(timeout=20)
"""


def socket_of_the_channel(endpoint):
    """This process's end of the channel that was dialled to an endpoint."""
    name = f"\0kvtransport-{endpoint.incarnation.hex()}".encode()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the one that listdir had, and sockets without a peer
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as found:
                if found.family == socket.AF_UNIX and found.getpeername() == name:
                    return found.dup()
    raise AssertionError("there is no channel")


def test_a_channel_that_breaks_costs_no_session():
    sharing = Config(backends=("shm", "tcp"))
    with Endpoint(sharing) as ours, Endpoint(sharing) as theirs:
        there = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        here = theirs.accept(timeout=20)
        assert (there.backend, here.backend) == ("shm", "shm")
        with socket_of_the_channel(theirs) as channel:
            channel.shutdown(socket.SHUT_RDWR)
        until(lambda: (there.backend, here.backend) == ("tcp", "tcp"))
        assert "shm: refused: the channel of shared memory was closed" in there.explain()
        assert {there.shared()[0], here.shared()[0]} == {"none"}

        source, pool = np.full((4, 4096), 7, np.uint8), np.zeros((4, 4096), np.uint8)
        got = here.recv_blocks(theirs.register(pool), [1], key="after")
        there.send_blocks(ours.register(source), [2], key="after").result(timeout=20)
        assert got.result(timeout=20).backend == "tcp"
        assert (pool[1] == 7).all()


@pytest.mark.parametrize(("memory", "way"), [("made", "shm"), ("own", "tcp")])
def test_a_peer_in_namespaces_of_its_own_is_reached_by_a_file(tmp_path, memory, way):
    """As from another container: here its process has a number, there ours has none."""
    apart = ["unshare", "--pid", "--net", "--fork"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces can be made here (unshare)")
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 5):
        pytest.skip("needs SO_PEERPIDFD: Linux 6.5")
    with Endpoint() as endpoint:
        bytes_ = endpoint.allocate(nbytes=1 << 20) if memory == "made" else bytearray(1 << 20)
        blocks = np.frombuffer(bytes_, np.uint8).reshape(16, -1)
        blocks[:] = np.arange(16, dtype=np.uint8)[:, None]
        command = [*apart, sys.executable, "-c", PEER, endpoint.listen(f"unix:{tmp_path}/socket")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
            connection = endpoint.accept(timeout=20)
            sent = connection.send_blocks(endpoint.register(blocks), [1, 2], key="k").result(timeout=20)
            explained = connection.explain()
            connection.send_message(b"seen").result(timeout=20)
            told = peer.communicate(timeout=20)[0]
        assert "it is in another pid namespace" in explained
    assert (sent.backend, told.splitlines()[0]) == (way, way)
    assert "host memory: shm" in told


def lines_of(caplog, level, word):
    return [r.getMessage() for r in caplog.records if r.levelno == level and word in r.getMessage()]


def test_both_sides_tell_that_memory_is_shared_and_that_it_is_not_any_more(caplog):
    sharing = Config(backends=("shm", "tcp"))
    with (
        caplog.at_level(logging.INFO, "kvtransport.paths"),
        Endpoint(sharing) as ours,
        Endpoint(sharing) as theirs,
    ):
        there = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        here = theirs.accept(timeout=20)
        up = {f"memory is shared with {side.peer}" for side in (there, here)}
        until(lambda: len(lines_of(caplog, logging.INFO, "memory is shared")) == 2)
        assert set(lines_of(caplog, logging.INFO, "memory is shared")) == up
        with socket_of_the_channel(theirs) as channel:
            channel.shutdown(socket.SHUT_RDWR)
        until(lambda: len(lines_of(caplog, logging.WARNING, "no longer shared")) == 2)
        told = lines_of(caplog, logging.WARNING, "no longer shared")
        assert all("the channel of shared memory was closed by the peer; " in line for line in told)
        assert {side for side in (there, here) for line in told if str(side.peer) in line} == {there, here}
    assert len(lines_of(caplog, logging.WARNING, "")) == 2


def come_and_go(ours, theirs, where):
    with ours:
        ours.connect(where, timeout=20)
        here = theirs.accept(timeout=20)
        until(lambda: here.backend == "shm")
        with socket_of_the_channel(theirs) as channel:  # the first of what a process lets go of
            channel.shutdown(socket.SHUT_RDWR)
            until(lambda: here.backend == "tcp")
    until(lambda: here.state == "lost")


def test_a_peer_that_closes_is_no_way_that_broke(caplog):
    sharing = Config(backends=("shm", "tcp"))
    with caplog.at_level(logging.INFO, "kvtransport.paths"), Endpoint(sharing) as theirs:
        where = theirs.listen("127.0.0.1:0")
        for _ in range(10):
            come_and_go(Endpoint(sharing), theirs, where)
        loop = theirs._acceptor.loop
        until(lambda: not [when for when, _, _ in loop._timers if when < loop.now() + paths.BROKE_S])
    assert not lines_of(caplog, logging.WARNING, "")


def test_a_channel_that_does_not_come_is_told(caplog, monkeypatch):
    sharing = Config(backends=("shm", "tcp"))
    with (
        caplog.at_level(logging.INFO, "kvtransport.paths"),
        Endpoint(sharing) as ours,
        Endpoint(sharing) as theirs,
    ):
        nobody = channel_target(os.urandom(16))
        monkeypatch.setattr(acceptor_sharing, "channel_target", lambda incarnation: nobody)
        ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        until(lambda: lines_of(caplog, logging.WARNING, "shm is the better way"))
    assert len(lines_of(caplog, logging.WARNING, "")) == 1
