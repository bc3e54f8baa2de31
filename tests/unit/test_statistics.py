"""What an endpoint tells of its work: counts, histograms, lines of explain and log, whom an error concerns."""

import logging

import numpy as np
import pytest

from kvtransport.errors import (
    ConnectionClosed,
    LocalProtocolError,
    PeerAborted,
    PeerLost,
    TransferCancelled,
    TransferTimeout,
)

BLOCKS, NBYTES = 8, 4096
LIMIT_S = 20
LOOPBACK = "127.0.0.1:0"


class Two:
    """Two endpoints with a pool of opaque blocks each, joined."""

    def __init__(self, ours, theirs, where):
        self.ours, self.theirs = ours, theirs
        self.sender, self.receiver = ours.connect(where), theirs.accept(timeout=LIMIT_S)
        self.of = ours.register(np.ones((BLOCKS, NBYTES), dtype=np.uint8))
        self.to = theirs.register(np.zeros((BLOCKS, NBYTES), dtype=np.uint8))

    def move(self, key, blocks=BLOCKS):
        got = self.receiver.recv_blocks(self.to, range(blocks), key=key)
        self.sender.send_blocks(self.of, range(blocks), key=key).result(LIMIT_S)
        got.result(LIMIT_S)


@pytest.fixture
def two(endpoint):
    ours, theirs = endpoint(), endpoint()
    return Two(ours, theirs, theirs.listen(LOOPBACK))


def ended_by(error, handle):
    with pytest.raises(error):
        handle.result(LIMIT_S)


# --- counts ---


def test_bytes_and_chunks_are_counted_on_both_sides(two):
    two.move("a")
    two.move("b", blocks=2)
    sent, received = two.sender.stats(), two.receiver.stats()
    assert sent["bytes_sent"] == received["bytes_received"] == 10 * NBYTES
    assert sent["chunks_sent"] == received["chunks_received"] >= 2
    assert (sent["sends_ok"], received["receives_ok"]) == (2, 2)
    assert sent["bytes_received"] == received["bytes_sent"] == sent["unfinished"] == 0
    assert (sent["peer"], sent["backend"]) == (str(two.sender.peer), "tcp")


def test_operations_are_told_apart_by_outcome(two):
    two.move("ok")
    got = two.receiver.recv_blocks(two.to, [0], key="cancelled")
    got.cancel()
    ended_by(TransferCancelled, got)
    ended_by(TransferTimeout, two.receiver.recv_blocks(two.to, [0], key="late", match_timeout_s=0.05))
    refused = two.receiver.recv_blocks(two.to, [0], key="refused")
    two.sender.refuse("refused", "no memory")
    ended_by(PeerAborted, refused)
    two.sender.send_message(b"four").result(LIMIT_S)
    received, sent = (c.stats()["operations"] for c in (two.receiver, two.sender))
    assert set(received) == {"recv"} and set(sent) == {"send", "message"}
    counts = {outcome: cell["count"] for outcome, cell in received["recv"].items()}
    assert counts == {"ok": 1, "TransferCancelled": 1, "TransferTimeout": 1, "PeerAborted": 1}
    assert received["recv"]["ok"]["nbytes"] == BLOCKS * NBYTES
    assert (sent["message"]["ok"]["count"], sent["message"]["ok"]["nbytes"]) == (1, 4)


def test_a_histogram_holds_each_operation_once_at_its_time(two):
    waited = two.receiver.recv_blocks(two.to, [0], key="late", match_timeout_s=0.1)
    ended_by(TransferTimeout, waited)
    for i in range(5):
        two.move(i.to_bytes(1, "big"))
    cells = two.receiver.stats()["operations"]["recv"]
    for cell, count in ((cells["ok"], 5), (cells["TransferTimeout"], 1)):
        seconds = cell["seconds"]
        assert sum(seconds["counts"]) == cell["count"] == count
        assert len(seconds["counts"]) == len(seconds["bounds"]) + 1
        assert seconds["bounds"] == sorted(seconds["bounds"]) and seconds["bounds"][0] == 16e-6
        least = sum(n * low for n, low in zip(seconds["counts"], [0, *seconds["bounds"]], strict=True))
        most = sum(n * high for n, high in zip(seconds["counts"], seconds["bounds"], strict=False))
        assert least <= seconds["sum"] <= most
    late = cells["TransferTimeout"]["seconds"]
    assert late["counts"].index(1) == next(
        i for i, bound in enumerate(late["bounds"]) if bound >= late["sum"]
    )
    assert late["sum"] >= 0.1


def test_an_endpoint_keeps_the_counts_of_peers_that_are_gone(two, turns):
    two.move("a")
    pending = two.receiver.recv_blocks(two.to, [0], key="never")
    two.ours.close()
    ended_by(PeerLost, pending)
    turns.until(lambda: not two.theirs.stats()["peers"])
    (cells,) = two.theirs.stats()["operations"].values()
    assert {outcome: cell["count"] for outcome, cell in cells["recv"].items()} == {"ok": 1, "PeerLost": 1}


def test_peers_are_told_apart(endpoint):
    theirs = endpoint()
    where = theirs.listen(LOOPBACK)
    many = [Two(endpoint(), theirs, where) for _ in range(3)]
    for i, two in enumerate(many):
        for n in range(i):
            two.move(f"{n}")
    stats = theirs.stats()
    assert {c["peer"]: c["receives_ok"] for c in stats["peers"].values()} == {
        str(two.receiver.peer): i for i, two in enumerate(many)
    }
    assert stats["operations"]["tcp"]["recv"]["ok"]["count"] == 3


# --- ways ---


def test_a_better_way_that_was_missed_is_a_warning_with_its_remedy(endpoint, caplog):
    ours, theirs = endpoint(backends=None), endpoint(backends=None)
    with caplog.at_level(logging.INFO, "kvtransport"):
        connection = ours.connect(theirs.listen(LOOPBACK))
    theirs.accept(timeout=LIMIT_S)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    mine = [line for line in warnings if str(connection.peer) in line]
    assert len(mine) == 1
    assert "inproc" in mine[0] and "by its socket address" in mine[0] and "descriptor()" in mine[0]
    assert "by its socket address; connect to what" in connection.explain()


@pytest.mark.parametrize(
    ("here", "there", "reason"),
    [
        (("tcp",), None, "not among Config.backends here"),
        (None, ("tcp",), "the Config of the peer's endpoint doesn't allow it"),
        (
            ("tcp", "inproc"),
            None,
            "the peer was dialled by its socket address",
        ),  # not better: the user prefers tcp
    ],
)
def test_a_way_that_the_user_ruled_out_is_explained_without_a_warning(endpoint, caplog, here, there, reason):
    ours, theirs = endpoint(backends=here), endpoint(backends=there)
    with caplog.at_level(logging.INFO, "kvtransport"):
        connection = ours.connect(theirs.listen(LOOPBACK))
    assert f"inproc: refused: {reason}" in connection.explain()
    lines = [r for r in caplog.records if str(connection.peer) in r.getMessage()]
    assert [r.levelno for r in lines] == [logging.INFO]
    assert f"host memory: tcp, to {connection.peer.address}" in lines[0].getMessage()


# --- errors ---


def test_an_error_at_the_call_says_whom_it_concerns(two):
    two.sender.send_blocks(two.of, [0], key="k")
    with pytest.raises(LocalProtocolError) as caught:
        two.sender.send_blocks(two.of, [0], key="k")
    assert (caught.value.peer, caught.value.backend) == (str(two.sender.peer), "tcp")


def test_a_pool_of_another_endpoint_is_refused(two):
    with pytest.raises(ValueError, match="another Endpoint"):
        two.sender.send_blocks(two.to, [0], key="k")
    with pytest.raises(ValueError, match="another Endpoint"):
        two.receiver.recv_blocks(two.of, [0], key="k")
    two.move("k")


@pytest.mark.parametrize("closes", ["ours", "theirs"])
def test_an_error_of_a_lost_connection_says_whom_it_concerns(two, turns, closes):
    message = two.sender.send_message(b"x", after=two.sender.send_blocks(two.of, [0], key="never"))
    expected = ConnectionClosed if closes == "ours" else PeerLost
    if closes == "ours":
        two.sender.close()
    else:
        two.theirs.close()
    ended_by(expected, message)
    turns.until(lambda: two.sender.state == "lost")
    for call in (
        lambda: two.sender.send_blocks(two.of, [0], key="k"),
        lambda: two.sender.send_message(b""),
        lambda: two.sender.refuse("k", "why"),
    ):
        with pytest.raises(expected) as caught:
            call()
        assert (caught.value.peer, caught.value.backend) == (str(two.sender.peer), "tcp")


def test_a_message_that_is_lost_carries_what_a_transfer_would(two):
    message = two.receiver.send_message(b"x" * (1 << 20))
    two.theirs.close()
    error = message.exception()
    if error is not None:  # else it had come
        assert isinstance(error, ConnectionClosed)
        assert (error.peer, error.backend, error.quiesced) == (str(two.receiver.peer), "tcp", True)
