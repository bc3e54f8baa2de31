"""Endpoint: this process's end. Where a user begins: listens, connects, registers memory.

Here: the calls, their checks, life and death of what an endpoint owns: the native engine, the acceptor
thread, pools. Not here: how peers are reached (`acceptor`), what is done with one (`connection`), memory
(`memory.pool`).

Invariant: after `close`, at interpreter exit, and in a forked child nothing of an endpoint runs or waits; a
call then raises ConnectionClosed or ForkedProcessError.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from kvtransport import _native
from kvtransport.acceptor import Acceptor
from kvtransport.completion import CompletionQueue, LoopBridges
from kvtransport.config import Config, available_cpus, default_movers, warn_of_unkept
from kvtransport.connection import Connection
from kvtransport.errors import ConnectionClosed, ConnectTimeout, ForkedProcessError, ResourceLimit
from kvtransport.grant import Grant, new_token, raw_of
from kvtransport.memory import pool as pools
from kvtransport.memory.allocation import HostMemory
from kvtransport.memory.layout import BlockLayout, LayerGroup
from kvtransport.memory.pool import BlockPool
from kvtransport.protocol.descriptor import Descriptor
from kvtransport.seconds import for_locks, to_wait
from kvtransport.transfer import LayerGate
from kvtransport.types import BlockIds, GrantMode, Peer

_GRACE_S: Final = 5.0
"""A connect's outcome may come so much later than its deadline, where others hold the GIL."""

_CALLERS_S: Final = 1.0
"""Threads that waited in the engine see its end at once, but need the GIL to leave: before the interpreter ends."""


class Endpoint:
    """The end of all connections of this process. A context manager; usually one per process.

    Config: see `kvtransport.Config`; None: the defaults. ResourceLimit: too few descriptors or threads, or
    too little memory for them.

    It keeps its pools and connections alive until they are closed, and itself, while it has connections:
    close it. An endpoint that is forgotten is closed at interpreter exit.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        warn_of_unkept(self._config)
        self._pid = os.getpid()
        self._incarnation = os.urandom(16)
        self._closed = False
        self._lock = threading.Lock()  # of _closed and _pools
        self._closing = threading.RLock()
        self._pools: set[BlockPool] = set()
        self._bridges = LoopBridges(_native.Queue)
        self._make_grant = _grant_maker(self._bridges)
        try:
            self._engine = _engine(self._incarnation, self._config)
            try:
                self._acceptor = _acceptor(self._engine, self._incarnation, self._config, weakref.ref(self))
            except BaseException:
                self._engine.close()
                raise
        except OSError as e:
            raise _for_users(e, "an endpoint") from None
        self._finalizer = weakref.finalize(
            self, _shut_down, self._pid, self._acceptor, self._engine, self._bridges
        )
        _living.add(self)

    # --- peers -------------------------------------------------------------------------------------------

    def listen(self, address: str, advertise: Sequence[str] = ()) -> str:
        """Listen at "127.0.0.1:0", "[::1]:7000", "name:7000" or "unix:/path"; return the address with its
        real port.

        Peers are accepted in the background from here on; `accept` returns them. It may be called several
        times.

        advertise: what peers should dial instead, for `descriptor`, where the address isn't the one that
        they see.

        InsecureConfigError: without a key, only unix sockets and loopback are allowed. OSError: it is in use.
        ResourceLimit: too few descriptors.
        """
        self._check()
        try:
            return self._acceptor.listen(address, advertise)
        except OSError as e:
            raise _for_users(e, "another listener") from None

    def descriptor(self) -> str:
        """Return a short printable string for a peer's `connect`: who this is, and all addresses it listens
        at.
        """
        self._check()
        return str(Descriptor(self._incarnation, self._acceptor.addresses()))

    def accept(self, timeout: float | None = 10) -> Connection:
        """Return the next new peer that has connected to us; waits for one. WaitTimeout: none came in time.

        timeout: in seconds; None: wait for ever.
        """
        self._check()
        connection = self._acceptor.arrivals.take(timeout)
        connection._settle()
        return connection

    def connect(
        self, where: str | Sequence[str], timeout: float | None = 10, wait: bool = True
    ) -> Connection:
        """Return the Connection to a peer, which may begin to listen later: it is tried until `timeout`
        seconds (None: for ever).

        where: an address, several of one peer, or a descriptor. To a peer that is connected: the same
        Connection.
        wait: False: return at once; what is posted waits for the session.

        ConnectTimeout (a TimeoutError): there was no session in time; its message has the last try's reason.
        AuthenticationError: another user listens there. VersionMismatch, InsecureConfigError, NoCommonPath,
        and RemoteProtocolError, where something else listens. PeerLost("restarted"): not the one of the
        descriptor.
        ValueError: malformed address, or a timeout that is NaN.
        """
        self._check()
        seconds = to_wait(timeout)
        if not wait:
            return self._acceptor.connect_later(where, seconds)
        future = self._acceptor.connect(where, seconds)
        try:
            return future.result(for_locks(seconds + _GRACE_S))
        except concurrent.futures.TimeoutError as e:
            if future.done():
                raise
            raise ConnectTimeout(
                f"no connection to {where} within {seconds:g} s: this process was too busy"
            ) from e
        finally:
            future.cancel()  # ends the tries of who was interrupted

    async def connect_async(self, where: str | Sequence[str], timeout: float | None = 10) -> Connection:
        """Do what `connect` does, without blocking the event loop. Cancelling the task ends the tries."""
        import asyncio  # which takes longer to import than the rest of the package

        self._check()
        return await asyncio.wrap_future(self._acceptor.connect(where, to_wait(timeout)))

    def connections(self) -> list[Connection]:
        """Return the Connections that are open."""
        self._check()
        return [c for c in self._acceptor.roster.connections() if c.state == "open"]

    def recv_messages(self, timeout: float | None = 0) -> list[tuple[Connection, bytes]]:
        """Return messages that peers have sent (`Connection.send_message`), in their order per peer.

        timeout: seconds to wait for the first; 0: don't; None: for ever. An empty list when there was none.
        """
        self._check()
        found = self._engine.recv_messages(to_wait(timeout))
        if not found:
            self._check()  # closed while this waited
        named = ((self._acceptor.roster.sender(session), data) for session, data in found)
        return [(connection, data) for connection, data in named if connection is not None]

    # --- memory ------------------------------------------------------------------------------------------

    def register(
        self,
        tensors: Any,
        layout: BlockLayout | None = None,
        *,
        name: str | None = None,
        groups: Sequence[LayerGroup] | None = None,
    ) -> BlockPool:
        """Make a pool of arrays of yours, whose blocks can then be sent and received by id.

        tensors: torch, numpy, DLPack or buffer: a list per layer, {name: array}, or one array. Read-only
        ones can be sent from. layout: of one layer's block; None: axis 0 is the block id, a block is opaque
        bytes. groups: layers of different layouts, each with block ids of its own. name: what peers know
        the pool by.

        The pool keeps the arrays alive, and this endpoint the pool, until `pool.close`. TypeError,
        ValueError: the arrays don't fit the layout, or their elements are in the other byte order.
        BackendUnavailable: memory that this version can't move.

        Don't resize what is registered. It is noticed at the next post (LocalProtocolError) where the array
        can be asked: a torch tensor's storage, a numpy array's owner. It isn't where another library owns
        the memory: a numpy array resized behind `torch.from_numpy`, anything behind DLPack.
        """
        self._check()
        made = pools.register(
            self._engine,
            tensors,
            layout,
            name=name,
            groups=groups,
            make_grant=self._make_grant,
            on_close=self._forget_pool(),
        )
        return self._keep(made)

    def allocate(
        self,
        layout: BlockLayout | None = None,
        num_layers: int | None = None,
        num_blocks: int | None = None,
        *,
        nbytes: int | None = None,
        name: str | None = None,
        layer_names: Sequence[str] | None = None,
    ) -> BlockPool | HostMemory:
        """Make a pool of fresh memory: `pool.arrays[name]` exports it by DLPack, with the true dtype.

        With `nbytes` alone: that many bare bytes, which numpy and torch can view and `register` takes.
        Zeroed.
        TypeError, ValueError: neither of the two forms, or a number that is not positive. ResourceLimit:
        there is no room for so much.
        """
        self._check()
        made = pools.allocate(
            self._engine,
            layout,
            num_layers,
            num_blocks,
            nbytes=nbytes,
            name=name,
            layer_names=layer_names,
            make_grant=self._make_grant,
            on_close=self._forget_pool(),
        )
        return self._keep(made) if isinstance(made, BlockPool) else made

    def layer_gate(self, num_layers: int) -> LayerGate:
        """Return a gate for `send_blocks(..., after=gate)`: layers are sent as they are marked ready."""
        self._check()
        return LayerGate(num_layers)

    def completion_queue(self) -> CompletionQueue:
        """Return a queue for `send_blocks(..., queue=q)` and the like: it yields each handle once it is
        over.
        """
        self._check()
        return CompletionQueue(_native.Queue())

    # --- itself ------------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> bytes:
        """The 16 random bytes that tell this endpoint from every other."""
        return self._incarnation

    @property
    def config(self) -> Config:
        """The settings it was made with."""
        return self._config

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def engine(self) -> _native.Engine:
        """The native engine, for Connection."""
        return self._engine

    @property
    def bridges(self) -> LoopBridges:
        """What wakes event loops, for handles."""
        return self._bridges

    def paths(self, connection: Connection) -> list[str]:
        """Return the lines of `Connection.explain` about ways: which is used, and why others are not."""
        if os.getpid() != self._pid:
            self._check()
        return self._acceptor.paths(connection)

    def stats(self) -> dict[str, Any]:
        """Return counters: connections, pools, handshakes; "peers": by connected peer what Connection.stats
        returns; "operations": by backend what became of all operations ever, also of peers that are gone.
        """
        self._check()
        connections = self._acceptor.roster.connections()
        return {
            "connections": len(connections),
            "pools": len(self._pools),
            **self._acceptor.stats(),
            "operations": self._engine.operations(),
            "grants": self._engine.grants(),
            "peers": {str(connection.peer): connection.stats() for connection in connections},
        }

    def close(self) -> None:
        """End it: pending transfers and connects raise ConnectionClosed, descriptors are closed, threads end.
        Idempotent.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
        with self._closing:  # whoever comes second returns when the first is through
            self._finalizer()
        with self._lock:
            self._pools.clear()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if os.getpid() != self._pid:  # whose locks may be held for ever
            return f"<Endpoint {self._incarnation[:4].hex()}: another process's>"
        state = "closed" if self._closed else ", ".join(self._acceptor.addresses()) or "not listening"
        return f"<Endpoint {self._incarnation[:4].hex()}: {state}>"

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcessError("this endpoint is the parent's; make another one after fork()")
        if self._closed:
            raise ConnectionClosed("the endpoint is closed")

    def _keep(self, made: BlockPool) -> BlockPool:
        with self._lock:
            self._pools.add(made)
        return made

    def _forget_pool(self) -> Callable[[BlockPool], None]:
        """Return what a pool calls when it is closed. A pool doesn't keep its endpoint, which keeps the pool:
        an endpoint that is forgotten ends at once, not in the midst of what the garbage collector interrupts.
        """
        endpoint = weakref.ref(self)

        def forget(pool: BlockPool) -> None:
            owner = endpoint()
            if owner is not None:
                with owner._lock:
                    owner._pools.discard(pool)

        return forget


def _grant_maker(bridges: LoopBridges) -> pools.GrantMaker:
    """Return what a pool makes grants by; it doesn't keep the endpoint."""

    def make(
        pool: BlockPool,
        block_ids: BlockIds | None,
        token: str | None,
        *,
        to: Peer | bytes | str | None,
        mode: GrantMode,
        readers: int | None,
        ttl_s: float | None,
        queue: CompletionQueue | None,
        tag: object,
    ) -> Grant:
        if mode not in ("read", "write"):
            raise ValueError(f"mode is {mode!r}, not 'read' or 'write'")
        if readers is not None and (isinstance(readers, bool) or not 0 < readers < 1 << 32):
            raise ValueError(f"readers is {readers!r}, not a positive number, or None for a standing grant")
        if queue is not None and not isinstance(queue, CompletionQueue):
            raise TypeError(f"queue={queue!r} is not a CompletionQueue (Endpoint.completion_queue makes one)")
        text = new_token() if token is None else token
        tag_id, native_queue = (0, None) if queue is None else (queue.next_id(), queue.native)
        native = pool.native.grant(
            block_ids,
            raw_of(text),
            mode=mode,
            to=_reader(to),
            readers=readers or 0,
            ttl_s=-1.0 if ttl_s is None else _ttl(ttl_s),
            queue=native_queue,
            handle_id=tag_id,
        )
        grant = Grant(native, bridges, pool, text, tag)
        if queue is not None:
            queue.entered(tag_id, grant)
        return grant

    return make


def _ttl(ttl_s: float) -> float:
    if not ttl_s >= 0:
        raise ValueError(f"ttl_s={ttl_s!r} is not a number of seconds; None: it doesn't expire")
    return ttl_s


def _reader(to: Peer | bytes | str | None) -> bytes:
    """Return whom a grant is for, as the engine knows peers; empty: anybody."""
    if to is None:
        return b""
    if isinstance(to, Peer):
        to = to.incarnation
    if isinstance(to, str):
        raise ValueError(f"to={to!r}: identities come with keys, which this version hasn't; name the Peer")
    if not isinstance(to, bytes) or len(to) != 16:
        raise ValueError("to= takes a Peer, or the 16 bytes of its incarnation")
    return to


def _for_users(error: OSError, what: str) -> Exception:
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return error
    return ResourceLimit(f"too few file descriptors for {what}; raise the limit (ulimit -n)")


def _engine(incarnation: bytes, config: Config) -> _native.Engine:
    return _native.Engine(
        incarnation,
        movers=config.movers or default_movers(available_cpus()),
        cpus=list(config.cpus or ()),
        dead_after_s=config.dead_after_s,
        handshake_timeout_s=config.handshake_timeout_s,
        max_pending=config.max_pending_handshakes,
        max_unmatched=config.max_unmatched,
        max_regions=config.max_regions,
        max_message_queue_nbytes=config.max_message_queue_nbytes,
        max_control_queue_nbytes=config.max_control_queue_nbytes,
        max_transfer_pieces=config.max_transfer_pieces,
        max_protocol_nbytes=config.max_protocol_nbytes,
    )


def _acceptor(
    engine: _native.Engine, incarnation: bytes, config: Config, endpoint: weakref.ref[Endpoint]
) -> Acceptor:
    """Return a running acceptor. It must not keep the endpoint alive, whose end is its own."""

    def make_connection(peer: Peer, backend_name: str, session: _native.Session | None) -> Connection:
        owner = endpoint()
        if owner is None:
            raise ConnectionClosed("the endpoint is gone")
        return Connection(endpoint=owner, peer=peer, backend_name=backend_name, session=session)

    acceptor = Acceptor(engine, incarnation, config, make_connection)
    try:
        acceptor.start()
    except RuntimeError as e:  # Python's for a thread that can't be started
        acceptor.abandon()
        raise ResourceLimit("too few threads for an endpoint; raise ulimit -u, or ulimit -v") from e
    return acceptor


def _shut_down(pid: int, acceptor: Acceptor, engine: _native.Engine, bridges: LoopBridges) -> None:
    """End what an endpoint owns: by close, by the garbage collector, or at interpreter exit."""
    if os.getpid() != pid:
        return
    acceptor.stop()
    engine.close()
    acceptor.drain()
    bridges.close()
    engine.wait_for_callers(_CALLERS_S)


_living: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _abandon_all() -> None:
    """In a forked child: close the descriptors of what the parent goes on using."""
    for endpoint in list(_living):
        endpoint._acceptor.abandon()


os.register_at_fork(after_in_child=_abandon_all)
