"""F25: the wall clock may jump: nothing here asks for it, and nothing happens when it does."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvtransport
from kvtransport import _native
from tests.faults import clock_jumps
from tests.faults.peers import SLOW_S
from tests.faults.preload import built, preloaded

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCK = re.compile(
    r"\b(system_clock|CLOCK_REALTIME\w*|gettimeofday|timespec_get|high_resolution_clock)\b"
)
EARLY_S = 0.02  # limits are rounded to milliseconds on the way
WALL_CALLS = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today"}


def test_f25_no_wall_clock_in_the_extension():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm isn't installed (package binutils)")
    listed = subprocess.run([nm, "-D", "--undefined-only", _native.__file__], capture_output=True, text=True)
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines() if line.strip()}
    assert names
    assert not names & {"time", "gettimeofday", "ftime", "timespec_get", "localtime", "localtime_r"}
    assert not [name for name in names if "system_clock" in name]


def test_f25_no_wall_clock_in_the_sources():
    """Where clock_gettime is used, its argument tells; the symbol alone doesn't."""
    sources = [path for path in (ROOT / "native").rglob("*.?pp") if "tests" not in path.parts]
    assert sources
    for path in sources:
        code = re.sub(r"//[^\n]*", "", path.read_text())
        assert not WALL_CLOCK.search(code), path.name
        assert "steady_clock" in code or "clock_gettime" not in code or "CLOCK_MONOTONIC" in code, path.name


def test_f25_no_wall_clock_in_the_package():
    for path in Path(kvtransport.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = node.value.id, node.attr
                assert module not in ("time", "datetime", "date") or name not in WALL_CALLS, (path.name, name)
            elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                assert not {alias.name for alias in node.names} & (WALL_CALLS | {"datetime"}), path.name


@pytest.mark.parametrize("direction", ["ahead", "back"])
def test_f25_the_clock_jumps(direction):
    """By an hour, ten times a second, in both processes: nobody is dead for it, no wait is shorter or longer."""
    program = [sys.executable, clock_jumps.__file__]
    with preloaded(built("clock"), KVT_SHIM_CLOCK=direction):
        done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["jumped_s"] * (1 if direction == "ahead" else -1) > 10 * 3600  # the shim was there
    assert found["states"] == ["open", "open", "moving"]
    assert found["right"]
    assert len(found["took"]) == (len(clock_jumps.WAITS) + 1) * len(clock_jumps.LIMITS_S)
    wrong = [one for one in found["took"] if not one[1] - EARLY_S <= one[2] < one[1] + SLOW_S]
    assert not wrong
