"""The bytes that come before a connection's first frame, and the only parser of them.

Here: the preamble, the JOIN of a lane and its answer, the records HELLO, ACCEPT, REJECT and CONFIRM. Not
here: their order (`handshake`), their protection (`auth`), frames (native).

Invariant: whatever the bytes are, a parser of this module returns a value whose every field is within its
bounds, or raises RemoteProtocolError. It reads no more than it was given, and allocates nothing by a length
that came with the bytes.

All integers are little-endian. Records are msgpack maps with a "type"; a field that this version doesn't
know is skipped, so that a neighbouring version may add some.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kvtransport.errors import RemoteProtocolError
from kvtransport.types import Protection

MAGIC: Final = b"KVTRNSP1"
JOIN_MAGIC: Final = b"KVTJOIN\0"
VERSION_MIN: Final = 1
VERSION_MAX: Final = 1
JOINS_NAME_RESPONDER: Final = 4
CAPABILITIES: Final = 3 | JOINS_NAME_RESPONDER
"""What this build knows beyond version 1's first form: 1 the destination may copy, 2 grants, 4 JOIN names whom it
is for.
"""

PREAMBLE_NBYTES: Final = 32
JOIN_NBYTES: Final = 64
JOIN_ANSWER_NBYTES: Final = 16
RECORD_HEADER_NBYTES: Final = 4
RECORD_MAX_NBYTES: Final = 16_384
SESSION_ID_NBYTES: Final = 16
INCARNATION_NBYTES: Final = 16
NAMED_NBYTES: Final = 4
"""So much of the responder's incarnation is in a JOIN: enough to tell an endpoint from its neighbours."""
KEY_ID_NBYTES: Final = 16

LANES_MAX: Final = 64
ADDRESSES_MAX: Final = 16
ADDRESS_MAX_CHARS: Final = 255
CHUNK_MIN_NBYTES: Final = 64
CHUNK_MAX_NBYTES: Final = 1 << 20
UNMATCHED_MAX: Final = 1 << 20
REGIONS_MAX: Final = 65_536
CONFIRM_TEXT: Final = b"ok"

_PREAMBLE = struct.Struct("<8sHHBBH16s")
_JOIN = struct.Struct("<16sI4s16s24s")
_JOIN_ANSWER = struct.Struct("<8sII")
_LENGTH = struct.Struct("<I")


class Role(enum.Enum):
    """Which end of a control connection: who dialled it, or who accepted it."""

    INITIATOR = "initiator"
    RESPONDER = "responder"


class Kind(enum.IntEnum):
    """What a connection is for, by its preamble."""

    CONTROL = 1
    LANE = 2
    CHANNEL = 3


# --- fixed-size messages ---------------------------------------------------------------------------------


class Preamble(Struct, frozen=True):
    """The first 32 bytes of every connection, in the dialler's direction."""

    version_min: int
    version_max: int
    kind: Kind
    suites: int
    key_id: bytes = bytes(KEY_ID_NBYTES)

    def encode(self) -> bytes:
        """Return the 32 bytes."""
        return _PREAMBLE.pack(
            MAGIC, self.version_min, self.version_max, self.kind, self.suites, 0, self.key_id
        )


class JoinAnswer(Struct, frozen=True):
    """What the accepting side says to a lane: `ok`, or its session has no such lane still to come, or it has
    reached another endpoint (`elsewhere`) than the one that its JOIN names.
    """

    lane: int
    ok: bool
    elsewhere: bool = False


def parse_preamble(data: bytes) -> Preamble:
    """Parse exactly 32 bytes."""
    _demand_length("preamble", data, PREAMBLE_NBYTES)
    magic, version_min, version_max, kind, suites, zero, key_id = _PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise RemoteProtocolError("the peer doesn't speak kvtransport: its first bytes are not the magic")
    if zero or kind not in tuple(Kind) or not 0 < version_min <= version_max:
        raise RemoteProtocolError("malformed preamble")
    return Preamble(version_min, version_max, Kind(kind), suites, key_id)


def encode_join(session_id: bytes, lane: int, nonce: bytes, responder: bytes = b"") -> bytes:
    """Return the 64 bytes that follow a lane's preamble. `responder`: its incarnation, if it knows of that."""
    return _JOIN.pack(session_id, lane, responder[:NAMED_NBYTES], nonce, b"")


def parse_join_answer(data: bytes) -> JoinAnswer:
    """Parse exactly 16 bytes."""
    _demand_length("JOIN answer", data, JOIN_ANSWER_NBYTES)
    magic, lane, status = _JOIN_ANSWER.unpack(data)
    if magic != JOIN_MAGIC or status > 2:
        raise RemoteProtocolError("malformed answer to JOIN")
    return JoinAnswer(lane, status == 0, status == 2)


def _demand_length(what: str, data: bytes, nbytes: int) -> None:
    if len(data) != nbytes:
        raise RemoteProtocolError(f"{what} of {len(data)} bytes instead of {nbytes}")


# --- records ---------------------------------------------------------------------------------------------

_Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
_Name = Annotated[str, Meta(max_length=128)]
_Address = Annotated[str, Meta(min_length=1, max_length=ADDRESS_MAX_CHARS)]
_Word = Annotated[str, Meta(max_length=64)]
_U16 = Annotated[int, Meta(ge=1, le=0xFFFF)]
_U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
_U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Lanes = Annotated[int, Meta(ge=1, le=LANES_MAX)]
_ChunkNbytes = Annotated[int, Meta(ge=CHUNK_MIN_NBYTES, le=CHUNK_MAX_NBYTES)]


class Reachability(Struct, frozen=True, kw_only=True):
    """Where a process runs, as it says itself: compared to find what two share, never a proof of anything.

    A namespace is the inode of its file under /proc/self/ns; 0: unknown.
    """

    boot_id: _Word = ""
    hostname: _Name = ""
    uid: _U32 = 0
    pid: _U32 = 0
    pid_started: _U63 = 0  # in clock ticks after boot: tells a process from a later one with its id
    pid_ns: _U63 = 0
    net_ns: _U63 = 0
    ipc_ns: _U63 = 0
    user_ns: _U63 = 0


class Limits(Struct, frozen=True, kw_only=True):
    """What a side lets its peer make it keep; the peer holds itself back so that it stays within.

    The defaults are those of a HELLO that says nothing of it.
    """

    max_unmatched: Annotated[int, Meta(ge=1, le=UNMATCHED_MAX)] = 1024
    max_regions: Annotated[int, Meta(ge=1, le=REGIONS_MAX)] = 1024
    max_message_queue_nbytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 64 << 20


class Hello(Struct, frozen=True, kw_only=True, tag="hello", tag_field="type"):
    """What each side says of itself; the initiator's comes second, and means that it wants this session."""

    incarnation: _Id
    version_min: _U16
    version_max: _U16
    protection: Protection  # the least that this side accepts on this connection
    lanes: _Lanes
    chunk_nbytes: _ChunkNbytes
    reachability: Reachability
    name: _Name = ""
    capabilities: _U63 = 0
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=ADDRESSES_MAX)] = ()
    features: Annotated[tuple[_Word, ...], Meta(max_length=32)] = ()
    limits: Limits | UnsetType = UNSET

    def holds_peer_to(self) -> Limits:
        """Return its limits, said or not."""
        return Limits() if self.limits is UNSET else self.limits


class Accept(Struct, frozen=True, kw_only=True, tag="accept", tag_field="type"):
    """The responder's terms; each follows from the two HELLOs, save the session's id."""

    session_id: _Id
    version: _U16
    protection: Protection
    lanes: _Lanes
    chunk_nbytes: _ChunkNbytes


class Reject(Struct, frozen=True, kw_only=True, tag="reject", tag_field="type"):
    """No session: `field` is what didn't fit, `reason` says it to a person."""

    field: _Word
    reason: Annotated[str, Meta(max_length=512)] = ""


class Confirm(Struct, frozen=True, kw_only=True, tag="confirm", tag_field="type"):
    """The initiator has the terms: the session begins. Frames follow."""

    text: Annotated[bytes, Meta(min_length=2, max_length=2)] = CONFIRM_TEXT


Record: TypeAlias = Hello | Accept | Reject | Confirm

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Hello | Accept | Reject | Confirm)


def demand_addresses(addresses: Sequence[str]) -> None:
    """Raise ValueError where a HELLO can't carry them."""
    for address in addresses:
        if not 0 < len(address) <= ADDRESS_MAX_CHARS or not address.isprintable():
            raise ValueError(
                f"{address!r}: peers can't be told an address that isn't 1 to {ADDRESS_MAX_CHARS} printable characters"
            )


def encode_record(record: Record) -> bytes:
    """Return the payload of a record, not yet sealed or framed. ValueError if it exceeds a bound."""
    payload = _encoder.encode(record)
    try:
        parse_record(payload)
    except RemoteProtocolError as e:
        raise ValueError(f"the peer would refuse this {type(record).__name__}: {e}") from e
    return payload


def parse_record(payload: bytes) -> Record:
    """Parse the payload of one record."""
    if len(payload) > RECORD_MAX_NBYTES:
        raise RemoteProtocolError(f"record of {len(payload)} bytes")
    try:
        record = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:  # ValidationError is a DecodeError
        raise RemoteProtocolError(f"malformed record: {printable(str(e))}") from None
    if isinstance(record, Hello):
        _check_hello(record)
    if isinstance(record, Confirm) and record.text != CONFIRM_TEXT:
        raise RemoteProtocolError("malformed record: CONFIRM without its text")
    return record


def _check_hello(hello: Hello) -> None:
    if hello.version_min > hello.version_max:
        raise RemoteProtocolError("malformed record: HELLO with an empty range of versions")
    host = hello.reachability
    for text in (hello.name, host.boot_id, host.hostname, *hello.addresses, *hello.features):
        if not text.isprintable():
            raise RemoteProtocolError("malformed record: HELLO with a name that can't be printed")


def frame_record(sealed: bytes) -> bytes:
    """Put the length before a sealed record."""
    if not 0 < len(sealed) <= RECORD_MAX_NBYTES:
        raise ValueError(f"record of {len(sealed)} bytes")
    return _LENGTH.pack(len(sealed)) + sealed


def parse_record_length(header: bytes) -> int:
    """Return how many bytes follow a record's 4-byte header: 1 to 16,384."""
    _demand_length("record header", header, RECORD_HEADER_NBYTES)
    (length,) = _LENGTH.unpack(header)
    if not 0 < length <= RECORD_MAX_NBYTES:
        raise RemoteProtocolError(f"record of {length} bytes")
    return int(length)


def printable(text: str, limit: int = 200) -> str:
    """Return what a peer sent as it can go into a log line: cut, one line, no control characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
