"""kvtransport's participants by name: which backend, memory, kind of call and number of movers a name stands for.

Here: names and the Config that each means. A name is words: `shm` or `tcp` and so on, then `plain` (memory that nobody
can map: it is read by process_vm_readv), `digest`, `read` (the destination reads by a standing grant; else both sides
post), `1` (one mover).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.cases import Case

LANES = 2  # what R2 has, and the library's default

# Which threads of a latency case are pinned: the two ends on different cores, as the limit's are. (c) is
# one hop between the two waiting threads, so all of a process goes to its core. (b) uses two lanes: the
# threads that post and wait are placed, and the movers one a core, as in the cases of bandwidth.
PIN_ALL = {"c"}
PIN_MAIN = {"b", "g"}

SHM = tuple(
    f"shm{memory}{call}{movers}"
    for memory in ("", "-plain")
    for call in ("", "-read")
    for movers in ("", "-1")
)
BACKENDS = ("tcp", "tcp-digest", "tcp-read", "unix", "inproc", *SHM)


@dataclass(frozen=True)
class Way:
    """What a participant's name means."""

    name: str

    def _says(self, word: str) -> bool:
        return word in self.name.split("-")[1:]

    @property
    def kind(self) -> str:
        """The name's first word."""
        return self.name.split("-")[0]

    @property
    def shares(self) -> bool:
        """Whether bytes must go through memory, so that a run that went another way is an error."""
        return self.kind == "shm"

    @property
    def mapped(self) -> bool:
        """Whether both sides' memory is such as a peer can map."""
        return self.shares and not self._says("plain")

    @property
    def reads(self) -> bool:
        """Whether the destination reads by a grant."""
        return self._says("read")

    def config(self, extra: Mapping[str, Any], case: Case | None = None) -> dict[str, Any]:
        """Return its Config: protection plain unless the name says digest. The movers are pinned, one a core, as the
        raw limit's threads are.
        """
        backends = {"inproc": ["inproc"], "shm": ["shm", "tcp"]}.get(self.kind, ["tcp"])
        config: dict[str, Any] = {
            "backends": backends,
            "protection": "digest" if self._says("digest") else "plain",
        }
        movers = LANES
        if self._says("1"):
            config["movers"] = movers = 1
        if case is not None and case.name not in PIN_ALL and self.kind != "inproc":
            cores = sorted(os.sched_getaffinity(0))
            config["cpus"] = (
                cores[:LANES] if movers > 1 else [cores[1 % len(cores)]]
            )  # where the limit's one is
        return config | dict(extra)
