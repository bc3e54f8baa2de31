"""The targets that are ratios of rates, latencies and CPU time of the cases: results in, rows out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from bench import shm_targets
from bench.raw_limits import R1, R2
from bench.rounds import CaseResult
from bench.rows import Row
from bench.sample import Sample

TCP, DIGEST = "tcp", "tcp-digest"
MOONCAKE = ("mooncake-read", "mooncake-write")
NIXL_TCP = ("nixl-tcp-write",)
FLAT = 1.2

# The bench's own limits, over one-thread memcpy: below these the machine or the bench is at fault, not the
# library.
GATES = {R2: 0.6, "memfd1": 0.85, "vmread1": 0.5}

Results = Mapping[str, CaseResult]


@functools.cache
def has_vpclmulqdq() -> bool:
    return "vpclmulqdq" in Path("/proc/cpuinfo").read_text()


def slow_limits(results: Results) -> list[str]:
    """Return a line for each limit that is slower than it must be for the ratios to mean something."""
    if "a" not in results:
        return []
    lines = []
    for name, least in GATES.items():
        ratio = results["a"].ratio(name, "memcpy1")
        if ratio is None:
            lines.append(f"the limit {name} was not measured")
        elif ratio < least:
            lines.append(f"the limit {name} is slow: {ratio:.2f} of one-thread memcpy, must be {least}")
    return lines


def rows_of(results: Results) -> list[Row]:
    """Return the rows of the cases that were run."""
    rows: list[Row] = []
    if case := results.get("a"):
        rows += _bulk(case, "(a) 512 MiB in 64 KiB pieces", 0.95, {MOONCAKE: 3.2, NIXL_TCP: 4.0})
        digest_target = 0.80 if has_vpclmulqdq() else 0.60
        rows.append(Row.at_least("(a) with digests / R2", case.ratio(DIGEST, R2), digest_target))
        rows += _cpu(case)
    if case := results.get("d"):
        rows += _bulk(case, "(d) 32,768 x 4 KiB", 0.92, {MOONCAKE: 15.0})
    if case := results.get("f"):
        rows += _bulk(case, "(f) 262,144 x 1 KiB", 0.5, {NIXL_TCP: 20.0})
    if case := results.get("e"):
        rows += _bulk(case, "(e) MLA 73,728 B", 0.95, {})
    if case := results.get("b"):
        rows += _block_latency(case)
    if case := results.get("c"):
        rows.append(Row.at_most("(c) 4 KiB p50 / R1", case.ratio(TCP, R1), 1.3))
    return rows + shm_targets.rows_of(results) + _flat_cpu(results)


def _bulk(case: CaseResult, title: str, of_r2: float, of_peers: Mapping[tuple[str, ...], float]) -> list[Row]:
    rows = [Row.at_least(f"{title} / R2", case.ratio(TCP, R2), of_r2)]
    for names, target in of_peers.items():
        ratios = [ratio for name in names if (ratio := case.ratio(TCP, name)) is not None]
        # Against the best of a peer's ways; a peer that wasn't run is no row.
        if ratios:
            rows.append(Row.at_least(f"{title} / {names[0].rsplit('-', 1)[0]}", min(ratios), target))
    return rows


def _cpu(case: CaseResult) -> list[Row]:
    def per_gb(sample: Sample) -> float:
        return sample.cpu_per_gb

    digest_target = 1.3 if has_vpclmulqdq() else 1.6
    return [
        Row.at_most("CPU s/GB (a) / R2", case.ratio(TCP, R2, per_gb), 1.1),
        Row.at_most("CPU s/GB (a) with digests / R2", case.ratio(DIGEST, R2, per_gb), digest_target),
    ]


def _block_latency(case: CaseResult) -> list[Row]:
    rows = [Row.at_most("(b) one block p50 / R1", case.ratio(TCP, R1), 0.90)]
    if case.of(TCP):
        rows.append(Row.at_most("(b) p99 / p50", case.p99_us(TCP) / case.p50_us(TCP), 2.5))
    return rows


def _flat_cpu(results: Results) -> list[Row]:
    """CPU per piece, over the limit's at the same N, from 32,768 pieces on."""
    over: dict[int, float] = {}
    for name, case in results.items():
        if name.startswith("n:") and case.case.ids >= 32_768:
            ratio = case.ratio(TCP, R2, lambda sample: sample.cpu_per_gb)
            if ratio is not None:
                over[case.case.ids] = ratio
    if len(over) < 2:
        return []
    name = f"CPU per 4 KiB piece / R2's, {min(over):,} to {max(over):,}: max / min"
    return [Row.at_most(name, max(over.values()) / min(over.values()), FLAT)]
