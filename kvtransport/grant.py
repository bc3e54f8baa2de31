"""Grants: what an owner opens of its blocks, and what a reader holds of them.

Here: tokens, Grant (the owner's handle), Lease (the reader's). Not here: reading and writing by a token
(`kvtransport.connection`), the rules (native).

Invariant: a Grant ends exactly once, whoever ends it; from that moment on none of its blocks is delivered to
anybody.
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
from types import TracebackType
from typing import TYPE_CHECKING, Final

from kvtransport.errors import ForkedProcessError
from kvtransport.transfer import Handle
from kvtransport.types import GrantState, TransferResult

if TYPE_CHECKING:
    from kvtransport import _native
    from kvtransport.completion import LoopBridges
    from kvtransport.memory.pool import BlockPool

TOKEN_NBYTES: Final = 16
_TOKEN_CHARACTERS: Final = 22


def new_token() -> str:
    """Return 128 random bits as a URL-safe str of 22 characters.

    Any process may mint one, before or after the grant that it will name: it travels with the request. Whoever
    knows it may use the grant (unless that names its reader), so it belongs into no log.
    """
    return text_of(os.urandom(TOKEN_NBYTES))


def text_of(raw: bytes) -> str:
    """Return a token's 16 bytes as users know it."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@functools.lru_cache(maxsize=1024)  # a token that is read again and again is decoded once
def raw_of(token: str) -> bytes:
    """Return the 16 bytes of a token. TypeError, ValueError for what isn't one."""
    if not isinstance(token, str):
        raise TypeError(f"a token is a str, not {type(token).__name__}")
    raw = raw_if_token(token)
    if raw is None:
        raise ValueError("a token is a str of 22 characters, as kvtransport.new_token() makes it")
    return raw


def raw_if_token(text: str | bytes) -> bytes | None:
    """Return the 16 bytes, None for what isn't a token's text."""
    if not isinstance(text, str) or len(text) != _TOKEN_CHARACTERS or not text.isascii():
        return None
    try:
        raw = base64.urlsafe_b64decode(text + "==")
    except binascii.Error:
        return None
    return raw if text_of(raw) == text else None


class Grant(Handle["TransferResult | None"]):
    """Blocks of a pool that peers may read, or write to, by a token. Made by `BlockPool.grant`.

    It is a handle that is done when the grant has ended: `result` returns None when all its readers have read
    (state "read"), for mode="write" the TransferResult of what was written (state "written"). It raises
    StaleGrant where it expired first, TransferCancelled where it was revoked or its blocks were reused, PeerLost
    where the process that it was for has died.

    token: what readers name it by. tag: as given.
    """

    __slots__ = ("_pool", "token")

    def __init__(
        self, native: _native.Transfer, bridges: LoopBridges, pool: BlockPool, token: str, tag: object
    ) -> None:
        """For Endpoint."""
        super().__init__(native, bridges, tag)
        self.token = token
        self._pool = pool  # its memory stays while peers may read it

    @property
    def state(self) -> GrantState:
        """One of "open", "read" (all readers have finished), "written", "expired", "revoked"."""
        return self.native.grant_state()

    def revoke(self, *, force: bool = False) -> None:
        """End it now, and return: its blocks may be rewritten. What was being read of it is never delivered.

        GrantError, and it goes on, while a reader has it mapped (`Connection.map_blocks`), unless `force`: then the
        reader's `with` raises StaleGrant. (`BlockPool.reuse` doesn't ask: whoever frees blocks has decided.)

        Freeing the memory is more: `BlockPool.close` waits until nobody reads it. Harmless where it has ended.
        """
        self.native.revoke(force)

    def _finished(self) -> TransferResult | None:
        outcome = self.native.result()
        if self.state != "written" or outcome is None:
            return None
        return TransferResult(*outcome)

    def __repr__(self) -> str:
        """State, and the start of the token."""
        try:
            return f"<Grant {self.token[:6]}... {self.state}>"
        except ForkedProcessError:
            return f"<Grant {self.token[:6]}... of another process>"


class Lease(Handle[None]):
    """A reader's hold on a grant while its request still queues: the grant doesn't expire. A context manager.

    Made by `Connection.hold`, kept alive natively. It ends by `release` or the end of its connection; the grant
    then has its whole ttl again, or is over, where all its readers have finished. While it is held, any number
    of reads go by the grant. As a handle: done when it has ended; `result` returns after `release`, and raises
    PermissionDenied (never held), StaleGrant (the grant ended meanwhile), or what the connection ended with.
    """

    __slots__ = ("token",)

    def __init__(
        self, native: _native.Transfer, bridges: LoopBridges, token: str, tag: object = None
    ) -> None:
        """For Connection."""
        super().__init__(native, bridges, tag)
        self.token = token

    @property
    def held(self) -> bool:
        """Whether the owner has said so, and it hasn't ended."""
        return not self.done() and self.native.is_held()

    def release(self) -> None:
        """Give it back: this reader has finished with the grant. Idempotent."""
        self.native.let_go()

    def __enter__(self) -> Lease:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        self.release()

    def _finished(self) -> None:
        self.native.result()

    def __repr__(self) -> str:
        """Whether it is held, and the start of the token."""
        try:
            state = "over" if self.done() else "held" if self.held else "asked for"
        except ForkedProcessError:
            state = "of another process"
        return f"<Lease {self.token[:6]}... {state}>"
