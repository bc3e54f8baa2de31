"""Times longer than a system call can count, infinite ones, None, and what is no number."""

import asyncio
import threading

import numpy as np
import pytest

from kvtransport import wait

LIMIT_S = 20
LONG = [1e9, 1e300, float("inf"), None]
NAN = float("nan")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", LONG)
def test_connect_and_accept(endpoint, seconds):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen("127.0.0.1:0")
    assert ours.connect(where, timeout=seconds).state == "open"
    assert theirs.accept(timeout=seconds).peer.incarnation == ours.incarnation
    other = endpoint()
    assert asyncio.run(other.connect_async(where, timeout=seconds)).state == "open"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", LONG)
def test_the_acceptor_goes_on_beside_a_long_connect(endpoint, free_port, seconds):
    ours, theirs = endpoint(), endpoint()
    ours.connect(f"127.0.0.1:{free_port}", timeout=seconds, wait=False)  # nobody is there yet
    assert theirs.connect(ours.listen("127.0.0.1:0"), timeout=LIMIT_S).state == "open"
    theirs.listen(f"127.0.0.1:{free_port}")
    assert ours.connect(f"127.0.0.1:{free_port}", timeout=LIMIT_S).state == "open"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", LONG)
def test_waits_end_when_there_is_something(endpoint, seconds):
    ours, theirs = endpoint(), endpoint()
    connection = ours.connect(theirs.listen("127.0.0.1:0"))
    theirs.accept()
    found = []
    thread = threading.Thread(target=lambda: found.extend(theirs.recv_messages(timeout=seconds)))
    thread.start()
    message = connection.send_message(b"x")
    assert message.result(timeout=seconds) is None
    assert wait([message], timeout=seconds).done == [message]
    thread.join(LIMIT_S)
    assert [data for _, data in found] == [b"x"]
    ours.register(np.zeros((4, 64), np.uint8)).close(timeout=seconds)


def test_what_is_no_number_is_refused(endpoint):
    ours, theirs = endpoint(), endpoint()
    where = theirs.listen("127.0.0.1:0")
    connection = ours.connect(where)
    pool = ours.register(np.zeros((4, 64), np.uint8))
    receive = connection.recv_blocks(pool, [0], key="k")
    for call in (
        lambda: ours.connect(where, timeout=NAN),
        lambda: ours.connect(where, timeout=NAN, wait=False),
        lambda: asyncio.run(ours.connect_async(where, timeout=NAN)),
        lambda: ours.accept(timeout=NAN),
        lambda: ours.recv_messages(timeout=NAN),
        lambda: receive.result(timeout=NAN),
        lambda: receive.wait_layer(0, timeout=NAN),
        lambda: wait([receive], timeout=NAN),
        lambda: pool.close(timeout=NAN),
    ):
        with pytest.raises(ValueError, match="nan is not a number of seconds"):
            call()
    assert not pool.closed
