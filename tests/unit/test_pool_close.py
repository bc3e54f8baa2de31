"""A pool's end while transfers still use its memory, by one thread or several: closed means that none does."""

import threading
import time
import weakref

import numpy as np
import pytest

from kvtransport.errors import LocalProtocolError, WaitTimeout
from tests.waiting import until


@pytest.fixture
def link(endpoint):
    """Return an endpoint and a connection of it."""
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    theirs.accept()
    return ours, connection


def refused(connection, pool) -> bool:
    """Post once; say whether the pool takes no post. What it took is ended."""
    try:
        connection.recv_blocks(pool, [1], key="probe").cancel()
    except LocalProtocolError as error:
        return "closed" in str(error)
    return False


class Closer(threading.Thread):
    """pool.close in a thread."""

    def __init__(self, pool, timeout) -> None:
        super().__init__()
        self.error = None
        self._pool, self._timeout = pool, timeout
        self.start()

    def run(self) -> None:
        try:
            self._pool.close(timeout=self._timeout)
        except WaitTimeout as error:
            self.error = error


def test_a_second_close_does_not_succeed_while_the_memory_is_used(link):
    ours, connection = link
    array = np.zeros((4, 4096), np.uint8)
    kept = weakref.ref(array)
    pool = ours.register(array)
    del array
    transfer = connection.recv_blocks(pool, [0], key="k")
    first = Closer(pool, None)
    until(lambda: refused(connection, pool))
    with pytest.raises(WaitTimeout, match="1 transfers"):
        pool.close(timeout=0.1)
    assert kept() is not None
    assert not pool.closed
    assert not transfer.done()
    transfer.cancel()
    first.join(20)
    assert first.error is None
    assert pool.closed
    pool.close(timeout=0)


def test_a_pool_stays_shut_as_long_as_somebody_closes_it(link):
    """Longer than one slice of the wait, and while another who closes it gives up."""
    ours, connection = link
    pool = ours.register(np.zeros((4, 4096), np.uint8))
    transfer = connection.recv_blocks(pool, [0], key="k")
    first = Closer(pool, None)
    until(lambda: refused(connection, pool))
    second = Closer(pool, 0.1)
    end = time.monotonic() + 0.7
    posts = [refused(connection, pool)]
    while time.monotonic() < end:
        posts.append(refused(connection, pool))
    assert all(posts)
    second.join(20)
    assert second.error is not None
    transfer.cancel()
    first.join(20)
    assert first.error is None


def test_a_close_that_gave_up_leaves_the_pool_open(link):
    ours, connection = link
    pool = ours.register(np.zeros((4, 4096), np.uint8))
    transfer = connection.recv_blocks(pool, [0], key="k")
    with pytest.raises(WaitTimeout):
        pool.close(timeout=0)
    assert not refused(connection, pool)
    transfer.cancel()
    pool.close()
    assert refused(connection, pool)
