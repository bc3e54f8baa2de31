"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import measure
from bench.rounds import CaseResult
from bench.rows import Row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table; the first column is left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def case_table(result: CaseResult) -> str:
    """Return the table of a case: medians over rounds."""
    rows = [_case_row(result, name) for name in result.samples if result.of(name)]
    header = (
        ["", "p50 us", "p99 us", "first us", "spread"]
        if result.case.latency
        else ["", "GB/s", "spread", "CPU s/GB", "runs"]
    )
    lines = [f"({result.case.name}) {result.case.title}", table(header, rows)]
    lines += [f"{name} failed: {error}" for name, error in result.errors.items()]
    return "\n".join(lines)


def _case_row(result: CaseResult, name: str) -> list[str]:
    samples = result.of(name)
    figures = [sample.figure for sample in samples]
    spread = f"{measure.spread(figures):.0%}"
    if result.case.latency:
        first = result.median(name, lambda sample: sample.first_us)
        cells = [f"{us:,.1f}" for us in (result.p50_us(name), result.p99_us(name))]
        return [name, *cells, f"{first:,.1f}" if first else "-", spread]
    cpu = result.median(name, lambda sample: sample.cpu_per_gb)
    return [name, f"{measure.median(figures):.2f}", spread, f"{cpu:.3f}", f"{samples[0].runs:,}"]


def target_table(rows: Sequence[Row]) -> str:
    marks = {True: "yes", False: "NO", None: "-"}
    cells = [[row.name, row.measured, row.target, marks[row.met]] for row in rows]
    return table(["target", "measured", "asked", "met"], cells)


def environment() -> dict[str, Any]:
    """Return what a reader must know to compare figures: the machine and its settings."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "tcp_congestion_control": congestion,
        "load_average": os.getloadavg()[0],
    }


def document(
    settings: Mapping[str, Any], results: Mapping[str, CaseResult], rows: Sequence[Row]
) -> dict[str, Any]:
    """Return every sample in plain values, so that other figures can be made of them later."""
    cases = {
        name: {
            "case": asdict(result.case),
            "commands": result.commands,
            "errors": result.errors,
            "samples": {
                who: {str(turn): asdict(sample) for turn, sample in turns.items()}
                for who, turns in result.samples.items()
            },
        }
        for name, result in results.items()
    }
    return {
        "settings": dict(settings),
        "environment": environment(),
        "cases": cases,
        "targets": [asdict(row) for row in rows],
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
