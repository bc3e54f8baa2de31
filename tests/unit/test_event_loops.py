"""What awaits a handle when its endpoint is closed, and what an endpoint keeps of loops that have ended."""

import asyncio
import gc
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from kvtransport.completion import LoopBridges
from kvtransport.errors import ConnectionClosed

LIMIT_S = 20


@pytest.fixture
def link(endpoint):
    """(an endpoint, a receive that nothing comes for)."""
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    pool = ours.register(np.zeros((2, 64), np.uint8))
    return ours, lambda: connection.recv_blocks(pool, [0], key="k")


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def awaiting(transfer):
    """Return a task that is in the middle of awaiting the transfer."""

    async def wait():
        return await transfer

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def ends_closed(task):
    with pytest.raises(ConnectionClosed):
        await asyncio.wait_for(task, LIMIT_S)


@pytest.fixture
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


def test_a_close_in_the_loop_s_own_thread_ends_what_it_awaits(link):
    """The loop runs, and can't turn while `close` does."""
    ours, receive = link

    async def main():
        task = await awaiting(receive())
        ours.close()
        await ends_closed(task)

    asyncio.run(main())


def test_a_close_in_another_thread_ends_what_a_loop_awaits(link):
    ours, receive = link

    async def main():
        task = await awaiting(receive())
        closer = threading.Thread(target=ours.close)
        closer.start()
        await ends_closed(task)
        closer.join(LIMIT_S)

    asyncio.run(main())


def test_a_close_while_the_loop_stands_still_ends_what_it_awaits(link, loop):
    ours, receive = link
    task = loop.run_until_complete(awaiting(receive()))
    ours.close()
    loop.run_until_complete(ends_closed(task))


@pytest.mark.parametrize("running", [True, False])
def test_a_close_takes_the_descriptor_from_a_loop_that_goes_on(endpoint, link, loop, running):
    ours, receive = link
    task = loop.run_until_complete(awaiting(receive()))
    watched = list(ours.bridges._bridges.values())
    fd = watched.pop()._queue.fileno()

    async def close():
        if running:
            ours.close()

    loop.run_until_complete(close())
    ours.close()
    loop.run_until_complete(ends_closed(task))
    loop.run_until_complete(asyncio.sleep(0))
    assert not loop.remove_reader(fd)


def test_a_loop_that_was_closed_in_the_middle_is_no_hindrance(link):
    ours, receive = link
    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(awaiting(receive()))
    loop.close()
    ours.close()
    task.get_coro().close()  # it can't be awaited any more
    task._log_destroy_pending = False


def test_loops_that_have_ended_are_forgotten(link):
    _, receive = link

    async def main():
        transfer = receive()
        task = await awaiting(transfer)
        transfer.cancel()
        await asyncio.wait([task], timeout=LIMIT_S)
        task.exception()

    asyncio.run(main())
    before = descriptors()
    for _ in range(5):
        asyncio.run(main())
    assert descriptors() <= before


@pytest.mark.timeout(60)
def test_a_message_that_waits_can_be_left_and_goes_on(endpoint):
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    peer = theirs.accept(LIMIT_S)
    pool, into = (one.register(np.zeros((2, 64), np.uint8)) for one in (ours, theirs))

    async def main():
        transfer = connection.send_blocks(pool, [0], key="k")
        message = connection.send_message(b"after", after=transfer)
        task = await awaiting(message)
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert task.cancelled()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(message, 0.01)
        assert not message.done()
        assert not transfer.done()
        await peer.recv_blocks(into, [0], key="k")
        await asyncio.wait_for(message, LIMIT_S)

    asyncio.run(asyncio.wait_for(main(), 2 * LIMIT_S))
    assert [data for _, data in theirs.recv_messages(timeout=LIMIT_S)] == [b"after"]


class EndsAtOnce:
    """A loop that says that it runs, and is closed before it can be called."""

    def is_closed(self):
        return False

    def is_running(self):
        return True

    def call_soon_threadsafe(self, call):
        raise RuntimeError("Event loop is closed")


def test_a_loop_that_ends_while_its_endpoint_closes():
    bridges = LoopBridges(lambda: None)
    bridges._bridges = {EndsAtOnce(): SimpleNamespace(_drain=None, close=None) for _ in range(2)}
    bridges.close()
    assert not bridges._bridges
