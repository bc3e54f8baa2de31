"""The plain values: immutable, in the order that the native core fills them, printable."""

import pytest

from kvtransport.types import Peer, TransferResult


def test_result_fields_are_the_design_s() -> None:
    assert list(TransferResult._fields) == [
        "nbytes",
        "seconds",
        "backend",
        "blocks",
        "runs",
        "chunks",
        "resumed_nbytes",
        "wire_s",
        "queued_s",
        "meta",
    ]


def test_result_is_immutable() -> None:
    result = TransferResult(1, 0.5, "tcp", 1, 1, 1, 0, 0.1, 0.0, b"")
    with pytest.raises(AttributeError):
        result.nbytes = 2  # type: ignore[misc]


def test_peer_prints_who_and_where() -> None:
    assert str(Peer(bytes(range(16)), address="127.0.0.1:7000")) == "00010203@127.0.0.1:7000"
    assert str(Peer(bytes(16), identity="decode-1")) == "decode-1"
