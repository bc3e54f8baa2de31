"""README and docs as a new user meets them: the quickstart in two shells, every block of Python, every link.

A block runs if its fence says `python`: it must be complete in itself, and is run in a process of its own.
Blocks that aren't to be run say `text`, `c++` and the like, or `python-part` for a piece of Python.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kvtransport as kvt

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TAGS = {"python", "python-part", "sh", "text", "c++", "mermaid", ""}


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """(language tag, line of the first line, text) of each fenced block."""
    found = []
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened, lines = (line[3:].strip(), number + 1), []
            else:
                found.append((*opened, "\n".join(lines) + "\n"))
                opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{page}: a block isn't closed"
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


SNIPPETS = [
    pytest.param(text, id=f"{name(page)}:{line}")
    for page in PAGES
    for tag, line, text in blocks(page)
    if tag == "python"
]


def environment() -> dict[str, str]:
    """A user's, in the activated venv: `python` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVTRANSPORT_")}
    return {**kept, "PATH": path}


def finished(shell: subprocess.Popen[str]) -> str:
    """Its output; what it had said until then, where it doesn't end."""
    try:
        return shell.communicate(timeout=45)[0]
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        return shell.communicate()[0] + "\n(killed: it did not end within 45 s)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("first", [0, 1], ids=["receiver first", "sender first"])
def test_quickstart_of_the_readme(first: int, tmp_path: Path) -> None:
    terminals = [text for tag, _, text in blocks(README) if tag == "sh"]
    assert len(terminals) == 2
    port = str(free_port())
    shells = []
    try:
        for i in (first, 1 - first):
            assert "7000" in terminals[i]
            script = terminals[i].replace("7000", port)
            shells.append(
                subprocess.Popen(
                    ["bash", "-c", script],
                    cwd=tmp_path,
                    env=environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,  # a group of its own: bash and its python
                )
            )
        output = [finished(shell) for shell in shells]
    finally:
        for shell in shells:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    received, sent = output if first == 0 else reversed(output)
    assert [shell.returncode for shell in shells] == [0, 0], output
    promised = next(text for tag, _, text in blocks(README) if text.startswith("received "))
    way = "shm" if kvt.doctor().backends["shm"].parts[-1][1].usable else "tcp"
    assert received == promised.replace("shm", way)
    assert sent == f"sent 196608 bytes over {way}\n"


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("#"):
            continue
        if not (page.parent / target.partition("#")[0]).exists():
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    """A span that looks like a path of this repository is one."""
    roots = r"(?:kvtransport|native|tests|bench|examples|scripts|docs)"
    spans = re.findall(rf"`({roots}/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [span for span in spans if not (ROOT / span).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_say_what_they_are(page: Path) -> None:
    assert {tag for tag, _, _ in blocks(page)} <= TAGS


def test_each_row_of_the_faults_has_its_test() -> None:
    """A row without a test is a claim without a proof."""
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "faults").glob("test_*.py"))
    page = (ROOT / "docs/reference/faults.md").read_text(encoding="utf-8")
    rows = [
        (row.split("|")[1].strip(), row.split("|")[-2].strip())
        for row in page.splitlines()
        if row[:3] == "| F"
    ]
    assert len(rows) > 10
    assert [row for row, proof in rows if proof != f"`test_f{int(row[1:]):02}`"] == []
    assert [row for row, proof in rows if f"def {proof.strip('`')}_" not in tests] == []
