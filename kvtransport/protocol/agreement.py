"""What two HELLOs come to: the terms of a session, or the field that doesn't fit.

Here: the arithmetic of negotiation, and which error a REJECT is. Not here: the order of messages
(`handshake`).

Invariant: `agree` is symmetric but for whose HELLO is whose: both sides compute the same terms, and never
less protection than either asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtransport.errors import (
    AuthenticationError,
    DowngradeError,
    HandshakeError,
    NoCommonPath,
    RemoteProtocolError,
    ResourceLimit,
    VersionMismatch,
)
from kvtransport.protocol.auth import Suite
from kvtransport.protocol.messages import Accept, Hello, Reject, printable
from kvtransport.types import PROTECTIONS, Protection

HandshakeFailure = HandshakeError | RemoteProtocolError | ResourceLimit


@dataclass(frozen=True, slots=True)
class Terms:
    """What both sides know of an established session. `capabilities`: the bits that both have."""

    peer: Hello
    identity: str | None
    version: int
    protection: Protection
    lanes: int
    chunk_nbytes: int
    capabilities: int
    features: tuple[str, ...]
    session_id: bytes = b""
    initiator: bool = False


class Unfit(Exception):
    """The two sides don't fit: `field` goes into a REJECT, `error` to our own user."""

    def __init__(self, field: str, error: HandshakeFailure) -> None:
        super().__init__(field)
        self.field = field
        self.error = error


class SessionDeclined(HandshakeError):
    """The peer has, or makes, another session with us: wait for that, or try again."""


_ERRORS: dict[str, type[HandshakeFailure]] = {
    "version": VersionMismatch,
    "suite": AuthenticationError,
    "identity": AuthenticationError,
    "downgrade": DowngradeError,
    "backends": NoCommonPath,
    "limit": ResourceLimit,
    "session": SessionDeclined,
}


def unfit(field: str, reason: str) -> Unfit:
    """Return the Unfit whose error is the class that `field` stands for."""
    return Unfit(field, _ERRORS.get(field, HandshakeError)(reason))


def error_of(reject: Reject) -> HandshakeFailure:
    """Return the error that a peer's REJECT is to our user."""
    reason = printable(reject.reason) or "no reason given"
    field = printable(reject.field, 64)
    return _ERRORS.get(reject.field, HandshakeError)(f"the peer refused the session: {field}: {reason}")


def agree(ours: Hello, theirs: Hello, suite: Suite) -> Terms:
    """Return the terms that follow from the two HELLOs; raises Unfit."""
    version = min(ours.version_max, theirs.version_max)
    if version < max(ours.version_min, theirs.version_min):
        raise unfit(
            "version",
            f"no common protocol version: {ours.version_min} to {ours.version_max} here, "
            f"{theirs.version_min} to {theirs.version_max} there; upgrade the older side",
        )
    protection = max(ours.protection, theirs.protection, key=PROTECTIONS.index)
    if protection not in suite.protections:
        raise unfit("protection", f"protection {protection!r} is asked for, and needs a key on both sides")
    return Terms(
        peer=theirs,
        identity=suite.identity,
        version=version,
        protection=protection,
        lanes=min(ours.lanes, theirs.lanes),
        chunk_nbytes=min(ours.chunk_nbytes, theirs.chunk_nbytes),
        capabilities=ours.capabilities & theirs.capabilities,
        features=tuple(f for f in ours.features if f in theirs.features),
    )


def check_accept(accept: Accept, terms: Terms) -> None:
    """Hold the responder's ACCEPT against the terms that follow from the HELLOs; raises Unfit."""
    if PROTECTIONS.index(accept.protection) < PROTECTIONS.index(terms.protection):
        raise unfit("downgrade", f"{accept.protection!r} was accepted where {terms.protection!r} is due")
    for field in ("version", "protection", "lanes", "chunk_nbytes"):
        if getattr(accept, field) != getattr(terms, field):
            raise Unfit(field, RemoteProtocolError(f"ACCEPT changes {field}, which follows from the HELLOs"))
