"""F21: a process is forked while its threads hold the locks of a connection, of a queue, of event loops."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from tests.faults.test_f21_forked_calls import FORKED, in_a_child

pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def held_by_a_thread(*locks):
    """While a thread has taken them, as one may have that is in the midst of a call."""
    taken, enough = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            taken.set()
            enough.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(10)
        yield
    finally:
        enough.set()
        thread.join(30)


async def awaited(handle):
    return await handle


def with_it(connection):
    with connection:
        pass


def test_f21_no_call_of_a_child_waits_for_a_thread_of_its_parent():
    with Endpoint(Config(backends=("tcp",))) as ours, Endpoint(Config(backends=("tcp",))) as theirs:
        connection = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        early = ours.connect("127.0.0.1:1", timeout=60, wait=False)
        queue, pool = ours.completion_queue(), ours.register(np.zeros((4, 64), np.uint8))
        waits = connection.recv_blocks(pool, [0], key="k", queue=queue)
        calls = {
            "poll": queue.poll,
            "close": connection.close,
            "close of one that is connecting": early.close,
            "with": lambda: with_it(connection),
            "await": lambda: asyncio.run(awaited(waits)),
            "post": lambda: connection.recv_blocks(pool, [1], key="l", queue=queue),
            "message": lambda: connection.send_message(b"x", queue=queue),
        }
        acceptor = ours._acceptor
        locks = (
            connection._lock,
            early._lock,
            queue._lock,
            ours._bridges._lock,
            ours._lock,
            acceptor._lock,
            acceptor.roster.lock,
        )
        with held_by_a_thread(*locks):
            found = in_a_child({**calls, "state": lambda: connection.state})
        assert found == {**dict.fromkeys(calls, FORKED), "state": "'open'"}
        assert connection.state == "open"


def test_f21_errors_of_a_child_name_the_peer():
    with Endpoint(Config(backends=("tcp",))) as ours, Endpoint(Config(backends=("tcp",))) as theirs:
        connection = ours.connect(theirs.listen("127.0.0.1:0"), timeout=20)
        pool = ours.register(np.zeros((4, 64), np.uint8))

        def named(call):
            try:
                call()
            except Exception as error:
                return type(error).__name__, error.peer, error.backend

        calls = {
            "refuse": lambda: named(lambda: connection.refuse("k", "in the child")),
            "message": lambda: named(lambda: connection.send_message(b"x")),
            "post": lambda: named(lambda: connection.recv_blocks(pool, [0], key="k")),
        }
        told = repr((FORKED, str(connection.peer), "tcp"))
        assert in_a_child(calls) == dict.fromkeys(calls, told)
