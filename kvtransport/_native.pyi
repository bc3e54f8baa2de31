"""The native engine of kvtransport. Not public: use kvtransport.Endpoint.

Every call that can block or takes a lock of the engine releases the GIL. Errors are those of kvtransport.errors.
A `queue` and a `handle_id`: the queue gets the id when the operation has ended.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from kvtransport.types import BlockIds, ConnectionState, GrantState, TransferState

_Part: TypeAlias = tuple[int, int, list[tuple[int, int]], int, int]
_Layer: TypeAlias = tuple[str, int, list[_Part]]
_Group: TypeAlias = tuple[str, int, int, bool, str, str, str, int]
_Result: TypeAlias = tuple[int, float, str, int, int, int, int, float, float, bytes]

class Queue:
    def __init__(self) -> None: ...
    def fileno(self) -> int: ...
    def push(self, tag: int) -> None: ...
    def poll(self) -> list[int]: ...

class Gate:
    def __init__(self, num_layers: int) -> None: ...
    def mark_ready(self, layer: int) -> None: ...
    def fail(self, reason: str) -> None: ...
    def word_address(self) -> int: ...
    @property
    def num_layers(self) -> int: ...

class Pool:
    def __init__(
        self,
        engine: Engine,
        name: str | None,
        groups: list[_Group],
        layers: list[_Layer],
        *,
        named: bool,
        writable: bool,
    ) -> None: ...
    def close(self, timeout_s: float) -> bool: ...
    def in_use(self) -> int: ...
    def grant(
        self,
        ids: BlockIds | None,
        token: bytes,
        *,
        mode: str,
        to: bytes,
        readers: int,
        ttl_s: float,
        queue: Queue | None,
        handle_id: int,
    ) -> Transfer: ...
    def reuse(self, ids: BlockIds) -> None: ...
    @property
    def id(self) -> int: ...

class Engine:
    def __init__(
        self,
        incarnation: bytes,
        *,
        movers: int,
        cpus: Sequence[int],
        dead_after_s: float,
        handshake_timeout_s: float,
        max_pending: int = 64,
        max_unmatched: int = 1024,
        max_regions: int = 1024,
        max_message_queue_nbytes: int = 67_108_864,
        max_control_queue_nbytes: int = 1_048_576,
        max_transfer_pieces: int = 16_777_216,
    ) -> None: ...
    def add_listener(self, fd: int) -> int: ...
    def remove_listener(self, listener_id: int) -> None: ...
    def event_fd(self) -> int: ...
    def poll_events(self) -> list[tuple[object, ...]]: ...
    def new_session(self, placeholder: bytes) -> Session: ...
    def open_session(
        self,
        control_fd: int,
        *,
        session_id: bytes,
        protection: str,
        lanes: int,
        chunk_nbytes: int,
        peer_pid: int,
        backend: str = "tcp",
        peer_max_unmatched: int = 1024,
        peer_max_regions: int = 1024,
        peer_max_message_queue_nbytes: int = 67_108_864,
        socket_buffer_nbytes: int = 0,
        peer_incarnation: bytes = b"",
        capabilities: int = 0,
    ) -> Session: ...
    def open_inproc_pair(
        self,
        other: Engine,
        *,
        session_id: bytes,
        protection: str = "plain",
        mine: Session | None = None,
        theirs: Session | None = None,
    ) -> tuple[Session, Session]: ...
    def recv_messages(self, timeout_s: float) -> list[tuple[bytes, bytes]]: ...
    def operations(self) -> dict[str, Any]: ...
    def grants(self) -> dict[str, int]: ...
    def forked(self) -> bool: ...
    def close(self) -> None: ...
    def wait_for_callers(self, timeout_s: float) -> bool: ...

class Session:
    @property
    def id(self) -> bytes: ...
    def adopt(self, other: Session) -> None: ...
    def add_lane(self, fd: int, number: int) -> None: ...
    def ready(self) -> bool: ...
    def post_send(
        self,
        pool: Pool,
        ids: BlockIds,
        key: str | bytes,
        layers: Sequence[int] | None,
        heads: tuple[int, int] | None,
        gate: Gate | None,
        match_timeout_s: float,
        stall_timeout_s: float,
        timeout_s: float,
        meta: bytes,
        queue: Queue | None,
        handle_id: int,
    ) -> Transfer: ...
    def post_recv(
        self,
        pool: Pool,
        ids: BlockIds,
        key: str | bytes,
        layers: Sequence[int] | None,
        heads: tuple[int, int] | None,
        match_timeout_s: float,
        stall_timeout_s: float,
        timeout_s: float,
        meta: bytes,
        queue: Queue | None,
        handle_id: int,
    ) -> Transfer: ...
    def refuse(self, key: str | bytes, reason: str, remember_s: float) -> None: ...
    def refuse_token(self, token: bytes, reason: str, remember_s: float) -> None: ...
    def post_read(
        self,
        pool: Pool,
        ids: BlockIds,
        key: str,
        token: bytes,
        subset: BlockIds | None,
        wait_grant_s: float,
        layers: Sequence[int] | None,
        heads: tuple[int, int] | None,
        src_heads: tuple[int, int] | None,
        stall_timeout_s: float,
        timeout_s: float,
        queue: Queue | None,
        handle_id: int,
    ) -> Transfer: ...
    def post_write(
        self,
        pool: Pool,
        ids: BlockIds,
        key: str,
        token: bytes,
        subset: BlockIds | None,
        wait_grant_s: float,
        layers: Sequence[int] | None,
        heads: tuple[int, int] | None,
        dst_heads: tuple[int, int] | None,
        gate: Gate | None,
        stall_timeout_s: float,
        timeout_s: float,
        meta: bytes,
        queue: Queue | None,
        handle_id: int,
    ) -> Transfer: ...
    def hold(self, token: bytes, wait_grant_s: float, queue: Queue | None, handle_id: int) -> Transfer: ...
    def post_message(
        self, data: bytes, after: Transfer | None, queue: Queue | None, handle_id: int
    ) -> Transfer: ...
    def close(self, cause: str) -> None: ...
    def set_peer(self, label: str) -> None: ...
    def state(self) -> ConnectionState: ...
    def lost_reason(self) -> tuple[str, str]: ...
    def backend(self) -> str: ...
    def stats(self) -> dict[str, Any]: ...

class Transfer:
    def wait(self, timeout_s: float) -> bool: ...
    def result(self) -> _Result | None: ...
    def exception(self) -> BaseException | None: ...
    def done(self) -> bool: ...
    def cancel(self) -> None: ...
    def state(self) -> TransferState: ...
    def progress(self) -> tuple[int, int]: ...
    def wait_layer(self, layer: int, timeout_s: float) -> bool: ...
    def subscribe(self, queue: Queue, handle_id: int) -> bool: ...
    def grant_state(self) -> GrantState: ...
    def revoke(self) -> None: ...
    def is_held(self) -> bool: ...
    def let_go(self) -> None: ...

def wait_many(handles: Sequence[Transfer], timeout_s: float, all_of: bool) -> bool: ...
def transfer_table() -> list[tuple[str, str, str, str, str]]: ...
def crc32c(data: bytes, crc: int = 0) -> int: ...
def crc32c_kind() -> str: ...
