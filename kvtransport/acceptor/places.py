"""What `connect` and `listen` may be given: addresses, several of them, descriptors; and whose they are.

Here: which backend serves an address, in which order a peer's are tried, asking a name service. Not here:
the forms of addresses (backends) and of descriptors (`protocol.descriptor`).

Invariant: an address is dialled because the user named it, himself or in a descriptor; only by backends
that Config allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvtransport.acceptor.loop import Loop
from kvtransport.backends.base import DirectBackend, StreamBackend, Target
from kvtransport.backends.inproc import InprocBackend, address_of
from kvtransport.backends.shm import usable_here
from kvtransport.backends.tcp import TcpBackend
from kvtransport.errors import NoCommonPath
from kvtransport.protocol.descriptor import is_descriptor, parse_descriptor
from kvtransport.types import BACKENDS

Done = Callable[[StreamBackend, "Sequence[Target] | OSError"], None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is to be found. `expected`: the incarnation that it must be; None: whoever is there."""

    addresses: tuple[str, ...]
    expected: bytes | None = None


class Places:
    """The backends that Config allows, by the addresses that they serve."""

    def __init__(
        self, allowed: Sequence[str] | None, required: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """`required`: Config.require; all memory that this version moves is the host's."""
        self.inproc = InprocBackend()
        self._tcp = TcpBackend()
        self._allowed = tuple(allowed or BACKENDS)
        host = (required or {}).get("host", BACKENDS)
        known: tuple[InprocBackend | TcpBackend, ...] = (self.inproc, self._tcp)
        self._shares = "shm" in self._allowed and "shm" in host and usable_here()
        self._backends = sorted(
            (b for b in known if b.name in self._allowed and b.name in host),
            key=lambda b: self._allowed.index(b.name),
        )

    @property
    def allows_inproc(self) -> bool:
        """Whether endpoints of this process may be joined without sockets."""
        return self.inproc in self._backends

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the backends that are allowed, the preferred first."""
        mine = {backend.name for backend in self._backends} | ({"shm"} if self._shares else set())
        return tuple(name for name in self._allowed if name in mine)

    def why_not(self, name: str) -> str:
        """Return why Config doesn't allow a backend; empty: it does."""
        if name in self.names:
            return ""
        return f"not among Config.{'backends' if name not in self._allowed else 'require'}"

    def parse(self, where: str | Sequence[str]) -> Place:
        """Return what `where` means. ValueError: malformed. NoCommonPath: no backend may serve it."""
        if isinstance(where, str) and is_descriptor(where):
            return self._of_descriptor(where)
        addresses = (where,) if isinstance(where, str) else tuple(where)
        if not addresses:
            raise ValueError("no address was given")
        return Place(self._allowed_of(addresses, where))

    def direct(self, address: str) -> DirectBackend | None:
        """Return the backend that needs no socket for it, if it is one."""
        return self.inproc if self.inproc.serves(address) and self.allows_inproc else None

    def stream(self, address: str) -> StreamBackend:
        """Return the backend that listens at or dials it. NoCommonPath: none that is allowed."""
        if self._tcp in self._backends and self._tcp.serves(address):
            return self._tcp
        self._allowed_of((address,), address)
        raise ValueError(f"{address!r} has no socket to listen at or dial")

    def resolve(self, loop: Loop, address: str, done: Done) -> None:
        """Have `done` called by the loop's thread with the targets of an address, or with why there are none.

        At once, where no name service is asked; else a thread of its own asks, and nobody else waits.
        """
        backend = self.stream(address)
        if not backend.may_block(address):
            done(backend, backend.resolve(address))
            return

        def ask() -> None:
            try:
                found: Sequence[Target] | OSError = backend.resolve(address)
            except OSError as e:
                found = e
            except ValueError as e:  # a label of the name is too long
                found = OSError(str(e))
            loop.post(lambda: done(backend, found))

        threading.Thread(target=ask, name="kvtransport-resolve", daemon=True).start()

    def _of_descriptor(self, where: str) -> Place:
        descriptor = parse_descriptor(where)
        addresses = descriptor.addresses
        if self.allows_inproc and self.inproc.find(descriptor.incarnation) is not None:
            addresses = (address_of(descriptor.incarnation), *addresses)
        if not addresses:
            raise NoCommonPath("the descriptor has no address: its endpoint doesn't listen")
        return Place(self._allowed_of(addresses, where), descriptor.incarnation)

    def _allowed_of(self, addresses: tuple[str, ...], where: str | Sequence[str]) -> tuple[str, ...]:
        """Return those that an allowed backend serves, the preferred backend's first."""
        found = [(backend, a) for backend in self._backends for a in addresses if backend.serves(a)]
        for backend, address in found:
            backend.check(address)
        if found:
            return tuple(dict.fromkeys(address for _, address in found))
        reasons = {b.name: why for b in (self.inproc, self._tcp) if (why := self.why_not(b.name))}
        if not any(b.serves(a) for b in (self.inproc, self._tcp) for a in addresses):
            raise ValueError(
                f"{where!r} is no address: write 127.0.0.1:7000, [::1]:7000, name:7000, unix:/path"
            )
        raise NoCommonPath(
            f"no backend that Config.backends and Config.require allow serves {where!r}", reasons=reasons
        )
