"""`kvt.doctor()` and `kvtransport doctor`: what they say, to whom, and the exit status."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvtransport as kvt
from kvtransport.backends.base import Viability
from kvtransport.cli import main, report
from kvtransport.config import LATER_BACKENDS
from kvtransport.types import BACKENDS
from tests.unit.forbidden_calls import run_without

WORDS = (*BACKENDS, *LATER_BACKENDS)


@pytest.fixture(scope="module")
def found():
    return kvt.doctor()


def test_every_backend_s_word_is_there(found):
    assert set(found.backends) == set(WORDS)
    assert all(found.backends[name].usable for name in BACKENDS)


def test_what_this_version_has_not_got_is_not_usable_and_says_so(found):
    for name in set(WORDS) - set(BACKENDS):
        assert not found.backends[name].usable
        assert found.backends[name].reason == "not in this version"


def test_the_text_has_every_backend_and_group(found):
    text = str(found)
    lines = text.splitlines()
    for word in (*WORDS, *found.machine, "copying"):
        assert any(line.split()[:1] == [word] for line in lines), word
    assert max(map(len, lines)) <= report.WIDTH


def test_the_page_shows_what_is_printed(found):
    if not all(part.usable for backend in found.backends.values() for _, part in backend.parts):
        pytest.skip("the page shows a machine where every trial works")
    page = Path(__file__).parents[2] / "docs" / "how-to" / "find-out-what-works.md"
    shown = page.read_text().split("```text\n")[1].split("\n\n")[0]
    assert shown.splitlines() == ["backends", *report.backend_lines(found.backends)]


def test_json_is_the_same(found):
    told = json.loads(json.dumps(found.to_json()))
    assert told["works"] is found.works is True
    assert {name: b["usable"] for name, b in told["backends"].items()} == {
        name: b.usable for name, b in found.backends.items()
    }
    assert told["backends"]["tcp"]["parts"]["loopback TCP"]["usable"] is True


def test_an_unusable_one_shows_reason_and_remedy():
    part = Viability(False, "sockets are forbidden", "allow them")
    lines = report.backend_lines(
        {"tcp": Viability(False, part.reason, part.remedy, (("loopback TCP", part),))}
    )
    assert lines == [
        "  tcp       doesn't work",
        "            loopback TCP: doesn't work: sockets are forbidden",
        "              -> allow them",
    ]
    (line, remedy) = report.backend_lines({"tcp": part})
    assert line == "  tcp       doesn't work: sockets are forbidden"
    assert remedy.strip() == "-> allow them"


def test_advice(monkeypatch, found):
    machine = json.loads(json.dumps(found.machine))
    machine["limits"]["open_files"] = 1024
    machine["cores"].update(usable=[0, 1, 2, 3], cgroup_quota=1.5)
    monkeypatch.setattr(report.machine, "facts", lambda: machine)
    monkeypatch.setattr(report, "copy_speed", lambda: {"nbytes": 1, "gb_per_s": {}})
    files, quota = report.examine().advice
    assert "ulimit -n" in files
    assert "movers" in quota
    assert "1.5 cores" in quota
    assert "not measured" in str(report.examine())


def test_no_framework_is_imported_to_be_asked():
    code = "import sys, kvtransport as kvt; print(kvt.doctor().machine['versions'], 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip().endswith("False")
    assert f"'torch': '{importlib.metadata.version('torch')}'" in out.stdout


# --- the command ---


def test_the_command(capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("backends\n  inproc    works\n")


def test_the_command_s_json(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["works"] is True


def test_the_status_where_tcp_does_not_work():
    done = run_without(
        "socket", "from kvtransport.cli import main; raise SystemExit(main(['doctor', '--json']))"
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert told["works"] is False
    assert not told["backends"]["tcp"]["usable"]
    assert told["backends"]["tcp"]["reason"]


def test_as_a_module_and_as_a_script():
    for command in ([sys.executable, "-m", "kvtransport"], [f"{sys.prefix}/bin/kvtransport"]):
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
        assert out.stdout == f"kvtransport {kvt.__version__}\n"


def test_a_wrong_command_line_is_status_2(capsys):
    for line in ([], ["nonsense"], ["doctor", "--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(line)
        assert caught.value.code == 2
    assert "usage: kvtransport" in capsys.readouterr().err
