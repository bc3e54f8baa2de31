"""The raw limits as participants: finds or builds `kvt_limits`, and asks it for one run at a time.

R1 and R2 are loopback TCP with 1 and 2 connections. "The best that a bare implementation does" depends on
the machine, so a case first tries socket buffers, placement of threads and congestion control, and takes
the best for its rounds.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.measure import median
from bench.process import ROOT, LineProcess, WorkerError
from bench.sample import Sample

SOURCES = Path(__file__).parent / "limits"
BUILD = Path(__file__).parent / "build"
BUFFERS = ("default", "256k")
PLACEMENTS = ("cross", "same")
LATENCY_PLACEMENTS = ("cross",)  # the two ends of a latency case sit on different cores
CALIBRATION_RUNS = 3
REPS = {"b": 200, "c": 1000}

COPIES = {
    "memcpy1": "copy {case} 1",
    "memcpy2": "copy {case} 2",
    "memfd1": "memfd {case} 1",
    "memfd2": "memfd {case} 2",
    "vmread1": "vmread {case} 1",
    "vmread2": "vmread {case} 2",
}
R1, R2 = "R1", "R2"
CONNECTIONS = {R1: 1, R2: 2}


def find_program() -> Path:
    """Return `kvt_limits`: the build's if it is newer than its sources, else one that is built here."""
    newest = max(path.stat().st_mtime for path in SOURCES.iterdir())
    built = [*ROOT.glob("build/**/kvt_limits"), BUILD / "kvt_limits"]
    for path in built:
        if path.is_file() and path.stat().st_mtime >= newest:
            return path
    return _compile()


def _compile() -> Path:
    BUILD.mkdir(exist_ok=True)
    program = BUILD / "kvt_limits"
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-O2", "-std=c++20", "-pthread", *sources, "-o", str(program)], check=True, timeout=300
    )
    return program


def congestion_controls() -> list[str]:
    """Return the congestion controls to try: the system's, and a plain one where that may be chosen."""
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    ours = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    return [ours, *(name for name in ("cubic", "reno") if name in allowed and name != ours)][:2]


class LimitsProgram:
    """The running program (two processes). One for the whole bench: its memory is set up once."""

    def __init__(self) -> None:
        self._process = LineProcess("kvt_limits", [str(find_program())])

    def run(self, command: str) -> dict[str, Any]:
        self._process.write_line(command)
        reply = self._process.read_reply()
        if not reply["verified"]:
            raise WorkerError(f"kvt_limits: {command}: the bytes that arrived are wrong")
        return reply

    def free(self) -> None:
        """Give back what only some cases need."""
        self._process.write_line("free")
        self._process.read_reply()

    def close(self) -> None:
        self._process.close()


class Limit:
    """One of the limits as a participant."""

    def __init__(self, name: str, program: LimitsProgram) -> None:
        self.name = name
        self._program = program
        self._command = ""

    def supports(self, case: Case) -> bool:
        return True

    def open(self, case: Case) -> None:
        if self.name in COPIES:
            self._command = COPIES[self.name].format(case=case.name)
        else:
            self._command = self._calibrated(case)

    def run(self, case: Case, seed: int) -> Sample:
        return self._sample(self._program.run(f"{self._command}{self._reps(case)} seed={seed}"))

    def pause(self) -> None:
        """Nothing: it sleeps between commands."""

    def resume(self) -> None:
        """Nothing: it sleeps between commands."""

    def close(self) -> None:
        """Nothing: the program serves the next case too."""

    @property
    def command(self) -> str:
        """What is run, for the report."""
        return self._command

    def _reps(self, case: Case) -> str:
        return f" reps={REPS.get(case.name, 100)}" if case.latency else ""

    def _calibrated(self, case: Case) -> str:
        """Return the command with the settings that are best here and now."""
        probe = _probe_case(case)
        trials: dict[str, float] = {}
        placements = LATENCY_PLACEMENTS if case.latency else PLACEMENTS
        for placement in placements:
            for congestion in congestion_controls():
                for buffers in BUFFERS:
                    words = f"tcp {{case}} {CONNECTIONS[self.name]} {buffers} {placement} cc={congestion}"
                    trials[words] = self._trial(words.format(case=probe), case)
        best = max if not case.latency else min
        return best(trials, key=lambda words: trials[words]).format(case=case.name)

    def _trial(self, command: str, case: Case) -> float:
        runs = [self._program.run(f"{command}{self._reps(case)} seed={i}") for i in range(CALIBRATION_RUNS)]
        return median([self._sample(reply).figure for reply in runs])

    @staticmethod
    def _sample(reply: dict[str, Any]) -> Sample:
        return Sample(
            nbytes=reply["nbytes"],
            seconds=reply["seconds"],
            cpu_s=reply["cpu_s"],
            verified=reply["verified"],
            runs=reply["runs"],
            latencies_us=reply["samples_us"],
        )


def _probe_case(case: Case) -> str:
    """Calibrate on the case itself, but not on gigabytes of it."""
    return "n:131072" if case.name.startswith("n:") and case.ids > 131_072 else case.name
