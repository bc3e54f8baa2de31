"""A negative number of seconds: a wait looks once and returns, a limit is refused. None of it means for ever."""

import asyncio

import numpy as np
import pytest

from kvtransport import ConnectTimeout, wait
from kvtransport.errors import WaitTimeout

LIMIT_S = 20


@pytest.fixture
def ours(endpoint):
    return endpoint()


@pytest.fixture
def connection(endpoint, ours):
    return ours.connect(endpoint().listen("127.0.0.1:0"))


@pytest.fixture
def pool(ours):
    return ours.register(np.zeros((4, 64), np.uint8))


@pytest.fixture
def receive(connection, pool):
    """A receive that nothing comes for."""
    return connection.recv_blocks(pool, [0], key="k")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("seconds", [-0.1, -1, -1e9, float("-inf")])
def test_waits_look_once(ours, receive, seconds):
    assert ours.recv_messages(timeout=seconds) == []
    assert wait([receive], timeout=seconds) == ([], [receive])
    for call in (
        lambda: receive.result(timeout=seconds),
        lambda: receive.wait_layer(0, timeout=seconds),
        lambda: ours.accept(timeout=seconds),
    ):
        with pytest.raises(WaitTimeout):
            call()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("seconds", [-0.1, -1, -1e9])
def test_a_pool_s_end(pool, receive, seconds):
    with pytest.raises(WaitTimeout):
        pool.close(timeout=seconds)
    assert not pool.closed


@pytest.mark.timeout(30)
def test_connecting(ours, free_port):
    where = f"127.0.0.1:{free_port}"
    with pytest.raises(ConnectTimeout):
        ours.connect(where, timeout=-1)
    with pytest.raises(ConnectTimeout):
        asyncio.run(ours.connect_async(where, timeout=-1))


@pytest.mark.timeout(30)
def test_a_wait_that_has_its_answer_gives_it(endpoint, ours):
    theirs = endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    theirs.accept()
    message = connection.send_message(b"x")
    message.result(LIMIT_S)
    assert message.result(timeout=-1) is None
    assert wait([message], timeout=-1) == ([message], [])
    assert [data for _, data in theirs.recv_messages(timeout=-1)] == [b"x"]


LIMITS = ("match_timeout_s", "stall_timeout_s", "timeout_s")


@pytest.mark.parametrize("seconds", [-0.5, -1, float("nan")])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_a_transfer(connection, pool, limit, seconds):
    for post in (connection.send_blocks, connection.recv_blocks):
        with pytest.raises(ValueError, match=limit):
            post(pool, [0], key="k", **{limit: seconds})


@pytest.mark.parametrize("seconds", [-0.5, -1, float("nan")])
def test_how_long_a_refusal_is_remembered(connection, seconds):
    with pytest.raises(ValueError, match="remember_s"):
        connection.refuse("k", "no", remember_s=seconds)
