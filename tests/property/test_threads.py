"""Threads that call at once, on one connection, over every way."""

import random
import threading

import numpy as np
import pytest

import kvtransport as kvt
from tests.property.loopback import LIMIT_S, LINKS

BLOCKS, ROUNDS, THREADS = 16, 40, 6


def one_round(made, here, source, there, target, key, random_):
    """Post both sides and a message, cancel some; return what is wrong, or None."""
    ids = random_.sample(range(BLOCKS), random_.randint(1, BLOCKS))
    receive = made.back.recv_blocks(there, ids, key=key)
    send = made.out.send_blocks(here, ids, key=key)
    made.out.send_message(key.encode())
    if random_.random() < 0.3:
        handles = random_.sample([send, receive], 2)
        handles[0].cancel()
        kvt.wait(handles[:1], timeout=LIMIT_S)
        handles[1].cancel()  # before the match nobody tells it
    kvt.wait([send, receive], timeout=LIMIT_S)
    if not (send.done() and receive.done()):
        return (key, "not over")
    if receive.exception() is None and not (target[ids] == source[ids]).all():
        return (key, "other bytes")
    if send.exception() is None and receive.exception() is not None:
        return (key, "the source says done, the destination doesn't")
    return None


def run_all(works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def messages_of(endpoint, count):
    said = []
    while len(said) < count:
        got = endpoint.recv_messages(timeout=LIMIT_S)
        assert got, len(said)
        said += [data.decode() for _, data in got]
    return said


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_post_wait_cancel_and_send_messages_at_once(pair, link):
    made = pair(link)
    rng = np.random.default_rng(2)
    source = rng.integers(1, 1 << 30, (BLOCKS, 9000), np.int64)
    here = made.ours.register(source)
    wrong = []

    def work(number):
        random_ = random.Random(number)
        target = np.zeros_like(source)
        there = made.theirs.register(target)
        for turn in range(ROUNDS):
            wrong.append(one_round(made, here, source, there, target, f"{number}-{turn}", random_))
        there.close(timeout=LIMIT_S)

    run_all([lambda n=n: work(n) for n in range(THREADS)])
    assert [one for one in wrong if one] == []
    said = messages_of(made.theirs, THREADS * ROUNDS)
    for number in range(THREADS):
        assert [one for one in said if one.startswith(f"{number}-")] == [
            f"{number}-{t}" for t in range(ROUNDS)
        ]
    here.close()


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_messages_keep_their_order_whoever_acts_on_them(pair, link):
    """Each thread that sends also takes care of what has just come: they must not overtake each other."""
    made = pair(link)
    count, found = 1500, {}

    def send(connection, name):
        for n in range(count):
            connection.send_message(f"{name}{n}".encode())

    def receive(endpoint, name):
        found[name] = messages_of(endpoint, 3 * count)

    run_all(
        [lambda name=name: send(made.out, name) for name in "abc"]
        + [lambda name=name: send(made.back, name) for name in "def"]
        + [lambda: receive(made.theirs, "out"), lambda: receive(made.ours, "back")]
    )
    for side, names in (("out", "abc"), ("back", "def")):
        for name in names:
            assert [m for m in found[side] if m[0] == name] == [f"{name}{n}" for n in range(count)]
