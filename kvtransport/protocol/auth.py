"""How a handshake finds out who is at the other end: suites, as sans-I/O parts of the handshake machine.

Here: what a suite is, and the null suite. Not here: the order of the handshake (`handshake`), the proof
that a link's other end is the same user (the backend of that link makes it), keys.

Invariant: before its script is over a suite is given fixed-size messages only, and says nothing to a peer
who hasn't sent what the script demands. With and without keys the same states run and the same record
layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, Protocol

from kvtransport.protocol.messages import KEY_ID_NBYTES, Role
from kvtransport.types import Protection

SUITE_NULL: Final = 1 << 0
SUITE_PSK: Final = 1 << 1

NONCE_NBYTES: Final = 32

Script = tuple[tuple[Role, int], ...]


class Suite(Protocol):
    """One side of one handshake's authentication: made for it, used once.

    `transcript` is every byte that both sides have sent so far, from the preamble on: what keys bind.
    """

    @property
    def bit(self) -> int:
        """Which bit of the preamble's `suites` means this suite."""

    @property
    def key_id(self) -> bytes:
        """The preamble's 16 bytes that name the key; zero without one."""

    @property
    def script(self) -> Script:
        """The fixed-size messages: (who sends it, bytes), in order. The first is the initiator's."""

    @property
    def proves_peer(self) -> bool:
        """False: the link itself must prove the other end before anything is said to it."""

    @property
    def protections(self) -> frozenset[Protection]:
        """What a session made by this suite can be protected by."""

    @property
    def identity(self) -> str | None:
        """The name that the peer has proved; None without keys. Only after the script is over."""

    def produce(self, step: int, transcript: bytes) -> bytes:
        """Return our message at `step` of the script."""

    def consume(self, step: int, message: bytes, transcript: bytes) -> None:
        """Check the peer's message at `step`. Raises AuthenticationError."""

    def seal(self, payload: bytes) -> bytes:
        """Return a record's payload as it goes on the wire."""

    def open(self, sealed: bytes) -> bytes:
        """Return the payload of a record that arrived. Raises AuthenticationError."""


class NullSuite:
    """No key: each side sends 32 random bytes, records are plain, and the link must prove the other end."""

    bit = SUITE_NULL
    key_id = bytes(KEY_ID_NBYTES)
    script: Script = ((Role.INITIATOR, NONCE_NBYTES), (Role.RESPONDER, NONCE_NBYTES))
    proves_peer = False
    protections: frozenset[Protection] = frozenset(("plain", "digest"))
    identity: str | None = None

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy

    def produce(self, step: int, transcript: bytes) -> bytes:
        """Return a nonce."""
        return self._entropy(NONCE_NBYTES)

    def consume(self, step: int, message: bytes, transcript: bytes) -> None:
        """Accept any nonce: without a key it proves nothing."""

    def seal(self, payload: bytes) -> bytes:
        """Return the payload itself."""
        return payload

    def open(self, sealed: bytes) -> bytes:
        """Return the record itself."""
        return sealed
