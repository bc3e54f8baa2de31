"""The targets of shared memory: results of the cases in, rows out. A participant that wasn't run is no row.

M and P are the limits: memcpy from the other process's memfd, batched process_vm_readv; 1 and 2 threads beside 1 and 2
movers. NIXL is its default path, in the same rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.rounds import CaseResult
from bench.rows import Row

M1, M2, P2 = "memfd1", "memfd2", "vmread2"
NIXL = "nixl-read"
MAPPED, MAPPED_1, READ, PLAIN = "shm", "shm-1", "shm-read", "shm-plain"

RATES = (
    # case, participant, of what, at least
    ("a", MAPPED_1, M1, 0.97),
    ("a", MAPPED, M2, 0.95),
    ("a", MAPPED_1, NIXL, 3.5),
    ("a", MAPPED, NIXL, 6.0),
    ("a", PLAIN, P2, 0.95),
    ("a", PLAIN, NIXL, 3.0),
    ("d", MAPPED, M2, 0.90),
    ("d", MAPPED, NIXL, 12.0),
    ("d", PLAIN, NIXL, 6.0),
    ("f", MAPPED, M2, 0.70),
    ("e", MAPPED, M2, 0.95),
)
CPU = (("a", MAPPED_1, M1, 1.25), ("a", MAPPED, M2, 1.25))
READ_US = 2.5
BLOCK_OF_M1, BLOCK_TAIL = 1.15, 2.5

Results = Mapping[str, CaseResult]


def rows_of(results: Results) -> list[Row]:
    """Return the rows of the cases that were run with the participants that they are about."""
    rows = [
        Row.at_least(f"({name}) {who} / {base}", ratio, least)
        for name, who, base, least in RATES
        if (ratio := _ratio(results, name, who, base)) is not None
    ]
    if case := results.get("b"):
        for who in (MAPPED, READ):
            rows += _block_latency(case, who)
    if case := results.get("c"):
        rows += _piece_latency(case)
    for name, who, base, most in CPU:
        if name in results:
            ratio = results[name].ratio(who, base, lambda sample: sample.cpu_per_gb)
            if ratio is not None:
                rows.append(Row.at_most(f"CPU s/GB ({name}) {who} / {base}", ratio, most))
    return rows


def _ratio(results: Results, name: str, who: str, base: str) -> float | None:
    return results[name].ratio(who, base) if name in results else None


def _block_latency(case: CaseResult, who: str) -> list[Row]:
    if not case.of(who):
        return []
    p50, p99 = case.p50_us(who), case.p99_us(who)
    return [
        Row.at_most(f"(b) {who} p50 / {M1}", case.ratio(who, M1), BLOCK_OF_M1),
        Row.at_most(f"(b) {who} p99 / p50", p99 / p50, BLOCK_TAIL),
    ]


def _piece_latency(case: CaseResult) -> list[Row]:
    if not case.of(READ):
        return []
    rows = [Row.at_most(f"(c) {READ} of 4 KiB, p50", case.p50_us(READ), READ_US, "us")]
    ratio = case.ratio(READ, NIXL)
    if ratio is not None:
        rows.append(Row.at_most(f"(c) {READ} p50 / {NIXL}", ratio, 1.0))
    return rows
