"""The bench: `python -m bench`. See bench/README.md for what it measures and how."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import cases, ours, plots, raw_limits, report, targets, ways
from bench.cases import Case, case_of
from bench.progress import Progress
from bench.rounds import CaseResult, run_case
from bench.rows import Row
from bench.sample import Participant
from bench.special.context import Context

# In bench/special/, imported when they are run: they import kvtransport, and the limits and peers must run
# without it.
SPECIALS = {
    "g": "under_load.measure_rows",
    "h": "crowd.measure_rows",
    "h-shm": "crowd.measure_shm",
    "fair": "sharing.measure_rows",
    "fair-shm": "sharing.measure_shm",
    "beside": "beside.measure_rows",
    "rewriting": "rewriting.measure_rows",
    "conns": "many.measure_bandwidth",
    "posting": "posting.measure_rows",
    "idle": "many.measure_idle",
    "idle-shm": "many.measure_idle_shm",
    "gil": "gil.measure_rows",
    "connecting": "connecting.measure_rows",
    "awaits": "awaits.measure_rows",
    "word": "word.measure_rows",
    "setup": "costs.measure_setup",
    "import": "costs.measure_import",
    "memory": "costs.measure_memory",
}
PLAIN = ("a", "b", "c", "d", "e", "f", "fs")
ALL = (*PLAIN, "n", *SPECIALS)
ALL_COPIES = tuple(raw_limits.COPIES)
COPIES_FOR = {"a": ALL_COPIES, "b": ("memcpy1", "memfd1"), "d": ALL_COPIES}
COPIES_FOR |= {"e": ("memcpy1", "memfd2"), "f": ("memfd2",)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--cases", default=",".join(ALL), help=f"of {','.join(ALL)}, n:COUNT (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each case (default: 7)")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw PNG files there; needs matplotlib")
    parser.add_argument(
        "--backends", default="tcp,tcp-digest,inproc", help=f"of {','.join(ways.BACKENDS)}; empty: none"
    )
    parser.add_argument("--peers", nargs="?", const="default", default="", help="names, or the usual ones")
    parser.add_argument("--config", action="append", default=[], metavar="KEY=VALUE", help="of kvt.Config")
    parser.add_argument("--max-pieces", type=int, default=1_000_000, help="for case n")
    parser.add_argument("--reads", type=int, default=1_000_000, help="for rewriting, over each backend")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--allow-slow-limits", action="store_true", help="report slow limits, but don't fail")
    arguments = parser.parse_args(argv)
    unknown = [name for name in _names(arguments.cases) if name not in ALL and not name.startswith("n:")]
    unknown += [name for name in _names(arguments.backends) if name not in ways.BACKENDS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return arguments


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def config_from(pairs: Sequence[str]) -> dict[str, Any]:
    """Return Config fields from KEY=VALUE words; values are JSON where they can be read as such."""
    config: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            config[key] = json.loads(text)
        except json.JSONDecodeError:
            config[key] = text
    return config


class Bench:
    """One run of the bench."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.config = config_from(arguments.config)
        self.results: dict[str, CaseResult] = {}
        self.rows: list[Row] = []
        names = _names(arguments.cases)
        self.cases = [case_of(name) for name in self._plain_names(names)]
        self.specials = [name for name in names if name in SPECIALS] if self._backends else []
        self.progress = Progress(self._steps(), arguments.quiet)
        self.context = Context(self.config, max(3, arguments.rounds // 2), self.progress, arguments.reads)

    @property
    def _backends(self) -> list[str]:
        return _names(self.arguments.backends)

    @property
    def _peers(self) -> list[str]:
        from bench.peers import adapters

        named = self.arguments.peers
        return list(adapters.DEFAULT) if named == "default" else _names(named)

    def _plain_names(self, names: Sequence[str]) -> list[str]:
        plain = [name for name in names if name in PLAIN or name.startswith("n:")]
        if "n" in names:
            plain += [f"n:{count}" for count in cases.N_COUNTS if count <= self.arguments.max_pieces]
        return plain

    def _steps(self) -> int:
        participants = 2 + len(self._backends) + len(self._peers)
        turns = int(self.arguments.rounds) + 1
        plain = sum(participants + len(COPIES_FOR.get(case.name, ())) for case in self.cases) * turns
        return plain + 8 * len(self.specials)

    def participants(self, case: Case, program: raw_limits.LimitsProgram) -> list[Participant]:
        names = (*COPIES_FOR.get(case.name, ()), raw_limits.R1, raw_limits.R2)
        made: list[Participant] = [raw_limits.Limit(name, program) for name in names]
        for backend in self._backends:
            made.append(
                ours.OursInproc(self.config) if backend == "inproc" else ours.Ours(backend, self.config)
            )
        if self._peers and not case.name.startswith("n:"):
            from bench.peers.adapters import Peer

            made += [Peer(name) for name in self._peers]
        return made

    def run(self) -> int:
        """Run everything; return the exit status."""
        program = raw_limits.LimitsProgram()
        try:
            for case in self.cases:
                self._run_case(case, program)
        finally:
            program.close()
        for name in self.specials:
            self._run_special(name)
        self.progress.close()
        return self._finish()

    def _run_case(self, case: Case, program: raw_limits.LimitsProgram) -> None:
        result = run_case(case, self.participants(case, program), self.arguments.rounds, self.progress)
        self.results[case.name] = result
        program.free()
        self.progress.close()
        print(report.case_table(result), end="\n\n", flush=True)

    def _run_special(self, name: str) -> None:
        module, function = SPECIALS[name].split(".")
        try:
            program = getattr(importlib.import_module(f"bench.special.{module}"), function)
            self.rows += program(self.context)
        except Exception as error:  # one row's failure must not cost the others' results
            self.progress.say(f"{name}: {error}")
            self.rows.append(Row.failed(name, str(error)))

    def _finish(self) -> int:
        self.rows = targets.rows_of(self.results) + self.rows
        print(report.target_table(self.rows))
        self._write()
        slow = targets.slow_limits(self.results)
        if self.results and "a" not in self.results:
            print("the limits were not checked against memcpy: case a was not run", file=sys.stderr)
        for line in slow:
            print(f"FAILED: {line}", file=sys.stderr)
        broken = [f"{row.name}: {row.measured}" for row in self.rows if row.broken]
        broken += [f"({name}) {who}" for name, result in self.results.items() for who in result.errors]
        for who in broken:
            print(f"FAILED: {who}", file=sys.stderr)
        return 1 if broken or (slow and not self.arguments.allow_slow_limits) else 0

    def _write(self) -> None:
        """Write the files that were asked for."""
        settings = {
            "config": self.config,
            "rounds": self.arguments.rounds,
            "details": self.context.details,
        }
        document = report.document(settings, self.results, self.rows)
        if self.arguments.json:
            report.write_json(self.arguments.json, document)
        if self.arguments.plots:
            plots.write(document, self.arguments.plots)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.plots and not plots.available():
        print(plots.NEEDS, file=sys.stderr)
        return 2
    if arguments.peers:
        from bench.peers import setup

        if not setup.ready() and setup.main():
            print("FAILED: the peers can't be installed", file=sys.stderr)
            return 1
    return Bench(arguments).run()
