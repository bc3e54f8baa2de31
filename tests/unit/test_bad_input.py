"""What a caller gets wrong: the exact error at the call, or in `result()`; nothing is lost, nothing hangs."""

from functools import partial

import numpy as np
import pytest
import torch

from kvtransport import BlockLayout, Config, Endpoint, new_token
from kvtransport.errors import (
    BackendUnavailable,
    ConnectionClosed,
    LayoutMismatch,
    LocalProtocolError,
    PeerLost,
    TransferCancelled,
    TransferTimeout,
)

BLOCKS, NBYTES = 8, 4096
LIMIT_S = 20


class Pair:
    """Two endpoints over TCP, a pool of opaque blocks on each."""

    def __init__(self):
        self.ours, self.theirs = Endpoint(Config(backends=("tcp",))), Endpoint(Config(backends=("tcp",)))
        self.sender = self.ours.connect(self.theirs.listen("127.0.0.1:0"), timeout=LIMIT_S)
        self.receiver = self.theirs.accept(timeout=LIMIT_S)
        random = np.random.default_rng(7)
        self.source = random.integers(0, 255, (BLOCKS, NBYTES), dtype=np.uint8)
        self.destination = np.zeros((BLOCKS, NBYTES), dtype=np.uint8)
        self.of, self.to = self.ours.register(self.source), self.theirs.register(self.destination)

    def works(self):
        """Assert that the connection moves all blocks after whatever went wrong, by a key that it named."""
        got = self.receiver.recv_blocks(self.to, range(BLOCKS), key="k")
        sent = self.sender.send_blocks(self.of, range(BLOCKS), key="k")
        assert got.result(LIMIT_S).nbytes == sent.result(LIMIT_S).nbytes == BLOCKS * NBYTES
        assert (self.destination == self.source).all()

    def close(self):
        self.ours.close()
        self.theirs.close()


@pytest.fixture(scope="module")
def shared():
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def pair(shared):
    yield shared
    shared.works()


@pytest.fixture
def own():
    """A pair that the test may break."""
    one = Pair()
    yield one
    one.close()


def posts(pair):
    """Return both ways to post: (call, pool)."""
    return (pair.sender.send_blocks, pair.of), (pair.receiver.recv_blocks, pair.to)


# --- block ids ---


OUT_OF_RANGE = [
    [BLOCKS], [0, -1], [2**32], [2**31], [2**80], [-(2**80)], range(BLOCKS + 1), range(-1, 3),
    range(10**30, 10**30 + 2), range(10**30), range(3, -(10**30), -1), range(0, 2**62, 2**61),
    np.array([0, BLOCKS]), np.array([-1], dtype=np.int32), np.array([2**40]), torch.tensor([1, BLOCKS]),
    np.array([[0, 1]]), {"no such group": [0]},
]  # fmt: skip


@pytest.mark.parametrize("ids", OUT_OF_RANGE, ids=repr)
def test_ids_out_of_range(pair, ids):
    for post, pool in posts(pair):
        with pytest.raises(ValueError):
            post(pool, ids, key="k")


NO_IDS = [
    3, None, "01", b"01", [0.0], [True], ["0"], [None], [[0]], np.array([0.0, 1.0]), np.array([True]),
    np.array([0], dtype=np.uint8), torch.tensor([0.5]), {0: [0]}, {"": 3},
]  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS, ids=repr)
def test_ids_of_a_wrong_type(pair, ids):
    for post, pool in posts(pair):
        with pytest.raises((TypeError, ValueError)) as caught:
            post(pool, ids, key="k")
        assert type(caught.value) in (TypeError, ValueError)


def test_ids_that_overlap(pair):
    """Within a call; and with a receive in flight, whose key is named. A source may repeat ids."""
    with pytest.raises(ValueError, match="overlap"):
        pair.receiver.recv_blocks(pair.to, [1, 2, 1], key="k")
    first = pair.receiver.recv_blocks(pair.to, [1, 2], key="first one")
    with pytest.raises(LocalProtocolError, match="first one"):
        pair.receiver.recv_blocks(pair.to, [2, 3], key="k")
    other = pair.receiver.recv_blocks(pair.to, [3], key="disjoint")
    for transfer in (first, other):
        transfer.cancel()
        with pytest.raises(TransferCancelled):
            transfer.result(LIMIT_S)
    got = pair.receiver.recv_blocks(pair.to, [0, 1], key="k")
    pair.sender.send_blocks(pair.of, [5, 5], key="k").result(LIMIT_S)
    assert got.result(LIMIT_S).nbytes == 2 * NBYTES
    assert (pair.destination[:2] == pair.source[5]).all()


# --- keys, metas, limits, layers ---


@pytest.mark.parametrize("key", ["", b"", "k" * 256, b"k" * 256, "\u20ac" * 86])
def test_keys_of_a_wrong_length(pair, key):
    for post, pool in posts(pair):
        with pytest.raises(ValueError, match="255"):
            post(pool, [0], key=key)


@pytest.mark.parametrize("key", [None, 3, ["k"], bytearray(b"k")])
def test_keys_of_a_wrong_type(pair, key):
    for post, pool in posts(pair):
        with pytest.raises(TypeError):
            post(pool, [0], key=key)


def test_a_key_that_no_encoding_has(pair):
    for post, pool in posts(pair):
        with pytest.raises(ValueError):
            post(pool, [0], key="\ud800")


@pytest.mark.parametrize("key", ["k" * 255, b"\x00" * 255, "\u20ac" * 85, b"\xff"])
def test_keys_at_the_limits(pair, key):
    got = pair.receiver.recv_blocks(pair.to, [0], key=key, meta=bytes(4096))
    pair.sender.send_blocks(pair.of, [0], key=key, meta=b"m" * 4096).result(LIMIT_S)
    assert got.result(LIMIT_S).meta == b"m" * 4096


def test_a_key_in_use(pair):
    first = pair.receiver.recv_blocks(pair.to, [0], key="k")
    with pytest.raises(LocalProtocolError, match="k"):
        pair.receiver.recv_blocks(pair.to, [1], key="k")
    first.cancel()
    with pytest.raises(TransferCancelled):
        first.result(LIMIT_S)


def test_meta(pair):
    for post, pool in posts(pair):
        with pytest.raises(ValueError, match="4,096"):
            post(pool, [0], key="k", meta=bytes(4097))
        with pytest.raises(TypeError):
            post(pool, [0], key="k", meta="text")


def test_layers_and_heads(pair):
    for post, pool in posts(pair):
        for layers in ([1], [-1], ["no such layer"], [0, 0]):
            with pytest.raises(ValueError):
                post(pool, [0], key="k", layers=layers)
        with pytest.raises(ValueError):
            post(pool, [0], key="k", heads=slice(0, 1))  # opaque blocks have none


def test_pools_of_a_wrong_type(pair):
    for post, _ in posts(pair):
        for pool in (None, pair.source, "pool"):
            with pytest.raises(TypeError, match="BlockPool"):
                post(pool, [0], key="k")


def test_a_read_only_pool_receives_nothing(pair):
    memory = np.zeros((BLOCKS, NBYTES), dtype=np.uint8)
    memory.flags.writeable = False
    with pair.theirs.register(memory) as pool, pytest.raises(ValueError, match="read-only"):
        pair.receiver.recv_blocks(pool, [0], key="k")


def test_messages(pair):
    with pytest.raises(ValueError, match="1 MiB"):
        pair.sender.send_message(bytes((1 << 20) + 1))
    with pytest.raises(TypeError):
        pair.sender.send_message("text")
    with pytest.raises(TypeError):
        pair.sender.send_message(5)  # not five zeros
    with pytest.raises(TypeError, match="not a Transfer"):
        pair.sender.send_message(b"", after=5)


@pytest.mark.parametrize("queue", [5, False, "queue"])
def test_what_is_no_completion_queue(pair, queue):
    for call in (
        lambda: pair.sender.send_blocks(pair.of, [0], key="k", queue=queue),
        lambda: pair.receiver.recv_blocks(pair.to, [0], key="k", queue=queue),
        lambda: pair.sender.send_message(b"", queue=queue),
    ):
        with pytest.raises(TypeError, match=f"queue={queue!r} is not a CompletionQueue"):
            call()


def test_layers_without_names_are_called_as_the_pool_calls_them(pair):
    layers = [np.zeros((BLOCKS, NBYTES), dtype=np.uint8) for _ in range(2)]
    with pair.theirs.register(layers) as pool:
        waiting = pair.receiver.recv_blocks(pool, [3], key="first", layers=[1])
        with pytest.raises(LocalProtocolError, match=f"block 3 of layer '{pool.layer_names[1]}' is being"):
            pair.receiver.recv_blocks(pool, [3], key="second")
        with pytest.raises(ValueError, match="block 2 of layer 'layer0'"):
            pair.receiver.recv_blocks(pool, [2, 2], key="third")
        waiting.cancel()


# --- the two sides don't fit ---


def fields(**changes):
    base = {"tokens_per_block": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": "float16", "order": "HND"}
    return BlockLayout(**{**base, "kv": "packed", **changes})


def mismatch(pair, ours, theirs):
    """Send block 0 of a pool that `ours` made to one that `theirs` made; return the errors."""
    got = pair.receiver.recv_blocks(theirs, [0], key="k")
    sent = pair.sender.send_blocks(ours, [0], key="k")
    found = []
    for transfer in (sent, got):
        with pytest.raises(LayoutMismatch) as caught:
            transfer.result(LIMIT_S)
        found.append(caught.value)
        assert caught.value.quiesced is True
    return found


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"order": "NHD"}, "order"),
        ({"tokens_per_block": 8}, "tokens_per_block"),
    ],
)
def test_layouts_that_differ(pair, changes, path):
    with (
        pair.ours.allocate(fields(), num_layers=2, num_blocks=3) as ours,
        pair.theirs.allocate(fields(**changes), num_layers=2, num_blocks=3) as theirs,
    ):
        sent, got = mismatch(pair, ours, theirs)
        assert sent.path == got.path == path
        assert (sent.ours, sent.theirs) == (got.theirs, got.ours)


def test_pieces_and_counts_that_differ(pair):
    half = pair.theirs.register(np.zeros((BLOCKS, NBYTES // 2), dtype=np.uint8))
    mismatch(pair, pair.of, half)
    half.close()
    before = pair.destination.copy()
    got = pair.receiver.recv_blocks(pair.to, [0, 1], key="k")
    sent = pair.sender.send_blocks(pair.of, [0], key="k")
    for transfer in (sent, got):
        with pytest.raises(LayoutMismatch) as caught:
            transfer.result(LIMIT_S)
        assert caught.value.path == "blocks"
    assert (before == pair.destination).all()


def test_an_unknown_key(pair):
    """Nobody posts the other side: its match timeout ends it, and leaves nothing behind."""
    for post, pool in posts(pair):
        with pytest.raises(TransferTimeout) as caught:
            post(pool, [0], key="k", match_timeout_s=0.2).result(LIMIT_S)
        assert caught.value.waiting_for == "match"
        assert caught.value.quiesced is True
        assert caught.value.key == "k"


# --- what has ended ---


def test_a_closed_connection(own):
    own.sender.close()
    with pytest.raises(ConnectionClosed):
        own.sender.send_blocks(own.of, [0], key="k")
    with pytest.raises(ConnectionClosed):
        own.sender.send_message(b"late")
    with pytest.raises(ConnectionClosed):
        own.sender.refuse("k", "late")
    with pytest.raises(PeerLost) as caught:
        own.receiver.recv_blocks(own.to, [0], key="k").result(LIMIT_S)
    assert caught.value.cause == "closed"


def test_a_closed_endpoint(own):
    own.ours.close()
    for call in (
        lambda: own.sender.send_blocks(own.of, [0], key="k"),
        lambda: own.ours.register(own.source),
        lambda: own.ours.connect("127.0.0.1:1", timeout=1),
        lambda: own.ours.listen("127.0.0.1:0"),
        lambda: own.ours.recv_messages(),
        lambda: own.ours.stats(),
    ):
        with pytest.raises(ConnectionClosed):
            call()


def test_a_closed_pool(pair):
    for endpoint, post in ((pair.ours, pair.sender.send_blocks), (pair.theirs, pair.receiver.recv_blocks)):
        pool = endpoint.register(np.zeros((BLOCKS, NBYTES), dtype=np.uint8))
        pool.close()
        with pytest.raises(LocalProtocolError, match="closed"):
            post(pool, [0], key="k")


# --- an array that is no longer where it was ---


def torch_shrunk():
    tensor = torch.zeros((BLOCKS, NBYTES), dtype=torch.uint8)
    return tensor, lambda: tensor.untyped_storage().resize_(NBYTES)


def torch_set():
    tensor = torch.zeros((BLOCKS, NBYTES), dtype=torch.uint8)
    return tensor, lambda: tensor.set_(torch.zeros((BLOCKS, NBYTES), dtype=torch.uint8))


def numpy_resized():
    array = np.zeros((BLOCKS, NBYTES), dtype=np.uint8)
    return array, lambda: array.resize((64 * BLOCKS, NBYTES), refcheck=False)


@pytest.mark.parametrize("make", [torch_shrunk, torch_set, numpy_resized])
def test_an_array_that_was_resized(pair, make):
    for endpoint, post in ((pair.ours, pair.sender.send_blocks), (pair.theirs, pair.receiver.recv_blocks)):
        array, change = make()
        pool = endpoint.register(array)
        change()
        with pytest.raises(LocalProtocolError, match="resized"):
            post(pool, [0], key="k")
        pool.close()


@pytest.mark.parametrize("call", ["send_blocks", "write_blocks"])
@pytest.mark.parametrize("fault", ["gate", "stream", "ended"])
def test_an_error_at_the_call_says_whom_it_concerns(own, call, fault):
    """Also where nothing of the call has reached the connection yet."""
    post = partial(own.sender.send_blocks, key="k")
    if call == "write_blocks":
        post = partial(own.sender.write_blocks, new_token())
    options = {}
    if fault == "gate":
        options = {"after": own.ours.layer_gate(own.of.num_layers + 1)}
    elif fault == "stream":
        options = {"stream": 0}
    else:
        options = {"after": own.ours.layer_gate(own.of.num_layers)}
        own.sender.close()
    with pytest.raises((LocalProtocolError, BackendUnavailable, ConnectionClosed)) as caught:
        post(own.of, [0], **options)
    assert (caught.value.peer, caught.value.backend) == (str(own.sender.peer), "tcp")


@pytest.mark.parametrize("wrong", [None, 7, "pool"])
def test_what_is_no_pool_is_so_with_a_gate_too(pair, wrong):
    for options in ({}, {"after": pair.ours.layer_gate(1)}):
        with pytest.raises(TypeError, match="not a BlockPool"):
            pair.sender.send_blocks(wrong, [0], key="k", **options)
