"""Connection: one peer. Where protocol, memory and backends meet.

Here: posting (checks, one native call), messages, refusals, what the connection tells of itself. Not here: where it
stands (`kvtransport.standing`), how it came about (`kvtransport.acceptor`), how bytes move (native), what a handle
can do (`kvtransport.transfer`, `kvtransport.grant`).

Invariant: a post is one native call; what can be known at the call is raised by it, everything else by its handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvtransport import _native
from kvtransport.completion import CompletionQueue
from kvtransport.errors import (
    ConnectionClosed,
    ForkedProcessError,
    KVTransportError,
)
from kvtransport.grant import Lease, raw_if_token, raw_of
from kvtransport.mapped import ANSWER_S, MappedBlocks, map_grant
from kvtransport.memory.pool import BlockPool
from kvtransport.standing import Standing
from kvtransport.transfer import LayerGate, SentMessage, Transfer, no_streams, require_gate
from kvtransport.types import BlockIds, Heads, LayerName

if TYPE_CHECKING:
    pass

MATCH_TIMEOUT_S = 300.0
STALL_TIMEOUT_S = 10.0


class Connection(Standing):
    """One peer, made by `Endpoint.connect` and `Endpoint.accept`. All methods are thread-safe; a context manager.

    peer: who the other end is.
    state: "connecting", "open" or "lost". A lost Connection stays so; `Endpoint.connect` makes a new one.
    """

    # --- two-sided transfers -------------------------------------------------------------------------------

    def send_blocks(
        self,
        pool: BlockPool,
        block_ids: BlockIds,
        *,
        key: str | bytes,
        layers: Iterable[LayerName] | None = None,
        heads: Heads = None,
        after: LayerGate | None = None,
        match_timeout_s: float = MATCH_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        timeout_s: float | None = None,
        meta: bytes = b"",
        stream: object = None,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Transfer:
        """Send blocks to the peer's `recv_blocks` of the same key. Returns at once; either side may be first.

        block_ids: one-dimensional; ids may repeat. {group: ids} where the pool has several groups.
        key: 1 to 255 bytes; names one unfinished send of this connection. layers: names or places, default all.
        heads: a slice of this side's KV heads. after: a gate; its layers are sent as they are released.
        match_timeout_s: the peer hasn't posted its side, or the gate stays shut. stall_timeout_s: no byte moves.
        timeout_s: in all. meta: at most 4,096 bytes, the peer's `result().meta`.
        The blocks must not be rewritten before the handle is done.

        Raises ValueError and TypeError for misuse, LocalProtocolError (key in use, pool closed, an array that moved
        since it was registered), PeerLost or ConnectionClosed (this connection has ended).
        """
        gate = None if after is None else self._gate(after, pool)
        limits = (match_timeout_s, stall_timeout_s, _total(timeout_s))
        post = self._session.post_send
        return self._post(
            post, pool, block_ids, key, layers, heads, (gate, *limits, meta), stream, queue, tag
        )

    def recv_blocks(
        self,
        pool: BlockPool,
        block_ids: BlockIds,
        *,
        key: str | bytes,
        layers: Iterable[LayerName] | None = None,
        heads: Heads = None,
        match_timeout_s: float = MATCH_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        timeout_s: float | None = None,
        meta: bytes = b"",
        stream: object = None,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Transfer:
        """Receive blocks from the peer's `send_blocks` of the same key, in place. Returns at once.

        Arguments are those of `send_blocks`. Both sides must name the same number of bytes: the same number of blocks
        and layers, pieces of equal size, equal dtype, order and K/V form; else LayoutMismatch, before any byte.

        Raises besides: ValueError where block ids overlap within the call or the pool is read-only,
        LocalProtocolError where another receive in flight fills some of the same bytes (it names its key).
        """
        limits = (match_timeout_s, stall_timeout_s, _total(timeout_s))
        post = self._session.post_recv
        return self._post(post, pool, block_ids, key, layers, heads, (*limits, meta), stream, queue, tag)

    def refuse(self, key_or_token: str | bytes, reason: str, *, remember_s: float = MATCH_TIMEOUT_S) -> None:
        """Tell the side that waits by this key or token, or will within `remember_s` seconds, that nothing comes.

        It gets PeerAborted(reason) at once: for a prefill that failed before it could send or grant. A lease that
        waits for a grant gets PermissionDenied, and the read after it PeerAborted(reason).
        """
        self._require_open()
        token = raw_if_token(key_or_token)
        try:
            self._session.refuse(key_or_token, reason, remember_s)
            if token is not None:  # a key may look like one
                self._session.refuse_token(token, reason, remember_s)
        except KVTransportError as error:
            raise self._named(error) from None

    # --- one-sided transfers -------------------------------------------------------------------------------

    def read_blocks(
        self,
        token: str,
        pool: BlockPool,
        block_ids: BlockIds,
        *,
        subset: BlockIds | None = None,
        wait_grant_s: float = 0,
        layers: Iterable[LayerName] | None = None,
        heads: Heads = None,
        src_heads: Heads = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        timeout_s: float | None = None,
        stream: object = None,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Transfer:
        """Read the blocks that the peer has granted under `token` into blocks of ours. The peer's Python isn't needed.

        block_ids: where they go, one for each granted block, in the order of the grant.
        subset: positions in the grant's ids, where not all are wanted (a prefix that is here already); as many as
            block_ids. {group: positions} where the pool has several groups.
        wait_grant_s: the peer may make the grant so much later.
        layers: names or places in our pool. Layers pair by name where both pools have names, else by place.
        heads: a slice of our KV heads. src_heads: of the owner's, as many.
        stall_timeout_s, timeout_s, queue, tag: as `recv_blocks`.

        A read that succeeds is the reader's last one, unless it holds a lease (`hold`): then any number may follow.

        The handle raises PermissionDenied (no such grant for us, or not these blocks), StaleGrant (it was ours and
        has ended: never data of a block that may have been rewritten), LayoutMismatch, and what `recv_blocks` raises.
        """
        theirs = None if src_heads is None else _peer_slice(src_heads)
        total = -1.0 if timeout_s is None else _total(timeout_s)
        raw, post = raw_of(token), self._session.post_read
        if layers is not None or heads is not None or stream is not None or queue is not None:
            own = (raw, subset, wait_grant_s, theirs, stall_timeout_s, total)
            return self._post(post, pool, block_ids, token, layers, heads, own, stream, queue, tag, True)
        try:  # the same, of the least: a small read takes some 2 us in all, and a frame is felt
            if self._error is not None or type(pool) is not BlockPool:
                self._check(pool)
            pool.check()
            stall = stall_timeout_s
            native = post(
                pool.native,
                block_ids,
                token,
                None,
                None,
                raw,
                subset,
                wait_grant_s,
                theirs,
                stall,
                total,
                None,
                0,
            )
        except KVTransportError as error:
            raise self._named(error) from None
        return Transfer(native, self._bridges, pool, token, tag, True)

    def write_blocks(
        self,
        token: str,
        pool: BlockPool,
        block_ids: BlockIds,
        *,
        subset: BlockIds | None = None,
        wait_grant_s: float = 0,
        layers: Iterable[LayerName] | None = None,
        heads: Heads = None,
        dst_heads: Heads = None,
        after: LayerGate | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        timeout_s: float | None = None,
        meta: bytes = b"",
        stream: object = None,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Transfer:
        """Write our blocks into those that the peer has granted under `token` with mode="write".

        block_ids: ours, one for each granted block. subset: positions in the grant's ids, as many as block_ids.
        heads: a slice of our KV heads. dst_heads: of the owner's, as many: several writers may fill one block.
        after: a gate; layers are written as they are released. meta: the owner's `grant.result().meta`.
        The rest, and what the handle raises: as `read_blocks`. Our blocks must not be rewritten before it is done.
        """
        gate = None if after is None else self._gate(after, pool)
        use = (raw_of(token), subset, wait_grant_s, _peer_slice(dst_heads))
        own = (*use, gate, stall_timeout_s, _total(timeout_s), meta)
        post = self._session.post_write
        return self._post(post, pool, block_ids, token, layers, heads, own, stream, queue, tag, True)

    def hold(
        self,
        token: str,
        *,
        wait_grant_s: float = 0,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> Lease:
        """Keep the peer's grant from expiring while our request for its blocks still queues; see Lease.

        wait_grant_s: the peer may make the grant so much later. queue: gets the lease when it has ended.
        """
        self._require_open()
        _require_queue(queue)
        raw, tag_id = raw_of(token), queue.next_id() if queue is not None else 0
        try:
            native = self._session.hold(raw, wait_grant_s, None if queue is None else queue.native, tag_id)
        except KVTransportError as error:
            raise self._named(error) from None
        lease = Lease(native, self._bridges, token, tag)
        if queue is not None:
            queue.entered(tag_id, lease)
        return lease

    def map_blocks(
        self, token: str, *, wait_grant_s: float = 0, timeout: float | None = ANSWER_S
    ) -> MappedBlocks:
        """Lend the peer's blocks without copying: `with conn.map_blocks(token) as m:` reads them where they lie.

        The peer is on this host, and its pool in memory of `Endpoint.allocate`; see MappedBlocks. While it is mapped
        the grant doesn't expire, and its owner's `revoke()` raises GrantError unless forced.
        **What was computed of the blocks is valid only if the `with` is left without an error**: that is where it
        is found out whether they were the grant's until then.

        wait_grant_s: the peer may make the grant so much later. timeout: for its answer, beyond that.

        Raises PermissionDenied, StaleGrant, PeerLost as a lease does; BackendUnavailable where the blocks can't be
        mapped, and WaitTimeout where no answer has come: nothing is held then.
        """
        self._require_open()
        raw = raw_of(token)

        def hold() -> Lease:
            native = self._session.hold(raw, wait_grant_s, None, 0, mapped=True)
            return Lease(native, self._bridges, token)

        def channel() -> tuple[str, str]:
            self._settle()
            return self.shared()

        try:
            return map_grant(hold, None if timeout is None else wait_grant_s + timeout, channel)
        except KVTransportError as error:
            raise self._named(error) from None

    # --- messages ------------------------------------------------------------------------------------------

    def send_message(
        self,
        data: bytes,
        *,
        after: Transfer | None = None,
        queue: CompletionQueue | None = None,
        tag: object = None,
    ) -> SentMessage:
        """Send up to 1 MiB to the peer's `Endpoint.recv_messages`, in order with other messages.

        after: a transfer; the message goes when that has succeeded. If it fails, the message isn't sent and its
        handle raises that error. The handle is done when the peer's endpoint has queued the message.
        """
        self._require_open()
        view = memoryview(data)  # TypeError for what has no bytes: bytes(5) would be five zeros
        if after is not None and not isinstance(after, Transfer):
            raise TypeError(f"after={after!r} is not a Transfer")
        _require_queue(queue)
        tag_id = queue.next_id() if queue is not None else 0
        try:
            native = self._session.post_message(
                bytes(view),
                None if after is None else after.native,
                None if queue is None else queue.native,
                tag_id,
            )
        except KVTransportError as error:
            raise self._named(error) from None
        message = SentMessage(native, self._bridges, tag)
        if queue is not None:
            queue.entered(tag_id, message)
        return message

    # --- what it is ----------------------------------------------------------------------------------------

    def explain(self) -> str:
        """Say which way bytes go, why, and what was refused and why; some lines of text."""
        lines = [f"connection to {self.peer}: {self.state}"]
        if self._error is not None:
            lines.append(f"  {self._error}")
        lines.extend(f"  {line}" for line in self._endpoint.paths(self))
        return "\n".join(lines)

    def stats(self) -> dict[str, Any]:
        """Return this connection's counters: chunks, bytes, transfers and messages by direction.

        "operations": {"send" | "recv" | "message": {"ok" or an error's class: {"count", "nbytes", "seconds"}}};
        seconds, from the post to the end: {"sum", "bounds", "counts"}, a histogram whose last count is of all
        above the last bound.
        """
        return {"peer": str(self.peer), "backend": self.backend, **self._session.stats()}

    @property
    def backend(self) -> str:
        """The name of the way in use, "none" before there is one."""
        return "shm" if self._session.channel()[0] == "up" else self._session.backend()

    def close(self) -> None:
        """End the connection: what is unfinished here raises ConnectionClosed, the peer gets PeerLost(closed)."""
        self._end(ConnectionClosed("this connection was closed here"), "local")
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Connection:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Peer, state and backend."""
        try:
            return f"<Connection to {self.peer} {self.state} over {self.backend}>"
        except ForkedProcessError:
            return f"<Connection to {self.peer} of another process>"

    def _post(
        self,
        post: Callable[..., _native.Transfer],
        pool: BlockPool,
        block_ids: BlockIds,
        key: str | bytes,
        layers: Iterable[LayerName] | None,
        heads: Heads,
        own: tuple[object, ...],
        stream: object,
        queue: CompletionQueue | None,
        tag: object,
        by_token: bool = False,
    ) -> Transfer:
        """Make one native call: the session's `post`, with `own` in the middle of its arguments.

        key: the name of the transfer; `by_token`: it is a grant's token.
        """
        if stream is not None:
            raise self._named(no_streams())
        if queue is not None:
            _require_queue(queue)
        try:
            self._check(pool)
            index = None if layers is None else pool.layer_indices(layers)
            slice_ = None if heads is None else pool.head_slice(heads, index)
            if queue is None:
                native = post(pool.native, block_ids, key, index, slice_, *own, None, 0)
                return Transfer(native, self._bridges, pool, key, tag, by_token)
            tag_id = queue.next_id()
            native = post(pool.native, block_ids, key, index, slice_, *own, queue.native, tag_id)
        except KVTransportError as error:
            raise self._named(error) from None
        transfer = Transfer(native, self._bridges, pool, key, tag, by_token)
        queue.entered(tag_id, transfer)
        return transfer

    def _gate(self, gate: object, pool: BlockPool) -> _native.Gate:
        try:
            self._check(pool)
            return require_gate(gate, pool).native
        except KVTransportError as error:
            raise self._named(error) from None

    def _check(self, pool: BlockPool) -> None:
        """What is cheap and can be known at the call."""
        if self._error is not None:
            self._require_open()
        if not isinstance(pool, BlockPool):
            raise TypeError(f"pool is {type(pool).__name__}, not a BlockPool (Endpoint.register makes one)")
        pool.check()


def _require_queue(queue: object) -> None:
    if queue is not None and not isinstance(queue, CompletionQueue):
        raise TypeError(f"queue={queue!r} is not a CompletionQueue (Endpoint.completion_queue makes one)")


def _peer_slice(heads: Heads) -> tuple[int, int] | None:
    """Return (first, count) of heads of the peer's pool, of which only the peer knows how many there are."""
    if heads is None:
        return None
    if not isinstance(heads, (slice, range)):
        raise TypeError(f"heads={heads!r} is neither a slice nor a range")
    if heads.step not in (None, 1):
        raise ValueError(f"heads={heads!r}: only neighbouring heads, step 1, can be moved together")
    start, stop = heads.start or 0, heads.stop
    if stop is None or not 0 <= start < stop < 1 << 32:
        raise ValueError(f"heads={heads!r}: say where the slice of the peer's heads begins and ends")
    return start, stop - start


def _total(timeout_s: float | None) -> float:
    """Return `timeout_s` as the engine wants it: negative is none, which no caller may mean by accident."""
    if timeout_s is None:
        return -1.0
    if not timeout_s >= 0:
        raise ValueError(f"timeout_s={timeout_s!r} is not a number of seconds")
    return timeout_s
