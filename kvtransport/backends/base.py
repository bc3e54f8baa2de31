"""The seam: what the Python side of a backend is.

A backend moves bytes between two endpoints. Its moving is native and holds no GIL; its Python side says
where it can be reached, whether it works here, and brings about a native session. It promises:

- `viability()` tries what the backend needs on this machine, in at most `TRIAL_S` and a little, leaves nothing
  behind and doesn't raise: it says why not, and what would make it work. `kvtransport doctor` asks it; it may
  start a process, so nothing asks it for each connection.
- `serves(where)` looks at an address's form only. Each form belongs to one backend.
- Nothing is opened, dialled or said where policy forbids it: the check comes before the socket.
- One thread uses it, the endpoint's acceptor; `viability`, `resolve` and `listen` may be called by any. Only
  `resolve`, and with it `listen`, may block.

It does not promise that a peer exists, that a session stays, or to retry: who is to be reached, when again,
and which of two sessions with one peer stays is the acceptor's business. It knows nothing of HELLOs, pools
and transfers.

There are two kinds. A `StreamBackend` has listening sockets and dials; the handshake runs over its sockets,
and the engine takes them afterwards. A `DirectBackend` joins two engines of this process at a stroke,
without a handshake. `name` is the word of Config.backends; `BACKENDS` in `kvtransport.types` is the tuple
of them, the preferred first.

Invariant: this module opens nothing and imports no backend.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvtransport.types import Protection

TRIAL_S: Final = 5.0
"""For what takes milliseconds: a trial that has no answer by then has failed."""


@dataclass(frozen=True, slots=True)
class Viability:
    """Whether a backend can be used here.

    reason: why not; where it is usable, how, if there is something to say. remedy: what would make it usable.
    parts: (what was tried, what came of it), where there are several things to try.
    """

    usable: bool
    reason: str = ""
    remedy: str = ""
    parts: tuple[tuple[str, Viability], ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """What a user allows. `keyed`: a key proves every peer. `insecure`: peers may stay unproved."""

    keyed: bool = False
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One place to dial or to listen at, with no name left to resolve. `text`: as `connect` would take it."""

    family: socket.AddressFamily
    sockaddr: Any
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class LinkProof:
    """What the system says of a link's other end; None: it can't say. `how`: by what means, for explain().
    `by_file`: the link is a unix socket, which both ends reach by a file that they have in common.
    """

    uid: int | None = None
    pid: int | None = None
    how: str = "nothing proves the peer"
    by_file: bool = False


class Listener(Protocol):
    """A bound, listening, non-blocking socket."""

    @property
    def target(self) -> Target:
        """The address that it has got, with the real port."""

    @property
    def reachable_as(self) -> str:
        """What a peer would dial: the address, or this host's name where it listens at all addresses."""

    def fileno(self) -> int:
        """Return the socket's descriptor: the engine takes a dup."""

    def close(self) -> None:
        """Close it and remove what it left in the file system. Idempotent."""

    def abandon(self) -> None:
        """Close it in a forked child, and remove nothing: it is the parent's."""


class Backend(Protocol):
    """What every backend has."""

    @property
    def name(self) -> str:
        """The word of Config.backends."""

    def viability(self) -> Viability:
        """Say whether it works on this machine."""

    def serves(self, where: str) -> bool:
        """Say whether `where` begins or ends like its addresses."""

    def check(self, where: str) -> None:
        """Raise ValueError, which says what is wrong, where an address that it serves is malformed."""


class StreamBackend(Backend, Protocol):
    """A backend whose sessions begin with a handshake over a connected socket."""

    def may_block(self, where: str) -> bool:
        """Say whether `resolve` asks a name service for it."""

    def resolve(self, where: str) -> Sequence[Target]:
        """Return the places that an address stands for, the preferred first. May block on a name service.

        OSError: nothing has that name. ValueError: malformed.
        """

    def demand_allowed(self, target: Target, policy: Policy) -> None:
        """Raise InsecureConfigError where `policy` forbids to use it; warn of what is allowed and unsafe."""

    def default_protection(self, target: Target) -> Protection:
        """Return the least protection for a peer there, where the user asks for none."""

    def listen(self, where: str, policy: Policy) -> Listener:
        """Open a listening socket, after `demand_allowed`. ValueError, OSError, InsecureConfigError."""

    def dial(self, target: Target) -> socket.socket:
        """Begin to connect; the socket is non-blocking and turns writable when it is decided."""

    def dialled(self, sock: socket.socket) -> None:
        """Raise the OSError that a decided connect ended with, if any."""

    def accepted(self, sock: socket.socket) -> str:
        """Set an accepted socket up; return a name of the other end's host, for limits and logs."""

    def prove(self, sock: socket.socket, policy: Policy) -> LinkProof | None:
        """Find out who holds the other end of a connected socket, without a word to it.

        None: the other end isn't known yet (not accepted), or no more. AuthenticationError: `policy` doesn't
        let it talk to us without a key.
        """

    def owner(self, target: Target) -> int | None:
        """Return the uid of who listens there, if the system tells: to explain a close without a word."""


class DirectBackend(Backend, Protocol):
    """A backend that joins two endpoints of this process."""

    def incarnation_at(self, where: str) -> bytes:
        """Return the incarnation that an address names."""
