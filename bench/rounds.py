"""Runs participants in turn, round after round, so that what disturbs the machine disturbs all of them
alike.

A ratio is made inside a round and then the median is taken over rounds: absolute figures of one machine
move by 20 % within minutes, ratios inside a round don't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench import measure
from bench.cases import Case
from bench.process import WorkerError
from bench.progress import Progress
from bench.sample import Participant, Sample


@dataclass
class CaseResult:
    """What a case gave: a sample for each participant and round."""

    case: Case
    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> list[Sample]:
        return list(self.samples.get(name, {}).values())

    def median(self, name: str, value: Callable[[Sample], float]) -> float:
        return measure.median([value(sample) for sample in self.of(name)])

    def p50_us(self, name: str) -> float:
        return self.median(name, lambda sample: sample.p50_us)

    def p99_us(self, name: str) -> float:
        """Return the 99th percentile of the repetitions of all rounds together."""
        return measure.percentile([x for sample in self.of(name) for x in sample.latencies_us], 0.99)

    def ratio(
        self, name: str, base: str, value: Callable[[Sample], float] = lambda sample: sample.figure
    ) -> float | None:
        """Return the median over rounds of `name`'s value over `base`'s; None: one of them is missing."""
        ours, theirs = self.samples.get(name, {}), self.samples.get(base, {})
        common = [turn for turn in ours if turn in theirs]
        if not common:
            return None
        return measure.median([value(ours[turn]) / value(theirs[turn]) for turn in common])


def run_case(case: Case, participants: Sequence[Participant], rounds: int, progress: Progress) -> CaseResult:
    """Open the participants, run them in turn, close them. One that fails is left out from there on."""
    result = CaseResult(case)
    able = [participant for participant in participants if participant.supports(case)]
    opened: list[Participant] = []
    try:
        for participant in able:
            progress.step(f"{case.name}: {participant.name} starts")
            if _attempt(result, participant, lambda p=participant: p.open(case)):  # type: ignore[misc]
                participant.pause()
                opened.append(participant)
                result.commands[participant.name] = getattr(participant, "command", "")
        for turn in range(rounds):
            shift = turn % max(1, len(opened))  # nobody always runs after the same one
            for participant in opened[shift:] + opened[:shift]:
                if participant.name not in result.errors:
                    progress.step(f"{case.name}: round {turn + 1}/{rounds}: {participant.name}")
                    _one_run(result, participant, case, turn)
    finally:
        for participant in opened:
            participant.close()
    return result


def _one_run(result: CaseResult, participant: Participant, case: Case, turn: int) -> None:
    participant.resume()

    def run() -> None:
        result.samples.setdefault(participant.name, {})[turn] = participant.run(case, turn + 1)

    if _attempt(result, participant, run):
        participant.pause()
    else:
        participant.close()


def _attempt(result: CaseResult, participant: Participant, action: Callable[[], None]) -> bool:
    try:
        action()
    except (WorkerError, OSError) as error:
        result.errors[participant.name] = str(error)
        participant.close()
        return False
    return True
