"""Grants, as one process sees them: misuse, tokens, handles, and every end of what waits."""

import asyncio
import os
import re

import numpy as np
import pytest

import kvtransport as kvt
from kvtransport.errors import (
    ConnectionClosed,
    ForkedProcessError,
    GrantError,
    LocalProtocolError,
    PeerLost,
    PermissionDenied,
    StaleGrant,
    TransferCancelled,
    WaitTimeout,
)
from kvtransport.grant import raw_if_token, raw_of, text_of
from tests.waiting import until

LIMIT_S = 20
BLOCKS, NBYTES = 8, 1000


class Ends:
    """An owner and a reader of one process, each with a pool."""

    def __init__(self, endpoint) -> None:
        self.owner, self.reader = endpoint(), endpoint()
        self.back = self.reader.connect(self.owner.listen("127.0.0.1:0"), timeout=LIMIT_S)
        self.out = self.owner.accept(LIMIT_S)
        self.source = np.arange(BLOCKS * NBYTES).astype(np.uint8).reshape(BLOCKS, NBYTES)
        self.target = np.zeros_like(self.source)
        self.of, self.to = self.owner.register(self.source), self.reader.register(self.target)

    def read(self, token, ids=(0,), **options):
        return self.back.read_blocks(token, self.to, list(ids), **options)


@pytest.fixture
def ends(endpoint):
    return Ends(endpoint)


def raised(kind, handle):
    """Return the error that a handle ends with."""
    with pytest.raises(kind) as caught:
        handle.result(LIMIT_S)
    return caught.value


def test_a_token_is_128_bits_of_text():
    tokens = {kvt.new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    for token in tokens:
        assert re.fullmatch(r"[A-Za-z0-9_-]{22}", token)
        assert text_of(raw_of(token)) == token
        assert len(raw_of(token)) == 16


@pytest.mark.parametrize(
    "text",
    ["", "a", "a" * 21, "a" * 23, "a" * 21 + "b", "\u00e9" * 22, "a" * 21 + "=", " " * 22, "a+/" + "a" * 19],
)
def test_what_is_no_token(text):
    assert raw_if_token(text) is None
    with pytest.raises(ValueError, match="22 characters"):
        raw_of(text)


@pytest.mark.parametrize("token", [None, b"a" * 22, 5])
def test_a_token_is_a_str(ends, token):
    for call in (lambda: ends.read(token), lambda: ends.back.hold(token)):
        with pytest.raises(TypeError, match="a token is a str"):
            call()


MISUSES = [
    ({"mode": "both"}, ValueError, "mode is 'both'"),
    ({"readers": 0}, ValueError, "readers is 0"),
    ({"readers": True}, ValueError, "readers is True"),
    ({"readers": 1 << 32}, ValueError, "readers is"),
    ({"ttl_s": -1}, ValueError, "ttl_s=-1"),
    ({"ttl_s": float("nan")}, ValueError, "ttl_s=nan"),
    ({"to": "somebody"}, ValueError, "identities come with keys"),
    ({"to": b"short"}, ValueError, "16 bytes"),
    ({"token": "short"}, ValueError, "22 characters"),
    ({"queue": 1}, TypeError, "not a CompletionQueue"),
    ({"block_ids": [BLOCKS]}, ValueError, f"no block {BLOCKS}|{BLOCKS}"),
    ({"block_ids": [-1]}, ValueError, "-1"),
    ({"block_ids": [0.5]}, TypeError, "."),
]


@pytest.mark.parametrize(("options", "kind", "text"), MISUSES)
def test_a_grant_that_is_misuse(ends, options, kind, text):
    ids = options.pop("block_ids", [0]) if "block_ids" in options else [0]
    with pytest.raises(kind, match=text):
        ends.of.grant(ids, **{name: value for name, value in options.items() if name != "block_ids"})
    assert ends.owner.stats()["grants"]["made"] == 0


USES = [
    ({"subset": [0, 1]}, ValueError, "subset has 2 positions for 1 block ids"),
    ({"subset": [-1]}, ValueError, "-1"),
    ({"wait_grant_s": -1}, ValueError, "wait_grant_s"),
    ({"wait_grant_s": float("nan")}, ValueError, "wait_grant_s"),
    ({"src_heads": 3}, TypeError, "neither a slice nor a range"),
    ({"src_heads": slice(0, 4, 2)}, ValueError, "step 1"),
    ({"src_heads": slice(1, None)}, ValueError, "begins and ends"),
    ({"src_heads": slice(0, 1 << 32)}, ValueError, "begins and ends"),
    ({"src_heads": slice(-2, 1)}, ValueError, "begins and ends"),
    ({"heads": slice(0, 1)}, ValueError, "opaque blocks have no heads"),
    ({"layers": [1]}, ValueError, "."),
    ({"timeout_s": -1}, ValueError, "timeout_s"),
    ({"queue": 1}, TypeError, "not a CompletionQueue"),
]


@pytest.mark.parametrize(("options", "kind", "text"), USES)
def test_a_use_that_is_misuse(ends, options, kind, text):
    """At the call, and the grant is as before: the same read then works."""
    grant = ends.of.grant([3])
    with pytest.raises(kind, match=text):
        ends.read(grant.token, **options)
    ends.read(grant.token).result(LIMIT_S)
    assert (ends.target[0] == ends.source[3]).all()


def test_one_open_grant_a_token(ends):
    grant = ends.of.grant([0])
    with pytest.raises(LocalProtocolError, match="mint a new one") as caught:
        ends.of.grant([1], token=grant.token)
    assert grant.token not in str(caught.value)
    grant.revoke()
    again = ends.of.grant([1], token=grant.token)
    ends.read(again.token).result(LIMIT_S)
    assert (ends.target[0] == ends.source[1]).all()


def test_a_read_only_pool_is_granted_for_reads_only(ends):
    ends.source.flags.writeable = False
    pool = ends.owner.register(ends.source)
    with pytest.raises(ValueError, match="read-only"):
        pool.grant([0], mode="write")
    ends.read(pool.grant([0]).token).result(LIMIT_S)


def test_what_an_error_says(ends):
    denied = ends.read(kvt.new_token(), [2, 5])
    error = raised(PermissionDenied, denied)
    assert error.key == denied.key
    assert list(error.blocks.values()) == [{2: "poisoned", 5: "poisoned"}]
    assert error.failed_block_ids == [2, 5]
    assert (error.quiesced, error.retryable, error.backend) == (True, False, "tcp")
    assert error.peer == str(ends.back.peer)
    assert isinstance(error, GrantError)
    write = ends.back.write_blocks(kvt.new_token(), ends.to, [2])
    error = raised(PermissionDenied, write)
    assert (error.blocks, error.delivered, error.quiesced) == ({}, False, True)
    grant = ends.of.grant([0])
    grant.revoke()
    error = raised(TransferCancelled, grant)
    assert (error.key, error.quiesced, error.delivered) == (grant.token, True, False)


def test_no_message_tells_a_token(ends):
    """Whoever reads a log could use it."""
    grant, waiting = ends.of.grant([0]), ends.read(kvt.new_token(), wait_grant_s=LIMIT_S)
    lease = ends.back.hold(grant.token)
    shown = [repr(grant), repr(lease), ends.back.explain(), str(ends.owner.stats()), str(ends.back.stats())]
    until(lambda: lease.held)
    shown += [repr(lease), repr(waiting)]
    grant.revoke()
    waiting.cancel()
    for handle in (grant, lease, waiting):
        kvt.wait([handle], LIMIT_S)
        shown += [str(handle.exception()), repr(handle.exception()), repr(handle)]
    for token in (grant.token, waiting.key):
        assert not [text for text in shown if token in text]


def test_await_and_queues(ends):
    """Grant and Lease are handles as transfers are."""

    async def use():
        grant = ends.of.grant([0, 1])
        lease = ends.back.hold(grant.token)
        tasks = [asyncio.ensure_future(one) for one in (_of(grant), _of(lease))]
        result = await ends.read(grant.token, [0, 1])
        lease.release()
        return result.nbytes, await asyncio.gather(*tasks)

    assert asyncio.run(asyncio.wait_for(use(), LIMIT_S)) == (2 * NBYTES, [None, None])
    queue, other = ends.owner.completion_queue(), ends.reader.completion_queue()
    grant = ends.of.grant([0], queue=queue, tag="grant")
    lease = ends.back.hold(grant.token, queue=other, tag="lease")
    read = ends.read(grant.token, queue=other, tag="read")
    read.result(LIMIT_S)
    until(lambda: lease.held)
    lease.release()
    came = []
    until(lambda: came.extend([*queue.poll(), *other.poll()]) or len(came) == 3)
    assert {handle.tag: handle for handle in came} == {"grant": grant, "lease": lease, "read": read}
    assert (len(queue), len(other)) == (0, 0)


async def _of(handle):
    return await handle


def test_a_cancelled_task_cancels_its_read_and_no_grant(ends):
    async def use():
        read, grant = ends.read(kvt.new_token(), wait_grant_s=LIMIT_S), ends.of.grant([0])
        tasks = [asyncio.ensure_future(_of(one)) for one in (read, grant)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in ended] == [asyncio.CancelledError] * 2
        assert isinstance(read.exception(), TransferCancelled)
        return grant

    assert asyncio.run(asyncio.wait_for(use(), LIMIT_S)).state == "open"


def test_waiting_reads_by_thousands_are_queued_and_cancelled(ends):
    """More than a peer keeps: what exceeds that waits here, and nothing is left on either side."""
    reads = [ends.read(kvt.new_token(), [0], wait_grant_s=LIMIT_S, layers=[0]) for _ in range(1)]
    pools = [ends.reader.register(np.zeros((1, 8), np.uint8)) for _ in range(4)]
    owner = ends.owner.register(np.ones((1, 8), np.uint8))
    for _ in range(400):
        for pool in pools:
            token = kvt.new_token()
            read = ends.back.read_blocks(token, pool, [0], wait_grant_s=LIMIT_S)
            read.cancel()
            kvt.wait([read], LIMIT_S)
            assert isinstance(read.exception(), TransferCancelled)
    token = kvt.new_token()
    last = ends.back.read_blocks(token, pools[0], [0], wait_grant_s=LIMIT_S)
    owner.grant([0], token=token)
    assert last.result(LIMIT_S).nbytes == 8
    reads[0].cancel()
    kvt.wait(reads, LIMIT_S)
    for pool in pools:
        pool.close(timeout=LIMIT_S)


@pytest.mark.parametrize("by", ["reader's connection", "reader's endpoint", "owner's endpoint"])
def test_closed_while_reads_and_leases_wait(ends, by):
    grant = ends.of.grant([0], ttl_s=None)
    lease = ends.back.hold(grant.token)
    until(lambda: lease.held)
    waiting = [
        ends.read(kvt.new_token(), wait_grant_s=LIMIT_S),
        ends.back.hold(kvt.new_token(), wait_grant_s=LIMIT_S),
    ]
    closer = {
        "reader's connection": ends.back,
        "reader's endpoint": ends.reader,
        "owner's endpoint": ends.owner,
    }[by]
    closer.close()
    for handle in (*waiting, lease):
        error = raised((ConnectionClosed, PeerLost), handle)
        assert type(error) is (PeerLost if by.startswith("owner") else ConnectionClosed)
        assert error.quiesced is True
    for call in (lambda: ends.read(kvt.new_token()), lambda: ends.back.hold(kvt.new_token())):
        with pytest.raises((ConnectionClosed, PeerLost, LocalProtocolError)):
            call()
    if not by.startswith("owner"):
        assert grant.state == "open"  # it outlives the connection
        return
    assert grant.state == "revoked"
    raised(ConnectionClosed, grant)
    with pytest.raises(ConnectionClosed):
        ends.of.grant([0])


def test_a_pool_closes_with_its_grants(ends):
    grant, other = ends.of.grant([0]), ends.owner.register(ends.source.copy()).grant([0])
    waiting = ends.read(kvt.new_token(), wait_grant_s=LIMIT_S)
    with pytest.raises(WaitTimeout):
        ends.to.close(timeout=0.05)  # it waits for what it may fill
    ends.of.close()
    assert (grant.state, other.state) == ("revoked", "open")
    with pytest.raises(TransferCancelled, match="pool was closed"):
        grant.result(LIMIT_S)
    with pytest.raises(LocalProtocolError):
        ends.of.grant([0])
    waiting.cancel()
    ends.to.close(timeout=LIMIT_S)


def test_posted_before_there_is_a_session(endpoint, free_port):
    """connect(wait=False): reads, writes and leases are kept, and go when the peer is there."""
    reader, owner = endpoint(), endpoint()
    where = f"127.0.0.1:{free_port}"
    early = reader.connect(where, timeout=LIMIT_S, wait=False)
    target = np.zeros((2, NBYTES), np.uint8)
    to = reader.register(target)
    tokens = [kvt.new_token() for _ in range(3)]
    read = early.read_blocks(tokens[0], to, [0], wait_grant_s=LIMIT_S)
    write = early.write_blocks(tokens[1], to, [1], wait_grant_s=LIMIT_S)
    lease = early.hold(tokens[2], wait_grant_s=LIMIT_S)
    owner.listen(where)
    pool = owner.register(np.full((4, NBYTES), 7, np.uint8))
    grants = [
        pool.grant([0], token=tokens[0]),
        pool.grant([1], token=tokens[1], mode="write"),
        pool.grant([2], token=tokens[2]),
    ]
    assert read.result(LIMIT_S).nbytes == write.result(LIMIT_S).nbytes == NBYTES
    until(lambda: lease.held)
    assert (target[0] == 7).all()
    lease.release()
    assert grants[1].result(LIMIT_S).nbytes == NBYTES
    for grant in (grants[0], grants[2]):
        assert grant.result(LIMIT_S) is None


@pytest.mark.parametrize("first", ["the lease", "the refusal"])
def test_a_lease_that_waits_is_refused(ends, first):
    """At once, in either order; the refusal is kept for the read, which tells the reason."""
    token = kvt.new_token()
    if first == "the refusal":
        ends.out.refuse(token, "out of memory")
        ends.out.send_message(b"now").result(LIMIT_S)  # and so it has been heard
    lease = ends.back.hold(token, wait_grant_s=LIMIT_S)
    ends.back.send_message(b"now").result(LIMIT_S)
    if first == "the lease":
        ends.out.refuse(token, "out of memory")
    kvt.wait([lease], LIMIT_S / 4)
    assert isinstance(lease.exception(), PermissionDenied)
    error = raised(kvt.PeerAborted, ends.read(token, wait_grant_s=LIMIT_S))
    assert error.reason == "out of memory"


def test_in_a_forked_child(ends):
    """ForkedProcessError, at once, whatever is asked; the parent's grants go on."""
    grant = ends.of.grant([0])
    lease = ends.back.hold(grant.token)
    until(lambda: lease.held)
    calls = [
        lambda: ends.of.grant([1]),
        lambda: ends.of.reuse([0]),
        grant.revoke,
        lambda: grant.state,
        lease.release,
        lambda: ends.read(grant.token),
        lambda: ends.back.hold(grant.token),
    ]
    pid = os.fork()
    if pid == 0:
        wrong = 0
        for n, call in enumerate(calls):
            try:
                call()
                wrong |= 1 << n
            except ForkedProcessError:
                pass
            except BaseException:
                wrong |= 1 << n
        os._exit(wrong & 0xFF)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (grant.state, lease.held) == ("open", True)
    ends.read(grant.token).result(LIMIT_S)
    lease.release()
    assert grant.result(LIMIT_S) is None


def test_statistics(ends):
    kinds = [ends.of.grant([0]), ends.of.grant([0], ttl_s=0), ends.of.grant([0]), ends.of.grant([1])]
    ends.read(kinds[0].token).result(LIMIT_S)
    kinds[2].revoke()
    kinds[2].revoke()
    ends.of.reuse([2])
    for grant in kinds[:3]:
        until(grant.done)
    assert ends.owner.stats()["grants"] == {"made": 4, "finished": 1, "expired": 1, "revoked": 1, "open": 1}
    with pytest.raises(StaleGrant):
        ends.read(kinds[0].token).result(LIMIT_S)
    operations = ends.back.stats()["operations"]["read"]
    assert operations["ok"]["count"] == operations["StaleGrant"]["count"] == 1
    assert operations["ok"]["nbytes"] == NBYTES


def test_two_readers_of_one_grant(ends, endpoint):
    """`readers` counts peers, by who first shows the token; each has one read, and no third is let in."""
    peers = [endpoint() for _ in range(2)]
    where = ends.owner.listen("127.0.0.1:0")
    links = [ends.back, *(one.connect(where, timeout=LIMIT_S) for one in peers)]
    pools = [ends.to, *(one.register(np.zeros((BLOCKS, NBYTES), np.uint8)) for one in peers)]
    grant = ends.of.grant([1], readers=2)
    for link, pool in zip(links[:2], pools[:2], strict=True):
        assert grant.state == "open"
        link.read_blocks(grant.token, pool, [0]).result(LIMIT_S)
    assert grant.result(LIMIT_S) is None
    held = ends.of.grant([1], readers=2)
    for link in links[:2]:
        lease = link.hold(held.token)
        until(lambda lease=lease: lease.held)
    with pytest.raises(PermissionDenied):
        links[2].read_blocks(held.token, pools[2], [0]).result(LIMIT_S)
    held.revoke()
