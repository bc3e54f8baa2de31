"""The plain values that users and all parts of the package share.

Here: results, the peer's identity, names of states and protections, what may stand for block ids and arrays.
Not here: anything that does work, holds a resource, or knows a layout (`memory`) or a setting (`config`).

Invariant: every value is immutable, and this module imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Protection: TypeAlias = Literal["plain", "digest", "aead"]
PROTECTIONS: tuple[Protection, ...] = ("plain", "digest", "aead")
"""From the weakest to the strictest: the stricter of the two sides' is used."""

BACKENDS: tuple[str, ...] = ("inproc", "shm", "tcp")
"""The ways to move bytes that this version has, the preferred first."""

TransferState: TypeAlias = Literal["posted", "matched", "moving", "done", "failed", "cancelled"]
GrantState: TypeAlias = Literal["open", "read", "written", "expired", "revoked"]
GrantMode: TypeAlias = Literal["read", "write"]
ConnectionState: TypeAlias = Literal["connecting", "open", "lost"]
PeerLostCause: TypeAlias = Literal["reset", "heartbeat", "restarted", "closed"]
WaitingFor: TypeAlias = Literal["match", "gate", "bytes", "total"]

GroupIds: TypeAlias = "Sequence[int] | range | npt.NDArray[np.int32] | npt.NDArray[np.int64]"
"""Ids of one group of layers: ints, a range, or a one-dimensional array of int32 or int64."""
BlockIds: TypeAlias = "GroupIds | Mapping[str, GroupIds]"
"""Ids of the pool's only group, or {group name: ids}."""

LayerName: TypeAlias = "str | int"
"""A layer by its name, or by its place in the pool."""

Heads: TypeAlias = "slice | range | None"
"""Neighbouring KV heads of this side, step 1; None: all."""

Array: TypeAlias = Any
"""A torch tensor, numpy or cupy array, or anything with DLPack or the buffer protocol. None is imported."""


class TransferResult(NamedTuple):
    """What a finished transfer did, as seen by this side.

    Fields:
        nbytes: payload bytes, resumed ones included.
        seconds: from the post to the end.
        backend: the way that was used, "tcp" and so on.
        blocks: number of blocks, over all groups; each is counted once, however many layers it has.
        runs: contiguous runs of memory that were read or written here, after merging.
        chunks: units of pipelining; where the receiver copies, its copies.
        resumed_nbytes: of `nbytes`, what a lost connection had already brought and wasn't sent again.
        wire_s: from the first byte to the end; 0 if there was none.
        queued_s: from the post to the first byte.
        meta: the bytes that the other side gave as `meta`.
    """

    nbytes: int
    seconds: float
    backend: str
    blocks: int
    runs: int
    chunks: int
    resumed_nbytes: int
    wire_s: float
    queued_s: float
    meta: bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """Who the other end of a Connection is.

    Fields:
        incarnation: the 128-bit random id of its Endpoint; another one means that it has restarted.
        identity: the name that its key stands for; None without keys.
        address: where this connection goes, as `connect` would take it; for logs only.
        pid: its process id where it is known to run on this host, else None.
        uid: its user id where the system has proved it, else None.
    """

    incarnation: bytes
    identity: str | None = None
    address: str = ""
    pid: int | None = None
    uid: int | None = None

    def __str__(self) -> str:
        """Short and printable: identity or the start of the incarnation, and the address."""
        who = self.identity or self.incarnation[:4].hex()
        return f"{who}@{self.address}" if self.address else who
