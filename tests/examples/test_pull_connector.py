"""The pull-mode connector as a user runs it, over each way; and that its checks notice a connector that is wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pulling.scenarios import SCENARIOS

from tests.waiting import until

CONNECTOR = Path(__file__).resolve().parents[2] / "examples" / "pull_connector.py"
ROW = re.compile(r"(\d to \d)  (\S.*?) +(\d+\.\d) MB  (\w+): (.*)")
LIMIT_S = 150

BROKEN = """
import sys
from pull_connector import SchedulerSide, WorkerSide
from pulling.scenarios import run

class Wrong(WorkerSide):
    {method}

if __name__ == "__main__":
    sys.exit(run((SchedulerSide, Wrong), None, [{scenario!r}]))
"""
WRONG, DENIED, EXPIRED = r"\d+ words are wrong after load", "D says PermissionDenied", "'outcome': 'expired'"
FAULTS = {  # what is said of one rank to two, and of two to one
    "the other half of the heads": (
        "abort when done",
        """def _sources(self, ranks):
        for source in super()._sources(ranks):
            first = source.src_heads.start
            source.src_heads = slice(4 - first, 8 - first)
            yield source""",
        (WRONG, DENIED),
    ),
    "the ranks the other way round": (
        "all blocks",
        """def _sources(self, ranks):
        return super()._sources(ranks[::-1])""",
        ("P computed, D loaded, P read, D freed", WRONG),
    ),
    "the first blocks in place of those that are missing": (
        "prefix hit",
        """def load(self, request, ids, positions):
        super().load(request, ids, {group: list(range(len(ids[group]))) for group in ids})
        self._pulls[request["id"]].positions = positions""",
        (WRONG, WRONG),
    ),
    "no lease": (
        "expiry while queued, held",
        """def hold(self, request):
        pass""",
        (EXPIRED, EXPIRED),
    ),
    "nothing is cancelled": (
        "abort in flight",
        """def abort(self, request):
        self._pull(request).aborted = True""",
        ("20 aborts came too late", "20 aborts came too late"),
    ),
}


def finished(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(CONNECTOR.parent)}
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        env=environment,
    )


def of_session(session: int) -> list[str]:
    """The command lines of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = stat.read_text().rpartition(")")[2].split()
            if int(numbers[2]) == session and state != "Z":
                found.append(stat.with_name("cmdline").read_text())
        except OSError:  # it ended while we looked
            continue
    return found


@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize("backends", ["", "tcp"])
def test_every_scenario(backends: str) -> None:
    run = finished(str(CONNECTOR), *(["--backends", backends] if backends else []))
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert lines[-1] == "every byte was checked, and is right"
    rows = [ROW.fullmatch(line) for line in lines if " MB " in line]
    assert [row.group(1, 2) for row in rows if row] == [
        (ranks, name) for ranks in ("1 to 2", "2 to 1") for name in SCENARIOS
    ]
    for row in rows:
        assert row is not None
        _, steps = SCENARIOS[row[2]]
        heard = [step[0] + " " + step[2:].partition("/")[0] for step in steps.split() if step[1] == "="]
        assert (row[4], row[5]) == ("ok", ", ".join(heard))
    ways = [line.split(";")[0] for line in lines if line.startswith("over ")]
    assert len(ways) == 2
    assert not backends or ways == ["over tcp"] * 2


@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_connector_that_is_wrong_is_noticed(fault: str, tmp_path: Path) -> None:
    scenario, method, said = FAULTS[fault]
    script = tmp_path / "wrong.py"
    script.write_text(BROKEN.format(scenario=scenario, method=method))
    run = finished(str(script))
    assert run.returncode == 1, run.stdout
    assert run.stdout.splitlines()[-1] == "FAILED"
    rows = [line for line in run.stdout.splitlines() if " MB " in line]
    for row, complaint in zip(rows, said, strict=True):
        assert ROW.fullmatch(row)
        assert re.search(complaint, row), run.stdout


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_router(ending: signal.Signals) -> None:
    command = [sys.executable, str(CONNECTOR)]
    router = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert router.stdout is not None
    try:
        assert ROW.fullmatch(router.stdout.readline().rstrip("\n"))  # they are all at work
        assert len(of_session(router.pid)) >= 6
    finally:
        router.send_signal(ending)
        router.communicate(timeout=20)
    until(lambda: not of_session(router.pid), 20)
