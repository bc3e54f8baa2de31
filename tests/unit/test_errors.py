"""The tree of errors: its shape, what each carries, and that native code can make any of them alike."""

import pytest

from kvtransport import errors
from kvtransport.errors import (
    ConfigError,
    IntegrityError,
    KVTransportError,
    LayoutMismatch,
    PeerLost,
    TransferCancelled,
    TransferTimeout,
    WaitTimeout,
)

TREE = {
    "ConnectTimeout": "KVTransportError",
    "ConfigError": "KVTransportError",
    "InsecureConfigError": "ConfigError",
    "BackendUnavailable": "KVTransportError",
    "HandshakeError": "KVTransportError",
    "VersionMismatch": "HandshakeError",
    "NoCommonPath": "HandshakeError",
    "AuthenticationError": "HandshakeError",
    "DowngradeError": "HandshakeError",
    "ProtocolError": "KVTransportError",
    "LocalProtocolError": "ProtocolError",
    "RemoteProtocolError": "ProtocolError",
    "PeerLost": "KVTransportError",
    "ConnectionClosed": "KVTransportError",
    "ForkedProcessError": "KVTransportError",
    "ResourceLimit": "KVTransportError",
    "GrantError": "KVTransportError",
    "StaleGrant": "GrantError",
    "PermissionDenied": "GrantError",
    "LayoutMismatch": "KVTransportError",
    "TransferError": "KVTransportError",
    "TransferTimeout": "TransferError",
    "TransferCancelled": "TransferError",
    "PeerAborted": "TransferError",
    "IntegrityError": "TransferError",
}
OWN = {
    "KVTransportError": ("peer", "backend"),
    "BackendUnavailable": ("reason", "remedy"),
    "NoCommonPath": ("reasons",),
    "PeerLost": ("cause",),
    "LayoutMismatch": ("path", "ours", "theirs"),
    "TransferTimeout": ("waiting_for",),
    "PeerAborted": ("reason",),
}
OUTCOME = ("key", "blocks", "failed_block_ids", "quiesced", "retryable", "delivered")


def all_classes() -> list[type[errors.TransferOutcome]]:
    return [getattr(errors, name) for name in ("KVTransportError", *TREE, "WaitTimeout")]


def test_tree_is_the_design_s() -> None:
    assert {name: getattr(errors, name).__bases__[0].__name__ for name in TREE} == TREE
    public = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, BaseException)}
    assert public == {*TREE, "KVTransportError", "WaitTimeout", "TransferOutcome"}


def test_tree_is_drawn_in_the_docstring() -> None:
    drawn = errors.__doc__ or ""
    assert all(name in drawn for name in (*TREE, "KVTransportError", "WaitTimeout"))


def test_also_builtin_errors() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(TransferTimeout, TimeoutError)
    assert issubclass(WaitTimeout, TimeoutError)
    assert not issubclass(WaitTimeout, KVTransportError)


@pytest.mark.parametrize("cls", all_classes())
def test_every_class_has_its_attributes(cls: type[errors.TransferOutcome]) -> None:
    expected = {*OUTCOME}
    for base in cls.__mro__:
        expected |= {*OWN.get(base.__name__, ())}
    assert {*cls.attribute_names()} == expected
    error = cls("what happened")
    assert str(error) == "what happened"
    assert all(hasattr(error, name) for name in expected)


@pytest.mark.parametrize("cls", all_classes())
def test_every_class_takes_its_attributes_by_name(cls: type[errors.TransferOutcome]) -> None:
    given = {name: object() for name in cls.attribute_names()}
    error = cls("m", **given)
    assert {name: getattr(error, name) for name in given} == given
    assert str(error) == "m"


def test_unknown_attribute_is_refused() -> None:
    with pytest.raises(TypeError, match="PeerLost has no attribute 'reason'"):
        PeerLost("m", reason="x")


def test_defaults_claim_nothing() -> None:
    error = TransferCancelled("m")
    assert error.key is None
    assert error.quiesced is None
    assert error.delivered is None
    assert error.blocks == {}
    assert error.failed_block_ids == []
    assert LayoutMismatch("m").path == ""


def test_wait_timeout_leaves_the_memory_in_use() -> None:
    assert WaitTimeout("m").quiesced is False


def test_failed_block_ids_of_one_group_is_a_list() -> None:
    error = IntegrityError("m", blocks={"group0": {7: "sealed", 9: "poisoned", 2: "poisoned"}})
    assert error.failed_block_ids == [9, 2]


def test_failed_block_ids_of_groups_is_a_dict() -> None:
    error = IntegrityError("m", blocks={"a": {7: "sealed"}, "b": {7: "poisoned"}})
    assert error.failed_block_ids == {"a": [], "b": [7]}


def test_failed_block_ids_may_be_given() -> None:
    assert PeerLost("m", failed_block_ids=[3]).failed_block_ids == [3]


def test_blocks_are_built_once_and_when_asked_for() -> None:
    calls = []

    def build() -> errors.BlockStates:
        calls.append(1)
        return {"group0": {1: "poisoned"}}

    error = PeerLost("m", blocks=build)
    assert not calls
    assert error.blocks == {"group0": {1: "poisoned"}}
    assert error.failed_block_ids == [1]
    assert calls == [1]
