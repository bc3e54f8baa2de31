"""Every error that kvtransport raises on purpose, as one tree.

Here: the classes and what each carries. Not here: when they are raised, or their messages.
Plain misuse of a call (a wrong type, an id out of range) is TypeError or ValueError and not in this tree.

Invariant: any class can be made by `cls(message, **attributes)` with any subset of its attributes (so native
code needs no case per class), and every instance has every attribute of its class.

    KVTransportError                         .peer .backend
    ├── ConfigError (also ValueError) ── InsecureConfigError
    ├── BackendUnavailable                   .reason .remedy
    ├── HandshakeError ── VersionMismatch · NoCommonPath(.reasons) · AuthenticationError · DowngradeError
    ├── ConnectTimeout (also TimeoutError)
    ├── ProtocolError ── LocalProtocolError (we asked what the state forbids)
    │                  · RemoteProtocolError (the peer broke the rules)
    ├── PeerLost (.cause: reset | heartbeat | restarted | closed)
    ├── ConnectionClosed (we closed it)
    ├── ForkedProcessError
    ├── ResourceLimit
    ├── GrantError ── StaleGrant · PermissionDenied
    ├── LayoutMismatch (.path .ours .theirs)
    └── TransferError ── TransferTimeout (also TimeoutError; .waiting_for: match | gate | bytes | total)
                       · TransferCancelled · PeerAborted(.reason) · IntegrityError
    WaitTimeout (a TimeoutError): you stopped waiting; the transfer goes on

Every error raised by a transfer or a grant, whatever its class, also says what became of that transfer:
`.key .blocks .failed_block_ids .quiesced .retryable .delivered` (see `TransferOutcome`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

BlockStates = Mapping[str, Mapping[int, Literal["sealed", "poisoned"]]]

_NO_BLOCKS: BlockStates = {}


class TransferOutcome(Exception):
    """What an error tells about the transfer that it ended. Not raised itself.

    Fields:
        key: the transfer's key or token; None where the error isn't a transfer's.
        blocks: {group: {block id: "sealed" | "poisoned"}} of the destination. A block is sealed when
            all its pieces (one per layer) have landed and verified. Empty at the source.
        failed_block_ids: the poisoned ids: a list; for several groups {group: list}.
        quiesced: True: no byte of it moves any more, its memory is yours again. False: it may still be
            touched, don't free it. None: the error isn't about memory in use.
        retryable: the same call may succeed if it is made again, on a new connection where this one is lost.
        delivered: told at the source. False: the destination has confirmed that it won't seal. None: unknown.
    """

    _attributes: ClassVar[tuple[str, ...]] = (
        "key",
        "blocks",
        "failed_block_ids",
        "quiesced",
        "retryable",
        "delivered",
    )

    key: str | bytes | None = None
    quiesced: bool | None = None
    retryable: bool = False
    delivered: bool | None = None
    _blocks: BlockStates | Callable[[], BlockStates] = _NO_BLOCKS
    _failed_block_ids: list[int] | dict[str, list[int]] | None = None

    def __init__(self, message: str = "", **attributes: object) -> None:
        """Any attribute of the class may be given by name; TypeError for a name that it hasn't."""
        super().__init__(message)
        for name, value in attributes.items():
            if name not in self.attribute_names():
                raise TypeError(f"{type(self).__name__} has no attribute {name!r}")
            setattr(self, "_" + name if name in ("blocks", "failed_block_ids") else name, value)

    @classmethod
    def attribute_names(cls) -> tuple[str, ...]:
        """Return the names that the constructor takes."""
        names: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            names.update(dict.fromkeys(vars(base).get("_attributes", ())))
        return tuple(names)

    @property
    def blocks(self) -> BlockStates:
        """{group: {block id: state}}; built when first asked for, where it was given as a function."""
        if callable(self._blocks):
            self._blocks = self._blocks()
        return self._blocks

    @property
    def failed_block_ids(self) -> list[int] | dict[str, list[int]]:
        """The poisoned ids: a list, or {group: list} where there are several groups."""
        if self._failed_block_ids is not None:
            return self._failed_block_ids
        failed = {
            group: [i for i, state in ids.items() if state != "sealed"] for group, ids in self.blocks.items()
        }
        if len(failed) > 1:
            return failed
        return next(iter(failed.values()), [])


class KVTransportError(TransferOutcome):
    """The base of the tree. `.peer`: whom it concerns, printable; `.backend`: the name of the way in use."""

    _attributes: ClassVar[tuple[str, ...]] = ("peer", "backend")

    peer: str | None = None
    backend: str | None = None


class ConfigError(KVTransportError, ValueError):
    """A setting that can't be used. The message names the field, the fault and the remedy; never a key."""


class InsecureConfigError(ConfigError):
    """What was asked for would be open to others, and `insecure=True` wasn't said."""


class BackendUnavailable(KVTransportError):
    """A way to move bytes, or a kind of memory, that doesn't work here."""

    _attributes: ClassVar[tuple[str, ...]] = ("reason", "remedy")

    reason: str = ""
    remedy: str = ""


class HandshakeError(KVTransportError):
    """The peer was reached, and no session came of it."""


class VersionMismatch(HandshakeError):
    """The two sides' ranges of protocol versions don't meet."""


class NoCommonPath(HandshakeError):
    """No backend that both sides allow can join these memories. `.reasons`: {backend: why it was refused}."""

    _attributes: ClassVar[tuple[str, ...]] = ("reasons",)

    reasons: Mapping[str, str] = {}


class AuthenticationError(HandshakeError):
    """The other end didn't prove that it is who may talk to us."""


class DowngradeError(HandshakeError):
    """Less protection arrived than both sides had offered."""


class ConnectTimeout(KVTransportError, TimeoutError):
    """`connect` came to no session within its timeout. The message says why the last try failed."""

    retryable = True


class ProtocolError(KVTransportError):
    """The rules of the wire or of the API were broken."""


class LocalProtocolError(ProtocolError):
    """We asked what the state forbids: a key in use, bytes in flight, an array that moved, a closed pool."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the rules; its connection is closed."""


class PeerLost(KVTransportError):
    """The peer is gone. `.cause`: "reset" | "heartbeat" | "restarted" | "closed" (by the peer)."""

    _attributes: ClassVar[tuple[str, ...]] = ("cause",)

    cause: str = "reset"
    retryable = True


class ConnectionClosed(KVTransportError):
    """Our side closed the connection or the endpoint."""


class ForkedProcessError(KVTransportError):
    """Used in a child of the process that made it. Make an Endpoint of your own after fork()."""


class ResourceLimit(KVTransportError):
    """A limit of Config or of the system was reached."""

    retryable = True


class GrantError(KVTransportError):
    """A one-sided operation wasn't allowed: catch this, and compute the blocks again."""


class StaleGrant(GrantError):
    """The grant had been ours to use and has ended: read, revoked, reused or expired."""


class PermissionDenied(GrantError):
    """The owner's answer to every token that it won't honour, the same for all reasons."""


class LayoutMismatch(KVTransportError):
    """The two sides' blocks differ in form. `.path`: the field that does, e.g. "dtype" or "layers"."""

    _attributes: ClassVar[tuple[str, ...]] = ("path", "ours", "theirs")

    path: str = ""
    ours: object = None
    theirs: object = None


class TransferError(KVTransportError):
    """A transfer ended without success, for a reason of its own."""


class TransferTimeout(TransferError, TimeoutError):
    """A limit of the transfer passed. `.waiting_for`: "match" | "gate" | "bytes" | "total"."""

    _attributes: ClassVar[tuple[str, ...]] = ("waiting_for",)

    waiting_for: str = "total"
    retryable = True


class TransferCancelled(TransferError):
    """Our side cancelled it."""


class PeerAborted(TransferError):
    """The other side ended it. `.reason`: in its words."""

    _attributes: ClassVar[tuple[str, ...]] = ("reason",)

    reason: str = ""


class IntegrityError(TransferError):
    """Bytes arrived other than they were sent. The blocks that they touched are poisoned."""

    retryable = True


class WaitTimeout(TransferOutcome, TimeoutError):
    """You stopped waiting; what you waited for goes on, and still uses its memory."""

    quiesced = False
