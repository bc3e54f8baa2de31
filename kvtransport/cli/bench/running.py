"""`kvtransport bench run`: the destination. It asks the server for rounds, checks every byte, and counts.

Here: the rounds of a run. Not here: what a round does (`verbs`), the figures and their forms (`figures`).

Invariant: a round is counted only after every byte of the memory, moved or not, was found right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvtransport.cli.bench.arena import Arena
from kvtransport.cli.bench.cases import Case
from kvtransport.cli.bench.control import PROTOCOL, Asking, BenchError, Close, Open, Opened, Round
from kvtransport.cli.bench.figures import Figures
from kvtransport.cli.bench.progress import Progress
from kvtransport.cli.bench.verbs import End, Sample, Verb
from kvtransport.endpoint import Endpoint

FIRST_SEED: Final = 1


@dataclass(frozen=True)
class Plan:
    """What is to be run: `rounds` of a case, which `scale` has made smaller, after one that isn't counted."""

    case: Case
    scale: int
    verb: Verb
    rounds: int


def run(endpoint: Endpoint, address: str, plan: Plan, timeout: float) -> Figures:
    """Run it against the server at `address`. BenchError: refused, or wrong bytes; the errors of kvtransport."""
    progress = Progress(plan.rounds + 2)
    try:
        progress.step("connecting")
        connection = endpoint.connect(address, timeout)
        asking = Asking(endpoint, connection)
        opened = asking.ask(Open(PROTOCOL, plan.case.name, plan.verb.name, plan.scale))
        if not isinstance(opened, Opened):
            raise BenchError("the server's answer doesn't fit what was asked")
        arena = Arena(endpoint, plan.case)
        end = End(connection, plan.case, arena, arena.register(endpoint))
        samples = []
        for number in range(plan.rounds + 1):
            progress.step(f"round {number} of {plan.rounds}" if number else "warming up")
            samples.append(_round(end, plan.verb, FIRST_SEED + number, asking))
        explain = connection.explain()
        asking.ask(Close())
    finally:
        progress.close()
    return Figures.of(plan.case, plan.scale, plan.verb.name, samples[1:], explain, opened.version)


def _round(end: End, verb: Verb, seed: int, asking: Asking) -> Sample:
    """Move, then check every byte."""
    end.arena.wipe()
    sample = verb.destination(end, seed, lambda: asking.ask(Round(seed)))
    theirs, ours = (end.case.block_ids(seed, side).ravel() for side in ("source", "destination"))
    wrong = end.arena.wrong_blocks(theirs, ours)
    if wrong:
        raise BenchError(f"{wrong} blocks hold wrong bytes after the round of seed {seed}: this is a fault")
    return sample
