"""Figures: what a run has found, as text and as JSON.

Here: the statistics and the two forms. Not here: measuring.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtransport import __version__
from kvtransport.cli.bench.cases import WARM_UP_SHARE, Case
from kvtransport.cli.bench.verbs import Sample


@dataclass(frozen=True)
class Figures:
    """Of a run whose every byte was right.

    nbytes: of one transfer. gb_per_s: median, least and greatest over the rounds; None in a latency case.
    latency_us: p50, p99 and how many were measured; None in a case of bandwidth. cpu_s_per_gb: of both processes,
    the median round's; None in a latency case. versions: of kvtransport.
    """

    case: str
    title: str
    scale: int
    verb: str
    backend: str
    rounds: int
    nbytes: int
    gb_per_s: dict[str, float] | None
    latency_us: dict[str, float] | None
    cpu_s_per_gb: dict[str, float] | None
    explain: str
    versions: dict[str, str]

    @classmethod
    def of(
        cls, case: Case, scale: int, verb: str, samples: Sequence[Sample], explain: str, their_version: str
    ) -> Figures:
        """Return those of the rounds that count, at least one."""
        return cls(
            case=case.name,
            title=case.title,
            scale=scale,
            verb=verb,
            backend=", ".join(dict.fromkeys(sample.backend for sample in samples)),
            rounds=len(samples),
            nbytes=case.nbytes,
            gb_per_s=None if case.latency else _rates(case, samples),
            latency_us=_latencies(samples) if case.latency else None,
            cpu_s_per_gb=None if case.latency else _costs(case, samples),
            explain=explain,
            versions={"here": __version__, "there": their_version},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields; `verified` is True: a run with a wrong byte has no figures."""
        return dataclasses.asdict(self) | {"verified": True}

    def __str__(self) -> str:
        scaled = f", divided by {self.scale}: not to be compared" if self.scale > 1 else ""
        lines = [
            f"case {self.case}: {self.title}{scaled}",
            f"  {self.verb} over {self.backend}, {self.rounds} rounds of {self.nbytes} bytes a transfer, every "
            f"byte checked",
        ]
        if self.gb_per_s is not None:
            told = self.gb_per_s
            lines.append(f"  {told['median']:.2f} GB/s (least {told['least']:.2f}, most {told['most']:.2f})")
        if self.latency_us is not None:
            us = self.latency_us
            lines.append(f"  p50 {us['p50']:.1f} us, p99 {us['p99']:.1f} us, of {us['count']:.0f} transfers")
        if self.cpu_s_per_gb is not None:
            cpu = self.cpu_s_per_gb
            lines.append(f"  CPU s/GB: source {cpu['there']:.3f}, destination {cpu['here']:.3f}")
        return "\n".join([*lines, *(f"  {line}" for line in self.explain.splitlines())])


def measured(seconds: Sequence[float]) -> Sequence[float]:
    """Return the times of a batch that count: its first ones find caches and windows cold."""
    return seconds[len(seconds) // WARM_UP_SHARE :]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _rates(case: Case, samples: Sequence[Sample]) -> dict[str, float]:
    rates = [case.nbytes / sample.seconds[0] / 1e9 for sample in samples]
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}


def _latencies(samples: Sequence[Sample]) -> dict[str, float]:
    us = [seconds * 1e6 for sample in samples for seconds in measured(sample.seconds)]
    return {"p50": percentile(us, 0.5), "p99": percentile(us, 0.99), "count": len(us)}


def _costs(case: Case, samples: Sequence[Sample]) -> dict[str, float]:
    gb = case.nbytes / 1e9
    return {
        "here": statistics.median(sample.cpu_here_s for sample in samples) / gb,
        "there": statistics.median(sample.cpu_there_s for sample in samples) / gb,
    }
