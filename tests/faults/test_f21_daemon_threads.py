"""F21: the interpreter ends while daemon threads wait in the engine, or call it again and again."""

import subprocess
import sys
import textwrap
import time

import pytest

SCRIPT = """
import threading, time
import numpy as np
import kvtransport as kvt

ours, theirs = (kvt.Endpoint(kvt.Config(backends=("tcp",))) for _ in "ab")
there = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
here = theirs.accept(timeout=20)
of, to = (endpoint.register(np.zeros((64, 4096), np.uint8)) for endpoint in (ours, theirs))
never = here.recv_blocks(to, [63], key="never")
started = []


def thread(call):
    def run():
        started.append(1)
        call()
    threading.Thread(target=run, daemon=True).start()


def again(call):
    # Until the process ends: not even an error stops it.
    while True:
        try:
            call()
        except kvt.KVTransportError:
            pass


def moves(n):
    sent = there.send_blocks(of, [n], key=f"k{n}")
    here.recv_blocks(to, [n], key=f"k{n}").result()
    sent.result()


WAITS = [
    lambda: ours.recv_messages(timeout=None),
    lambda: never.result(),
    lambda: never.wait_layer(0),
    lambda: kvt.wait([never]),
    lambda: to.close(timeout=None),
    lambda: ours.accept(timeout=None),
]
"""

HOW = {
    "waiting": """
        for wait in WAITS:
            thread(wait)
        while len(started) < len(WAITS):
            time.sleep(0.01)
    """,
    "waiting-again": """
        for wait in WAITS[:4] + WAITS[5:]:
            thread(lambda wait=wait: again(wait))
        while len(started) < 5:
            time.sleep(0.01)
    """,
    "posting": """
        for n in range(4):
            thread(lambda n=n: again(lambda: moves(n)))
        while there.stats()["sends_ok"] < 20:
            time.sleep(0.01)
    """,
}


@pytest.mark.parametrize("how", HOW)
def test_f21_exit_with_daemon_threads(how):
    """Several times: what goes wrong then is a race."""
    code = SCRIPT + textwrap.dedent(HOW[how]) + "print(time.monotonic(), flush=True)\n"
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
        )
        took = time.monotonic() - float(done.stdout or "nan")
        assert (done.returncode, done.stderr.count("terminate"), done.stderr.count("leaked")) == (0, 0, 0), (
            done.stderr
        )
        assert took < 2 + 1  # two, and the interpreter's own on a busy machine
