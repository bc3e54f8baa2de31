"""What one run of one participant gives, and what makes a participant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench import measure
from bench.cases import LATENCY_WARM_UPS, Case


@dataclass(frozen=True)
class Sample:
    """One run. A latency run has a time for each repetition, another one has one time for all bytes."""

    nbytes: int
    seconds: float
    cpu_s: float
    verified: bool
    runs: int = 0
    latencies_us: list[float] = field(default_factory=list)
    first_us: float = 0.0
    """The first repetition after a pause, which no percentile counts: caches and windows are cold."""

    @classmethod
    def of_latencies(cls, nbytes: int, samples_us: Sequence[float]) -> Sample:
        """Return the sample of a round's batch: the warm-ups are left out, as the raw limits' are."""
        measured = list(samples_us[LATENCY_WARM_UPS:])
        return cls(nbytes, sum(measured) / 1e6, 0.0, True, 0, measured, samples_us[0])

    @property
    def rate(self) -> float:
        """GB/s; 0 for a latency run."""
        return self.nbytes / self.seconds / 1e9 if self.nbytes and not self.latencies_us else 0.0

    @property
    def cpu_per_gb(self) -> float:
        """CPU seconds of both processes for each GB; a latency run's are not counted."""
        return self.cpu_s / self.nbytes * 1e9 if self.nbytes and not self.latencies_us else 0.0

    @property
    def p50_us(self) -> float:
        return measure.percentile(self.latencies_us, 0.50)

    @property
    def p99_us(self) -> float:
        return measure.percentile(self.latencies_us, 0.99)

    @property
    def figure(self) -> float:
        """The number that ratios are made of: p50 for a latency run, else the rate."""
        return self.p50_us if self.latencies_us else self.rate


class Participant(Protocol):
    """Something that moves the work. Opened for each case, run in turn with the others, closed."""

    name: str

    def supports(self, case: Case) -> bool:
        """Whether it can do the case at all."""

    def open(self, case: Case) -> None:
        """Start its processes and set up the case's memory."""

    def run(self, case: Case, seed: int) -> Sample:
        """Move the case's bytes once (a latency case: many times) and verify them."""

    def pause(self) -> None:
        """Keep quiet while others run."""

    def resume(self) -> None:
        """Be ready to run."""

    def close(self) -> None:
        """End the processes. Idempotent."""
