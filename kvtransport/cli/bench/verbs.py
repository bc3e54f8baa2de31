"""Verb: a way to have blocks moved, both halves side by side.

Here: what the server (`source`) and the runner (`destination`) do in one round. Not here: rounds, and what is made
of them (`running`). A verb of one-sided calls is one more class here: its `source` grants and replies, its
`destination` asks first, reads then, and its own clock counts.

Invariant: a round moves the ids that (case, seed) name, and when `destination` returns they have landed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from kvtransport.cli.bench.arena import Arena
from kvtransport.cli.bench.cases import Case
from kvtransport.cli.bench.control import LIMIT_S, BenchError, Moved, Opened
from kvtransport.connection import Connection
from kvtransport.memory.pool import BlockPool

Ask = Callable[[], Opened | Moved]
"""Has the server do its half of the round; returns its reply."""


@dataclass(frozen=True)
class End:
    """One side of a run: its peer, its memory."""

    connection: Connection
    case: Case
    arena: Arena
    pool: BlockPool


@dataclass(frozen=True)
class Sample:
    """One round. seconds: of each transfer. here, there: CPU seconds of the two processes."""

    seconds: tuple[float, ...]
    cpu_here_s: float
    cpu_there_s: float
    backend: str


class Verb(Protocol):
    """What each has."""

    @property
    def name(self) -> str:
        """The word of `--verb`."""

    def source(self, end: End, seed: int) -> Moved:
        """Do the server's half."""

    def destination(self, end: End, seed: int, ask: Ask) -> Sample:
        """Do the runner's half."""


class RecvVerb:
    """Two-sided: the runner has posted its receives before the server begins to send.

    A transfer's time is the source's, from the post to the destination's word: with the receive already there,
    nothing but moving and confirming is in it.
    """

    name = "recv"

    def source(self, end: End, seed: int) -> Moved:
        """Send one after the other."""
        cpu, seconds = cpu_s(), []
        for i, ids in enumerate(end.case.block_ids(seed, "source")):
            began = time.perf_counter()
            end.connection.send_blocks(
                end.pool, ids, key=_key(seed, i), match_timeout_s=LIMIT_S, timeout_s=LIMIT_S
            ).result()
            seconds.append(time.perf_counter() - began)
        return Moved(seconds, cpu_s() - cpu)

    def destination(self, end: End, seed: int, ask: Ask) -> Sample:
        """Post all receives, then ask; wait for all."""
        cpu = cpu_s()
        transfers = [
            end.connection.recv_blocks(
                end.pool, ids, key=_key(seed, i), match_timeout_s=LIMIT_S, timeout_s=LIMIT_S
            )
            for i, ids in enumerate(end.case.block_ids(seed, "destination"))
        ]
        moved = ask()
        results = [transfer.result() for transfer in transfers]
        if not isinstance(moved, Moved) or len(moved.seconds) != len(transfers):
            raise BenchError("the server's answer doesn't fit what was asked")
        return Sample(tuple(moved.seconds), cpu_s() - cpu, moved.cpu_s, results[-1].backend)


VERBS: Final[dict[str, Verb]] = {verb.name: verb for verb in (RecvVerb(),)}


def cpu_s() -> float:
    """Return the time that all threads of this process have used, user and system, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _key(seed: int, transfer: int) -> str:
    return f"bench-{seed}-{transfer}"
