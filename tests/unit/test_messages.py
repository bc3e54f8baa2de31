"""The parsers of the bytes before frames: what they take, and that nothing else gets through."""

import os
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.errors import RemoteProtocolError
from kvtransport.protocol import messages
from kvtransport.protocol.messages import Accept, Confirm, Hello, Kind, Limits, Preamble, Reachability, Reject

HELLO = Hello(
    incarnation=bytes(range(16)),
    version_min=1,
    version_max=2,
    protection="digest",
    lanes=2,
    chunk_nbytes=1 << 20,
    reachability=Reachability(boot_id="b", hostname="h", uid=1, pid=2, pid_started=3),
    addresses=("127.0.0.1:7000", "unix:/run/kv"),
    features=("tcp",),
    capabilities=5,
)
RECORDS = (
    HELLO,
    msgspec.structs.replace(HELLO, limits=Limits(max_unmatched=1, max_regions=65_536)),
    Accept(session_id=bytes(16), version=1, protection="plain", lanes=1, chunk_nbytes=4096),
    Reject(field="version", reason="too old"),
    Confirm(),
)


def test_preamble_is_pinned():
    data = Preamble(1, 3, Kind.CONTROL, 1, bytes(16)).encode()
    assert data == b"KVTRNSP1" + struct.pack("<HHBBH", 1, 3, 1, 1, 0) + bytes(16)
    assert messages.parse_preamble(data) == Preamble(1, 3, Kind.CONTROL, 1)


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, b"k"), (8, b"\0\0"), (10, b"\0\0"), (12, b"\0"), (12, b"\4"), (14, b"\1"), (15, b"\1")],
)
def test_preamble_refused(at, value):
    data = bytearray(Preamble(1, 1, Kind.LANE, 1).encode())
    data[at : at + len(value)] = value
    with pytest.raises(RemoteProtocolError):
        messages.parse_preamble(bytes(data))


@pytest.mark.parametrize(
    "stranger",
    [b"GET / HTTP/1.1\r\nHost: example.\r\n", b"\x16\x03\x01" + bytes(29), b"KVTRNSP0" + bytes(24)],
)
def test_other_protocols_are_refused(stranger):
    with pytest.raises(RemoteProtocolError, match="doesn't speak kvtransport"):
        messages.parse_preamble(stranger[:32])


def test_join_is_pinned():
    assert messages.encode_join(b"s" * 16, 3, b"n" * 16) == b"s" * 16 + b"\3\0\0\0" + bytes(
        4
    ) + b"n" * 16 + bytes(24)
    assert messages.encode_join(b"s" * 16, 3, b"n" * 16, b"incarnation12345")[20:24] == b"inca"
    assert messages.parse_join_answer(b"KVTJOIN\0\3\0\0\0\0\0\0\0") == messages.JoinAnswer(3, True)
    assert messages.parse_join_answer(b"KVTJOIN\0\3\0\0\0\2\0\0\0") == messages.JoinAnswer(3, False, True)
    assert not messages.parse_join_answer(b"KVTJOIN\0\3\0\0\0\1\0\0\0").ok
    for bad in (
        b"",
        b"KVTJOIN\1\3\0\0\0\0\0\0\0",
        b"KVTJOIN\0\3\0\0\0\3\0\0\0",
        b"KVTJOIN\0\3\0\0\0\0\0\0\0\0",
    ):
        with pytest.raises(RemoteProtocolError):
            messages.parse_join_answer(bad)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_survive(record):
    assert messages.parse_record(messages.encode_record(record)) == record


def test_limits_that_are_not_said_are_the_defaults():
    assert HELLO.holds_peer_to() == Limits() == Limits(max_unmatched=1024, max_regions=1024)
    fields = msgspec.msgpack.decode(messages.encode_record(HELLO))
    assert "limits" not in fields
    read = messages.parse_record(msgspec.msgpack.encode({**fields, "limits": {"max_regions": 9, "new": 1}}))
    assert isinstance(read, Hello)
    assert read.holds_peer_to() == Limits(max_regions=9)


def test_unknown_fields_are_skipped():
    fields = msgspec.msgpack.decode(messages.encode_record(HELLO))
    fields["of_a_later_version"] = {"a": [1, {"b": b"c"}]}
    assert messages.parse_record(msgspec.msgpack.encode(fields)) == HELLO


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": b"short"},
        {"incarnation": "sixteen letters."},
        {"version_min": 0},
        {"version_min": 3},
        {"version_max": 1 << 16},
        {"version_max": 2.0},
        {"protection": "none"},
        {"lanes": 0},
        {"lanes": True},
        {"lanes": messages.LANES_MAX + 1},
        {"chunk_nbytes": 0},
        {"chunk_nbytes": (1 << 20) + 1},
        {"chunk_nbytes": 2**64 - 1},
        {"capabilities": -1},
        {"name": "x" * 129},
        {"name": "a\nb"},
        {"name": "\x1b[31mred"},
        {"name": b"\xff"},
        {"addresses": ["127.0.0.1:1"] * 17},
        {"addresses": [""]},
        {"addresses": ["a" * 256]},
        {"addresses": ["unix:/tmp/\x07"]},
        {"features": ["x"] * 33},
        {"reachability": None},
        {"reachability": {"pid": -1}},
        {"reachability": {"uid": 2**32}},
        {"reachability": {"hostname": "\u2028"}},
        {"limits": None},
        {"limits": {"max_unmatched": 0}},
        {"limits": {"max_unmatched": (1 << 20) + 1}},
        {"limits": {"max_regions": 0}},
        {"limits": {"max_regions": 65_537}},
        {"limits": {"max_message_queue_nbytes": (1 << 20) - 1}},
        {"limits": {"max_message_queue_nbytes": (1 << 40) + 1}},
        {"type": "goodbye"},
        {"type": None},
    ],
    ids=str,
)
def test_out_of_bounds_is_refused(change):
    fields = msgspec.msgpack.decode(messages.encode_record(HELLO)) | change
    with pytest.raises(RemoteProtocolError) as caught:
        messages.parse_record(msgspec.msgpack.encode(fields))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", sorted({f.encode_name for f in msgspec.structs.fields(Hello) if f.required}))
def test_a_missing_field_is_refused(name):
    fields = msgspec.msgpack.decode(messages.encode_record(HELLO))
    del fields[name]
    with pytest.raises(RemoteProtocolError, match=name):
        messages.parse_record(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x91" * 16_000,  # too deep
        b"\x82\xa1a" + b"\x91" * 16_000,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa4type\xdb\xff\xff\xff\xff",
        b"\x81\xa4type\xa5hel\xfflo",
        b"\x81\xa4\xff\xfe\xfd\xfc\xc0",
        messages.encode_record(RECORDS[3]) + b"\0",
        messages.encode_record(Confirm())[:-2] + b"no",
        bytes(messages.RECORD_MAX_NBYTES + 1),
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94",
    ],
    ids=lambda p: repr(p[:12]),
)
def test_hostile_payloads(payload):
    with pytest.raises(RemoteProtocolError) as caught:
        messages.parse_record(payload)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("length", [0, 16_385, 1 << 31, (1 << 32) - 1])
def test_record_lengths(length):
    with pytest.raises(RemoteProtocolError):
        messages.parse_record_length(struct.pack("<I", length))


def test_record_length_limits_hold_both_ways():
    assert messages.parse_record_length(messages.frame_record(bytes(16_384))[:4]) == 16_384
    for nbytes in (0, 16_385):
        with pytest.raises(ValueError):
            messages.frame_record(bytes(nbytes))


def test_we_do_not_send_what_would_be_refused():
    with pytest.raises(ValueError, match="name"):
        messages.encode_record(msgspec.structs.replace(HELLO, name="x" * 129))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_a_record(data):
    for parse in (
        messages.parse_record,
        messages.parse_preamble,
        messages.parse_join_answer,
        messages.parse_record_length,
    ):
        try:
            parse(data)
        except RemoteProtocolError as e:
            message = str(e)
        else:
            message = ""
        assert message.isprintable()


@given(st.sampled_from(RECORDS), st.data())
def test_mutated_records_are_refused_or_a_record(record, data):
    payload = bytearray(messages.encode_record(record))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    try:
        got = messages.parse_record(bytes(payload))
    except RemoteProtocolError:
        return
    messages.encode_record(got)  # within every bound


@given(st.text())
def test_printable_is(text):
    shown = messages.printable(text)
    assert shown.isprintable()
    assert len(shown) <= 200 * 10 + 3


def test_printable_escapes():
    assert messages.printable("a\n\x1b[0m\ud800" + "é") == "a\\n\\x1b[0m\\ud800é"
    assert len(messages.printable(os.urandom(500_000).hex())) == 203
