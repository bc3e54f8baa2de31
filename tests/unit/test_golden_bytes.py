"""Bytes that version 1 has on the wire, checked in: handshakes encoded and decoded, and the frames read by the
rules of docs/reference/wire.md alone (native/tests/test_golden.cpp holds the code to the same file)."""

import struct
from pathlib import Path

import msgspec
import pytest

from kvtransport._native import crc32c
from kvtransport.protocol import messages
from kvtransport.protocol.auth import NullSuite
from kvtransport.protocol.handshake import Established, Handshake
from kvtransport.protocol.messages import (
    Accept,
    Confirm,
    Hello,
    JoinAnswer,
    Kind,
    Limits,
    Preamble,
    Reachability,
    Reject,
    Role,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str) -> dict[str, bytes]:
    """[name], then its hex; # begins a comment."""
    found: dict[str, str] = {}
    at = ""
    for line in (GOLDEN / name).read_text(encoding="ascii").splitlines():
        if line.startswith("["):
            at = line.strip("[]")
            found[at] = ""
        elif not line.startswith("#"):
            found[at] = found.get(at, "") + line.strip()
    return {name: bytes.fromhex(text) for name, text in found.items() if name}


FRAMES = golden("frames.hex")
HANDSHAKE = golden("handshake.hex")

# --- the handshake ---------------------------------------------------------------------------------------


def hello(who: int) -> Hello:
    return Hello(
        incarnation=bytes([who]) * 16,
        version_min=1,
        version_max=1,
        protection="digest" if who == 1 else "plain",
        lanes=2,
        chunk_nbytes=1 << 20,
        reachability=Reachability(
            boot_id="00000000-0000-0000-0000-000000000001",
            hostname="host",
            uid=1000,
            pid=41 + who,
            pid_started=5,
            pid_ns=6,
            net_ns=7,
            ipc_ns=8,
            user_ns=9,
        ),
        name=("prefill", "decode")[who - 1],
        addresses=("127.0.0.1:7000",),
        features=("tcp",),
    )


ACCEPT = Accept(session_id=bytes(range(16)), version=1, protection="digest", lanes=2, chunk_nbytes=1 << 20)
RECORDS = {
    "hello": hello(1),
    "hello, with limits": msgspec.structs.replace(
        hello(1), limits=Limits(max_unmatched=64, max_regions=2048, max_message_queue_nbytes=1 << 20)
    ),
    "accept": ACCEPT,
    "reject": Reject(field="version", reason="upgrade the older side"),
    "confirm": Confirm(),
}
FIXED = {
    "preamble, control": Preamble(1, 1, Kind.CONTROL, 1).encode(),
    "preamble, lane": Preamble(1, 1, Kind.LANE, 1).encode(),
    "join": messages.encode_join(bytes(range(16)), 3, bytes(range(16, 32))),
    "join, names the responder": messages.encode_join(
        bytes(range(16)), 3, bytes(range(16, 32)), bytes([9] * 16)
    ),
}


def test_every_message_is_there() -> None:
    streams = {"hello, of a later version", "initiator", "responder"}
    answers = {"join answer", "join answer, refused", "join answer, another endpoint"}
    assert set(HANDSHAKE) == set(RECORDS) | set(FIXED) | streams | answers


@pytest.mark.parametrize("name", FIXED)
def test_fixed_messages(name: str) -> None:
    assert FIXED[name] == HANDSHAKE[name]


def test_fixed_messages_are_read() -> None:
    assert messages.parse_preamble(HANDSHAKE["preamble, control"]) == Preamble(1, 1, Kind.CONTROL, 1)
    assert messages.parse_preamble(HANDSHAKE["preamble, lane"]) == Preamble(1, 1, Kind.LANE, 1)
    assert messages.parse_join_answer(HANDSHAKE["join answer"]) == JoinAnswer(3, True)
    assert messages.parse_join_answer(HANDSHAKE["join answer, refused"]) == JoinAnswer(3, False)
    assert messages.parse_join_answer(HANDSHAKE["join answer, another endpoint"]) == JoinAnswer(
        3, False, True
    )


@pytest.mark.parametrize("name", RECORDS)
def test_records(name: str) -> None:
    data = HANDSHAKE[name]
    assert messages.frame_record(messages.encode_record(RECORDS[name])) == data
    assert messages.parse_record_length(data[:4]) == len(data) - 4
    assert messages.parse_record(data[4:]) == RECORDS[name]


def test_a_field_that_this_version_does_not_know_is_skipped() -> None:
    assert messages.parse_record(HANDSHAKE["hello, of a later version"][4:]) == hello(1)


def counting(n: int) -> bytes:
    return bytes(range(n))


def test_a_whole_handshake_says_these_bytes() -> None:
    sides = {
        role: Handshake(role, hello(who), NullSuite(counting), entropy=counting)
        for role, who in ((Role.INITIATOR, 1), (Role.RESPONDER, 2))
    }
    said = dict.fromkeys(sides, b"")
    unread = dict.fromkeys(sides, b"")
    done = set()

    def act(role: Role, events: list) -> None:
        for event in events:
            if isinstance(event, Established):
                done.add(role)
            else:
                known = type(event).__name__ == "PeerKnown"
                act(role, sides[role].proceed() if known else sides[role].proved())

    for role, side in sides.items():
        act(role, side.start())
    while len(done) < 2:
        for role, side in sides.items():
            other = Role.RESPONDER if role is Role.INITIATOR else Role.INITIATOR
            out = side.outgoing()
            said[role] += out
            unread[other] += out
            wanted = side.wants()
            if wanted and len(unread[role]) >= wanted:
                head, unread[role] = unread[role][:wanted], unread[role][wanted:]
                act(role, side.receive(head))
    for role, side in sides.items():
        assert said[role] + side.outgoing() == HANDSHAKE[role.value]


# --- frames, by the text of the reference -----------------------------------------------------------------

HEADER = struct.Struct("<BBHIQQQQ20sI")
TYPES = [
    "POOL",
    "OFFER",
    "WANT",
    "CHUNK",
    "DONE",
    "ABORT",
    "ABORTED",
    "GATED",
    "RELEASED",
    "MESSAGE",
    "MESSAGE_ACK",
    "PING",
    "CLOSE",
    "LOCATED",
    "AGAIN",
    "COPIED",
    "READ",
    "WRITE",
    "HOLD",
    "HELD",
    "TOOK",
]


def castagnoli(data: bytes, crc: int = 0) -> int:
    """CRC-32C bit by bit: reflected polynomial 0x82f63b78, inverted before and after."""
    crc ^= 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, form: str) -> tuple:
        values = struct.unpack_from("<" + form, self.data)
        self.data = self.data[struct.calcsize("<" + form) :]
        return values

    def text(self) -> bytes:
        (nbytes,) = self.take("H")
        head, self.data = self.data[:nbytes], self.data[nbytes:]
        return head

    def terms(self) -> tuple:
        (pool,) = self.take("Q")
        groups = [self.take("HI") for _ in range(self.take("I")[0])]
        layers = [self.take("HQ") for _ in range(self.take("I")[0])]
        return pool, groups, layers


@pytest.mark.parametrize("name", FRAMES)
def test_header(name: str) -> None:
    raw = FRAMES[name]
    kind, flags, _attempt, body_nbytes, *_fields, reserved, crc = HEADER.unpack(raw[:64])
    word = name.split(",")[0].upper()
    assert TYPES[kind - 1] == word
    assert flags in range(4)
    assert len(raw) == 64 + body_nbytes + (16 if word == "CHUNK" else 0)
    assert reserved == bytes(20)
    assert crc == castagnoli(raw[:60]) == crc32c(raw[:60])


def body(name: str) -> Cursor:
    return Cursor(FRAMES[name][64:])


def test_pool() -> None:
    at = body("pool")
    assert at.text() == b"kv"
    assert at.take("BI") == (1, 1)
    assert (at.text(), at.take("B")) == (b"full", (0,))
    assert (at.text(), at.text(), at.text(), at.take("I")) == (b"bfloat16", b"HND", b"packed", (16,))
    assert at.take("I") == (2,)
    assert [(at.text(), at.take("H")) for _ in range(2)] == [(b"layers.0", (0,)), (b"layers.1", (0,))]
    assert not at.data


def test_offer_and_want() -> None:
    at = body("offer")
    assert (at.text(), at.text(), at.text(), at.take("B")) == (b"req-42", b"meta", b"", (1,))
    assert at.terms() == (7, [(0, 3)], [(1, 4096), (0, 4096)])
    assert not at.data
    at = body("want")
    assert (at.text(), at.text()) == (b"req-42", b"")
    assert at.terms() == (9, [(0, 3)], [(1, 4096), (0, 4096)])
    assert [at.take("QQ") for _ in range(at.take("I")[0])] == [(0, 8192), (12288, 24576)]
    assert not at.data


def test_abort_and_released() -> None:
    at = body("abort, from source")
    assert at.take("I") == (3,)
    assert [at.text() for _ in range(4)] == [b"", b"dtype", b"bfloat16", b"fp8_e4m3"]
    assert not at.data
    at = body("released")
    assert at.take("III") == (2, 1, 0)
    assert not at.data


def test_digest() -> None:
    """The seed is the CRC-32C of 28 bytes: transfer, offset, body length, attempt."""
    raw = FRAMES["chunk, digest"]
    _, _, attempt, body_nbytes, transfer, offset, *_ = HEADER.unpack(raw[:64])
    seed = castagnoli(struct.pack("<QQQI", transfer, offset, body_nbytes, attempt))
    # A CRC goes on from another: the value so far, inverted, is where the next byte begins.
    digest = castagnoli(raw[64 : 64 + body_nbytes], seed)
    assert struct.unpack("<BBHI8s", raw[-16:]) == (1, 1, 0, digest, bytes(8))
    assert struct.unpack("<BBHI8s", FRAMES["chunk, plain"][-16:]) == (1, 0, 0, 0, bytes(8))
    assert struct.unpack("<BBHI8s", FRAMES["chunk, aborted"][-16:]) == (2, 0, 0, 0, bytes(8))


def use_of(at: Cursor) -> tuple:
    return at.take("16sIBII")


def test_copies() -> None:
    kind, flags, attempt, _, want, _, stall, offer, *_ = HEADER.unpack(FRAMES["located"][:64])
    assert (kind, flags, attempt, want, stall, offer) == (14, 1, 1, 4, 10_000_000_000, 2)
    assert FRAMES["located"][64:] == b"where"
    assert HEADER.unpack(FRAMES["again"][:64])[2] == 2
    assert body("again").take("IQQQQ") == (2, 0, 8192, 12288, 24576)


def test_grants() -> None:
    token = bytes(range(0xA0, 0xB0))
    at = body("read")
    assert use_of(at) == (token, 0, 0, 0, 0)
    assert at.terms() == (9, [(0, 3)], [(1, 4096), (0, 4096)])
    assert at.take("IQQ") == (1, 0, 24576)
    assert not at.data
    at = body("read, part")
    assert use_of(at) == (token, 1500, 3, 4, 2)
    at.terms()
    assert at.take("III") == (5, 0, 2)  # as many positions as the terms say blocks
    assert at.take("IQQ") == (1, 0, 24576)
    at = body("write")
    assert (use_of(at), at.text()) == ((token, 1500, 3, 4, 2), b"meta")
    at.terms()
    assert at.take("III") == (5, 0, 2)
    assert not at.data
    assert body("hold").take("16sI") == (token, 1500)
    assert body("abort, grant").take("I") == (8,)
