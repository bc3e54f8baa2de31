"""Limits that the peer has set: an honest side keeps to them, and raises here what can't wait."""

import numpy as np
import pytest

from kvtransport import Config, Endpoint
from kvtransport.errors import ResourceLimit

LIMIT_S = 20
LAYERS = 61


@pytest.fixture(params=[("tcp",), ("inproc", "tcp")], ids=["tcp", "inproc"])
def linked(request):
    """Make two endpoints with these Configs, connected: (ours, to theirs, theirs, to ours)."""
    made = []

    def make(ours, theirs):
        made.extend(Endpoint(Config(backends=request.param, **config)) for config in (ours, theirs))
        made[1].listen("127.0.0.1:0")
        there = made[0].connect(made[1].descriptor(), timeout=LIMIT_S)
        return made[0], there, made[1], made[1].accept(LIMIT_S)

    yield make
    for endpoint in made:
        endpoint.close()


def pools(endpoint, count, layers=LAYERS):
    return [
        endpoint.register([np.full((4, 64), n, dtype=np.uint8) for _ in range(layers)]) for n in range(count)
    ]


def test_more_regions_than_the_peer_takes(linked):
    """17 pools of 61 layers are more than the 1,024 of the default: the 17th is refused, and nothing is lost."""
    ours, there, theirs, here = linked({}, {})
    own, (other,) = pools(ours, 17), pools(theirs, 1)
    waiting = [there.recv_blocks(pool, [1], key=f"k{n}") for n, pool in enumerate(own[:16])]
    for post in (there.recv_blocks, there.send_blocks):
        with pytest.raises(ResourceLimit, match="max_regions") as caught:
            post(own[16], [1], key="k16")
        assert caught.value.retryable
    for n, transfer in enumerate(waiting):
        here.send_blocks(other, [2], key=f"k{n}").result(LIMIT_S)
        assert transfer.result(LIMIT_S).nbytes == LAYERS * 64
    own[3].close()
    transfer = there.recv_blocks(own[16], [1], key="k16")
    here.send_blocks(other, [2], key="k16").result(LIMIT_S)
    transfer.result(LIMIT_S)
    assert there.state == here.state == "open"


def test_a_peer_that_takes_more_regions(linked):
    ours, there, theirs, here = linked({"max_regions": 1}, {"max_regions": 2048})
    (other,) = pools(theirs, 1, layers=1)
    for n, pool in enumerate(pools(ours, 17)):
        transfer = there.recv_blocks(pool, [1], key=f"k{n}", layers=[5])
        here.send_blocks(other, [2], key=f"k{n}").result(LIMIT_S)
        transfer.result(LIMIT_S)
    with pytest.raises(ResourceLimit, match="max_regions"):
        here.send_blocks(pools(theirs, 1, layers=2)[0], [2], key="two")


def test_what_was_posted_before_the_session_is_told_at_its_handle():
    with Endpoint(Config(backends=("tcp",))) as ours, Endpoint(Config(max_regions=3)) as theirs:
        where = theirs.listen("127.0.0.1:0")
        there = ours.connect(where, wait=False)
        transfers = [
            there.recv_blocks(pool, [1], key=f"k{n}") for n, pool in enumerate(pools(ours, 2, layers=2))
        ]
        with pytest.raises(ResourceLimit, match="max_regions") as caught:
            transfers[1].result(LIMIT_S)
        assert caught.value.quiesced and caught.value.key == "k1"
        assert not transfers[0].done()


def test_unmatched_posts_wait_by_the_peers_limit(linked):
    """Both ways at once: one side takes 3, the other 1,024."""
    ours, there, theirs, here = linked({}, {"max_unmatched": 3})
    (own,), (other,) = pools(ours, 1, layers=1), pools(theirs, 1, layers=1)
    got = [there.recv_blocks(own, [0], key=f"k{n}") for n in range(1)]
    sent = [there.send_blocks(own, [3], key=f"s{n}") for n in range(40)]
    back = [here.send_blocks(other, [1], key=f"b{n}") for n in range(40)]
    assert there.state == here.state == "open"
    rest = [here.recv_blocks(other, [2], key="s39"), here.send_blocks(other, [1], key="k0")]
    for transfer in (*rest, got[0], sent[39]):
        transfer.result(LIMIT_S)
    for n in range(39):
        here.recv_blocks(other, [2], key=f"s{n}").result(LIMIT_S)
        sent[n].result(LIMIT_S)
    for n in range(40):
        there.recv_blocks(own, [2], key=f"b{n}").result(LIMIT_S)
        back[n].result(LIMIT_S)


def test_messages_wait_by_the_peers_queue(linked):
    """1 MiB is the least that can be set: also the longest message comes, when nothing else waits."""
    ours, there, theirs, here = linked({}, {"max_message_queue_nbytes": 1 << 20})
    data = [bytes([n]) * size for n, size in enumerate([300_000] * 5 + [1 << 20] * 2 + [0, 10])]
    sent = [there.send_message(each) for each in data]
    sent[0].result(LIMIT_S)
    (own,), (other,) = pools(ours, 1, layers=1), pools(theirs, 1, layers=1)
    behind = there.recv_blocks(own, [0], key="k")  # what is sent before it is acknowledged before its end
    here.send_blocks(other, [0], key="k")
    behind.result(LIMIT_S)
    assert [message.done() for message in sent] == [True] + [False] * 8
    taken = []
    while len(taken) < len(data):
        fresh = [message for _, message in theirs.recv_messages(LIMIT_S)]
        assert fresh
        assert len(fresh) == 1 or sum(len(each) + 64 for each in fresh) <= 1 << 19
        taken += fresh
    assert taken == data
    for message in sent:
        message.result(LIMIT_S)
    assert there.state == here.state == "open"


def test_a_larger_message_queue_takes_more(linked):
    _, there, theirs, _ = linked({}, {"max_message_queue_nbytes": 256 << 20})
    sent = [there.send_message(bytes(1 << 20)) for _ in range(100)]
    for message in sent:
        message.result(LIMIT_S)
    assert sum(len(theirs.recv_messages(LIMIT_S)) for _ in range(1)) == 100


def test_pieces_of_one_transfer(linked):
    ours, there, theirs, here = linked({"max_transfer_pieces": 8}, {})
    (own,), (other,) = pools(ours, 1, layers=4), pools(theirs, 1, layers=4)
    for post in (there.recv_blocks, there.send_blocks):
        with pytest.raises(ResourceLimit, match="max_transfer_pieces"):
            post(own, [0, 1, 2], key="k")
    got = there.recv_blocks(own, [0, 1], key="k")
    here.send_blocks(other, [2, 3], key="k").result(LIMIT_S)
    assert got.result(LIMIT_S).nbytes == 8 * 64
