"""kvtransport moves paged KV-cache blocks between the registered memory of processes.

`Endpoint` is where to begin; `Connection.send_blocks` and `recv_blocks` are what it is for. See README.md, and
docs/ for the protocol, the faults that are survived, and the design.
"""

import logging as _logging
from typing import TYPE_CHECKING as _TYPE_CHECKING

from kvtransport.completion import CompletionQueue
from kvtransport.config import Config
from kvtransport.connection import Connection
from kvtransport.endpoint import Endpoint
from kvtransport.errors import (
    AuthenticationError,
    BackendUnavailable,
    ConfigError,
    ConnectionClosed,
    ConnectTimeout,
    DowngradeError,
    ForkedProcessError,
    GrantError,
    HandshakeError,
    InsecureConfigError,
    IntegrityError,
    KVTransportError,
    LayoutMismatch,
    LocalProtocolError,
    NoCommonPath,
    PeerAborted,
    PeerLost,
    PermissionDenied,
    ProtocolError,
    RemoteProtocolError,
    ResourceLimit,
    StaleGrant,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    VersionMismatch,
    WaitTimeout,
)
from kvtransport.grant import Grant, Lease, new_token
from kvtransport.mapped import MappedBlocks
from kvtransport.memory.allocation import HostMemory
from kvtransport.memory.layout import BlockLayout, LayerGroup
from kvtransport.memory.pool import BlockPool
from kvtransport.transfer import LayerGate, SentMessage, Transfer, wait
from kvtransport.types import Peer, TransferResult

if _TYPE_CHECKING:
    from kvtransport.cli.report import Report as _Report

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BackendUnavailable",
    "BlockLayout",
    "BlockPool",
    "CompletionQueue",
    "Config",
    "ConfigError",
    "ConnectTimeout",
    "Connection",
    "ConnectionClosed",
    "DowngradeError",
    "Endpoint",
    "ForkedProcessError",
    "Grant",
    "GrantError",
    "HandshakeError",
    "HostMemory",
    "InsecureConfigError",
    "IntegrityError",
    "KVTransportError",
    "LayerGate",
    "LayerGroup",
    "LayoutMismatch",
    "Lease",
    "LocalProtocolError",
    "MappedBlocks",
    "NoCommonPath",
    "Peer",
    "PeerAborted",
    "PeerLost",
    "PermissionDenied",
    "ProtocolError",
    "RemoteProtocolError",
    "ResourceLimit",
    "SentMessage",
    "StaleGrant",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferResult",
    "TransferTimeout",
    "VersionMismatch",
    "WaitTimeout",
    "doctor",
    "new_token",
    "wait",
]


def doctor() -> "_Report":
    """Try every backend on this machine; return what works, why the rest doesn't, and what would make it.

    `print(kvt.doctor())` is the text of `kvtransport doctor`. Takes about half a second, starts one short process.
    """
    from kvtransport.cli import report  # the tools are imported when they are used

    return report.examine()


# A library's lines go where the program sends them, or nowhere.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())
