"""Endpoints that nobody closes: the garbage collector ends them, within whatever step of whichever thread."""

import gc
import os
import threading
import weakref

import numpy as np
import pytest

from kvtransport.acceptor.loop import Loop
from kvtransport.backends.inproc import InprocBackend
from kvtransport.completion import LoopBridges
from kvtransport.config import Config
from kvtransport.endpoint import Endpoint
from tests.waiting import until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _collected_when_told():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def garbage():
    """Make an endpoint that only the garbage collector finds; return (a reference, what it owned)."""
    one = Endpoint(Config(backends=("tcp",)))
    one.itself = one
    return weakref.ref(one), one._acceptor, one._bridges


class Key(bytes):
    """A key whose lookup is interrupted by the garbage collector."""

    def __hash__(self):
        gc.collect()
        return super().__hash__()


class Door:
    pid = 0


def test_a_pool_does_not_keep_its_endpoint():
    one = Endpoint()
    incarnation = one.incarnation
    pool = one.register(np.zeros((4, 64), np.uint8))
    kept = weakref.ref(one)
    del one
    assert kept() is None  # with no help of the garbage collector: there is no cycle
    assert InprocBackend().find(incarnation) is None
    pool.close(timeout=1)


def test_an_endpoint_keeps_its_pools_until_they_are_closed():
    with Endpoint() as one:
        pools = [one.register(np.zeros((4, 64), np.uint8)), one.allocate(nbytes=64)]
        pools[1] = one.register(pools[1])
        assert one.stats()["pools"] == 2
        pools[0].close()
        assert one.stats()["pools"] == 1


def closed_connection(when, where):
    """Make an endpoint with a Connection that is closed; return a reference to the endpoint, when all forget it."""
    one = Endpoint(Config(backends=("tcp",)))
    early = one.connect(where, timeout=3600, wait=False)
    if when == "while it is tried":
        until(lambda: one._acceptor._dials)
    elif when == "when it was open":
        until(lambda: early.state == "open" and not one._acceptor._dials)
    early.close()
    return weakref.ref(one)


@pytest.mark.parametrize("when", ["before its first try", "while it is tried", "when it was open"])
def test_a_closed_connection_does_not_keep_its_endpoint(when):
    with Endpoint(Config(backends=("tcp",))) as there:
        where = there.listen("127.0.0.1:0") if when == "when it was open" else "127.0.0.1:1"
        kept = closed_connection(when, where)
        until(lambda: kept() is None, 5)  # with no help of the garbage collector


@pytest.mark.parametrize("step", ["enter", "find", "leave"])
def test_within_a_step_among_the_endpoints_of_this_process(step):
    backend, door, key = InprocBackend(), Door(), Key(16)
    backend.enter(b"another", door)  # so that there is something to look through
    reference, *_ = garbage()
    {
        "enter": lambda: backend.enter(key, door),
        "find": lambda: backend.find(key),
        "leave": lambda: backend.leave(key),
    }[step]()
    assert reference() is None
    backend.leave(key)


def test_an_endpoint_of_another_process_is_not_found():
    backend, door = InprocBackend(), Door()
    backend.enter(bytes(16), door)
    assert backend.find(bytes(16)) is None
    door.pid = os.getpid()
    assert backend.find(bytes(16)) is door
    backend.leave(bytes(16))


def test_within_a_step_of_its_own_thread():
    reference, acceptor, _ = garbage()
    loop: Loop = acceptor.loop
    seen = []

    def interrupted():
        with loop._state:
            gc.collect()
            seen.append(reference())

    assert loop.post(interrupted)
    assert loop._stopped.wait(20), "the thread waits for itself"
    assert seen == [None]
    assert not loop.post(lambda: None)


def test_within_a_call_that_its_own_thread_is_given():
    """Between the look at whether the thread runs and the word that wakes it, it may have ended."""

    class Interrupts(Loop):
        def __init__(self):
            super().__init__("test")
            self._posted = Queue()

    class Queue(list):
        def append(self, call):
            super().append(call)
            loop.stop(lambda: None, 0.0)
            loop._close()

    loop = Interrupts()
    assert loop.post(lambda: None)


def test_within_a_step_of_a_handle_that_outlives_it():
    reference, _, bridges = garbage()
    done = threading.Event()

    def interrupted():
        with bridges._lock:
            gc.collect()
        done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(20), "the thread waits for itself"
    assert reference() is None
    assert isinstance(bridges, LoopBridges)


def test_many_forgotten_while_others_are_made():
    gc.enable()
    before = threading.active_count()
    thresholds = gc.get_threshold()
    try:
        for threshold in range(1, 40):
            garbage()
            gc.set_threshold(threshold, 1, 1)
            Endpoint().close()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert threading.active_count() <= before
