"""F21: fork() after init, close with transfers in flight, the interpreter's exit, a second close."""

import json
import select
import subprocess
import sys
import textwrap
import time

import pytest

from kvtransport import Config, Endpoint
from kvtransport.errors import ConnectionClosed, PeerLost
from tests.faults.peers import (
    FRAME,
    HEADER,
    IDS,
    SLOW_S,
    TO,
    check_delivered,
    check_landed,
    check_states,
    check_untouched,
    post,
    rewrite,
    within,
)
from tests.faults.proxy import Fault

SCRIPT = """
import asyncio, json, os, sys, time
import numpy as np
import kvtransport as kvt

endpoint = kvt.Endpoint(kvt.Config(backends=("tcp",)))
connection = endpoint.connect(sys.argv[1], timeout=20)
pool = endpoint.register(np.zeros((4, 4096), np.uint8))
pending = [connection.recv_blocks(pool, [i], key=f"k{i}") for i in range(4)]
message = connection.send_message(b"here").result(20)

async def awaited(transfer):
    return await transfer


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"
"""

FORKS = """
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    found = {
        "listen": error_of(lambda: endpoint.listen("127.0.0.1:0")),
        "connect": error_of(lambda: endpoint.connect(sys.argv[1], timeout=1)),
        "accept": error_of(lambda: endpoint.accept(timeout=1)),
        "register": error_of(lambda: endpoint.register(np.zeros((4, 4096), np.uint8))),
        "send": error_of(lambda: connection.send_blocks(pool, [0], key="child")),
        "recv": error_of(lambda: connection.recv_blocks(pool, [3], key="child")),
        "message": error_of(lambda: connection.send_message(b"child")),
        "result": error_of(lambda: pending[0].result(timeout=5)),
        "messages": error_of(lambda: endpoint.recv_messages()),
        "wait": error_of(lambda: kvt.wait(pending, timeout=5)),
        "await": error_of(lambda: asyncio.run(asyncio.wait_for(awaited(pending[0]), 5))),
        "state": error_of(lambda: pending[0].state),
        "progress": error_of(lambda: pending[0].progress()),
        "stats": error_of(lambda: connection.stats()),
    }
    endpoint.close()
    with kvt.Endpoint(kvt.Config(backends=("tcp",))) as own:
        found["own"] = own.connect(sys.argv[1], timeout=20).state
    os.write(write, json.dumps(found).encode())
    os._exit(0)
os.close(write)
said = b""
while more := os.read(read, 65536):
    said += more
status = os.waitpid(pid, 0)[1]
print(said.decode(), status, connection.state, sep="|", flush=True)
sys.stdin.read()
"""


def run(code: str, where: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + textwrap.dedent(code), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(child: subprocess.Popen) -> str:
    assert select.select([child.stdout], [], [], 30)[0], "the process says nothing"
    return child.stdout.readline().strip()


def end(child: subprocess.Popen) -> int:
    child.stdin.close()
    try:
        return child.wait(20)
    finally:
        child.kill()
        child.stdout.close()


def test_f21_fork_after_init():
    """Every call of the child's raises ForkedProcessError, none hangs; the parent goes on."""
    with Endpoint(Config(backends=("tcp",))) as ours:
        child = run(FORKS, ours.listen("127.0.0.1:0"))
        try:
            found, status, state = line_of(child).split("|")
        finally:
            code = end(child)
    assert (status, state, code) == ("0", "open", 0)
    errors = json.loads(found)
    assert errors.pop("own") == "open"
    assert errors == dict.fromkeys(errors, "ForkedProcessError")


@pytest.mark.parametrize("how", ["pass", "endpoint.close(); endpoint.close()", "del endpoint", "sys.exit(3)"])
def test_f21_exit_with_transfers_in_flight(how):
    """It takes less than two seconds, ends without a signal, and the peer knows."""
    with Endpoint(Config(backends=("tcp",))) as ours:
        child = run(f"print('ready', flush=True); sys.stdin.read(); {how}", ours.listen("127.0.0.1:0"))
        connection = ours.accept(timeout=20)
        pool = ours.register(TO.views(TO.memory()))
        waits = connection.recv_blocks(pool, [0], key="never")
        try:
            assert line_of(child) == "ready"
        finally:
            start = time.monotonic()
            code = end(child)
        assert time.monotonic() - start < 2 + 1  # two, and the interpreter's own on a busy machine
        assert code == (3 if "exit" in how else 0)
        with pytest.raises(PeerLost) as caught:
            waits.result(10)
        assert caught.value.cause in ("closed", "reset")


@pytest.mark.parametrize("whole", [True, False], ids=["endpoint", "connection"])
def test_f21_close_with_transfers_in_flight(tcp, whole):
    held = Fault("lane", "down", 2 * FRAME + HEADER + 1000, "hold")
    with tcp.linked(held) as rig:
        peer, here = rig.peer, rig.here
        post(peer, here)
        here.recv("alone", "to", [])
        assert held.reached.wait(20)
        closed = here.actor.endpoint if whole else here.actor.connection
        with within(2):
            closed.close()
            closed.close()
        transfer = here.actor.handles["t"]
        with within(SLOW_S):
            error = here.error("t")
        assert transfer.done()
        assert type(error) is ConnectionClosed
        sealed = [block for block in IDS if block not in error.failed_block_ids]
        assert sealed in ([], [0], [0, 1])
        check_states(error, sealed)
        check_landed(here, sealed)
        rewrite(here)
        held.go.set()
        theirs = peer.error("t")
        assert type(theirs) is PeerLost
        assert theirs.cause == "closed"
        check_delivered(theirs)
        tcp.proxy.close()
        check_untouched(here)
