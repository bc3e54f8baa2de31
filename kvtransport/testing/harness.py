"""Harness: what a backend gives to be checked: how two sides of it come about.

Here: harnesses of this version's backends, and the rig that a check gets. Not here: the checks.

Invariant: every rig has endpoints of its own; a process is shared by rigs until one kills it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvtransport.testing.side import LocalSide, ProcessSide, Side


@dataclass
class Rig:
    """Two connected sides. here: in this process. peer: in another one where the harness has processes."""

    here: LocalSide
    peer: Side
    backend: str

    def both_ways(self) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        """Return (source, destination) for both directions."""
        return (self.here, self.peer), (self.peer, self.here)

    def process(self) -> ProcessSide:
        """Return the peer, that must be a process."""
        if not isinstance(self.peer, ProcessSide):
            raise AssertionError("this check needs a peer in a process of its own")
        return self.peer


@dataclass
class Harness:
    """A backend under test.

    backend: its name, as results give it. address: where the peer listens, "127.0.0.1:0" and the like.
    processes: the peer is a process of its own; without, checks that kill or fork it can't run.
    config: settings of both endpoints, by name. allocates, names_readers: of both sides, see Side.
    """

    backend: str
    address: str
    processes: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    allocates: bool = False
    names_readers: bool = False
    _spare: ProcessSide | None = field(default=None, repr=False)

    def lacks(self, needs: frozenset[str]) -> frozenset[str]:
        """Return what a check needs ("kill", "fork") and this harness can't do."""
        return frozenset() if self.processes else needs

    @contextmanager
    def rig(self, **config: Any) -> Iterator[Rig]:
        """Connect two fresh endpoints; close them afterwards. config: as for `Config`, above the harness's own."""
        here = LocalSide("here")
        peer = self._peer()
        settings = {"backends": [self.backend], **self.config, **config}
        for side in (here, peer):
            side.allocates, side.names_readers = self.allocates, self.names_readers
        ended = False
        try:
            here.call("start", config=settings)
            try:
                peer.call("start", config=settings)
                here.call("connect", address=self._listen(peer))
                peer.call("accept")
                yield Rig(here, peer, self.backend)
                ended = True
            finally:
                here.call("close")
                if not isinstance(peer, ProcessSide) or (ended and peer.alive):
                    peer.call("close")
        finally:
            self._keep(peer, ended)

    def close(self) -> None:
        """End the process that is kept for the next rig."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def _listen(self, peer: Side) -> str:
        return str(peer.call("listen", address=self.address))

    def _peer(self) -> Side:
        if not self.processes:
            return LocalSide("peer")
        kept, self._spare = self._spare, None
        return kept or ProcessSide("peer")

    def _keep(self, peer: Side, sound: bool) -> None:
        if isinstance(peer, ProcessSide) and sound and peer.alive:
            self._spare = peer
        else:
            peer.end()


@dataclass
class UnixHarness(Harness):
    """A backend over unix sockets, each rig at a path of its own."""

    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    _made: int = 0

    def _listen(self, peer: Side) -> str:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="kvt-")
        self._made += 1
        return str(peer.call("listen", address="unix:" + os.path.join(self._folder.name, str(self._made))))

    def close(self) -> None:
        """End the process, and the folder of the sockets."""
        super().close()
        if self._folder is not None:
            self._folder.cleanup()


@dataclass
class InprocHarness(Harness):
    """Two endpoints of this process, which needn't listen."""

    def _listen(self, peer: Side) -> str:
        return "inproc:" + str(peer.call("incarnation"))


_SHM = {"backends": ["shm", "tcp"]}


def harnesses() -> dict[str, Harness]:
    """Return a harness for each way that this version has, by name."""
    return {
        "tcp": Harness("tcp", "127.0.0.1:0"),
        "shm": Harness("shm", "127.0.0.1:0", config=_SHM),
        "shm, mapped and unasked": Harness(
            "shm", "127.0.0.1:0", config=_SHM, allocates=True, names_readers=True
        ),
        "unix": UnixHarness("tcp", "unix:"),
        "inproc": InprocHarness("inproc", "inproc:", processes=False),
    }
